"""Keyed random numbers made on the device that needs them, the same bits on every device.

For draws that are too many to make on the host and send over: a number is a function of a key and of its place, made
of whole numbers, so nothing depends on the kind of device, its generators, or how many numbers are made at once.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF
_LOW_16 = 0xFFFF


def mix32(words: Tensor) -> Tensor:
    """lowbias32, a bijection of 32-bit words held in int64 (C. Wellons, "Prospecting for Hash Functions", 2018)."""
    words = (words ^ (words >> 16)) * 0x7FEB352D & _LOW_32
    # The factor 0x846CA68B less 2**32, which is the same in the low 32 bits: no product leaves 64 bits.
    words = (words ^ (words >> 15)) * (0x846CA68B - 2**32) & _LOW_32
    return words ^ (words >> 16)


def keyed_normals(key: Tensor, length: int, width: int) -> Tensor:
    """Standard normal numbers [length, width] fp32, on the device of `key` (0-d int64, all 64 bits of which count).

    Each is a quantile looked up by 16 bits of a hash of (key, place, channel): up to 4.3 in size, mean 0, variance 1.
    """
    places = mix32((torch.arange(length, device=key.device) + key) & _LOW_32)
    pairs = mix32((torch.arange(-(-width // 2), device=key.device) + (key >> 32)) & _LOW_32)
    words = mix32((places[:, None] + pairs) & _LOW_32)
    quantiles = _quantiles(key.device)
    halves = quantiles[words & _LOW_16], quantiles[words >> 16]
    return torch.stack(halves, dim=-1).flatten(1)[:, :width]


@cache
def _quantiles(device: torch.device) -> Tensor:
    """The normal distribution's 2**16 quantiles at the middles of equal shares, scaled to variance 1: fp32."""
    count = _LOW_16 + 1
    table = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return (table / table.square().mean().sqrt()).float().to(device)
