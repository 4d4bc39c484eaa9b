"""The range of times at which the loss of a block varies least, found on held-out rows (BD3-LM's clipped schedules).

Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models", 2025: training
with times from such a range has less noisy gradients. Blocks are drawn once, over all times. Those with a time in a
range are what training with that range would draw, since what a block hides and how it weighs depend on its time
alone. So one pass judges all ranges, by the same draws.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.source import Source
from dlm_dist.diffusion.base import FloatArray, NoisyBatch
from dlm_dist.diffusion.block_diffusion import BlockDiffusion
from dlm_dist.evaluation.bound import EVALUATION_SEED, measure_samples, timed_parts

_STEPS = 20
RANGES = (
    (0.0, 1.0),
    *(
        (first / _STEPS, (first + width) / _STEPS)
        for width in (10, 12, 14, 16, 18)
        for first in range(_STEPS - width + 1)
    ),
)
"""All times, and the ranges of 0.5, 0.6, ... 0.9 that begin at a multiple of 0.05: BD3-LM's grid."""

MIN_BLOCKS = 20
"""Held-out blocks that a range must hold to be chosen."""


@dataclass(frozen=True)
class RangeChoice:
    """The range of least variance, and that variance beside the one over all times: of nats per token of a block."""

    t_min: float
    t_max: float
    variance: float
    full_variance: float
    blocks: int
    """Held-out blocks that were drawn, over all times."""


def least_variance(times: FloatArray, losses: FloatArray) -> RangeChoice:
    """The choice among RANGES by the blocks' `times` [N] and `losses` [N]; of equal ones the first."""
    full_variance = best = float(losses.var())
    t_min, t_max = RANGES[0]
    for low, high in RANGES[1:]:
        inside = losses[(times >= low) & (times <= high)]
        # Where the loss is not a number no range is better.
        if len(inside) >= MIN_BLOCKS and inside.var() < best:
            t_min, t_max, best = low, high, float(inside.var())
    return RangeChoice(t_min, t_max, best, full_variance, len(losses))


def search_range(
    model: Any,
    source: Source,
    device: torch.device,
    objective: BlockDiffusion,
    *,
    block_length: int,
    num_rows: int,
    draws: int = 1,
) -> RangeChoice:
    """The range of times for `objective` in blocks of `block_length`, by the first `num_rows` rows of `source`.

    A function of the model's weights alone: rows and noise are fixed, as for `evaluate_bound`. Collective where
    torch.distributed runs: every rank must call, and all get what rank 0 has found.
    """
    over_all_times = replace(
        objective,
        seed=EVALUATION_SEED,
        block_lengths=((0, block_length),),
        t_min=0.0,
        t_max=1.0,
        clip_search=False,
        clip_ranges=(),
        random_length_prob=0.0,
    )

    def measure(batch: NoisyBatch, losses: FloatArray) -> FloatArray:
        times, nats, tokens = timed_parts(batch, losses)
        return np.concatenate([times, nats / tokens], axis=1)

    found = measure_samples(model, source, device, over_all_times, measure, num_rows=num_rows, draws=draws)
    times, losses = np.split(found, 2, axis=1)
    choice = [least_variance(times.reshape(-1), losses.reshape(-1))]
    if dist.is_initialized():
        dist.broadcast_object_list(choice, src=0)
    return choice[0]
