"""What a rank's memory holds: the figures of metrics.jsonl, which has the largest over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import psutil
import torch

_NAMES = ("resident_set_bytes", "cuda_allocated_peak_bytes", "cuda_reserved_peak_bytes")


def memory_in_use(device: torch.device) -> list[int]:
    """Bytes of this process that lie in the host's memory now (its resident set, what it shares with others included);
    on CUDA also the most that tensors, and PyTorch's allocator, held on `device` since the last call.
    """
    found = [_process().memory_info().rss]
    if device.type == "cuda":
        statistics = torch.cuda.memory_stats(device)
        found += [statistics["allocated_bytes.all.peak"], statistics["reserved_bytes.all.peak"]]
        torch.cuda.reset_peak_memory_stats(device)
    return found


def memory_figures(largest: Sequence[int]) -> dict[str, int | None]:
    """`largest`: of each number of `memory_in_use` the largest over ranks -> by name; null for what is not there."""
    return dict.fromkeys(_NAMES) | dict(zip(_NAMES, largest, strict=False))


@cache
def _process() -> psutil.Process:
    return psutil.Process()
