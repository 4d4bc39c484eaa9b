"""Floating-point operations: those of a step of the model, and those that the device can do in a second.

MFU (model FLOPs utilisation, PaLM, arXiv 2204.02311) is the one over the other; docs/metrics.md has the formula.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from dlm_dist.config import RunConfig
from dlm_dist.diffusion.block_diffusion import BlockLengths
from dlm_dist.training.batches import StepTotals
from dlm_dist.training.phases import Stopwatch

BACKWARD = 2.0
"""FLOPs of the backward pass over those of the forward pass: a product gives two, one for each factor's gradient."""


def step_flops(model: Any, config: RunConfig, totals: StepTotals, position: int) -> float:
    """Model FLOPs of the step whose first sample is at `position`: forward and backward, over all ranks.

    Layers run on every token that is read, the head on the rows that enter the loss. What is computed twice to save
    memory (gradient checkpointing, the logits of the backward pass) counts once.
    """
    length = config.data.sequence_length
    assert length is not None
    body = model.flops_per_token(length, _block_length(config, length, position)) * totals.read
    return (1.0 + BACKWARD) * (body + model.head_flops_per_row() * totals.supervised)


def _block_length(config: RunConfig, length: int, position: int) -> int | None:
    """That of block diffusion; None for other objectives, whose tokens see all of their row."""
    objective = config.objective
    if objective.name != "block" or objective.block_lengths is None:
        return None
    return int(BlockLengths(objective.block_lengths).at(np.array([position]), length)[0])


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on this device, best of a few tries; the base of MFU.

    Measured at every start, because no table knows every machine: MFU is relative to what this one can do
    with the threads that this rank has.
    """
    size, tries = (8192, 5) if device.type == "cuda" else (1024, 4)
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    torch.mm(a, b)
    best = math.inf
    for _ in range(tries):
        with Stopwatch() as watch:
            result = torch.mm(a, b)
            result[0, 0].item()
        best = min(best, watch.seconds)
    return 2.0 * size**3 / best
