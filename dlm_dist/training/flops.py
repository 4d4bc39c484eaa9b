"""Floating-point operations: how many a second this device can do, the base of MFU."""

from __future__ import annotations

import math

import torch

from dlm_dist.training.phases import Stopwatch


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
