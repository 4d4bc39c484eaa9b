"""Random numbers made on a device: the published hash, normal numbers, a function of key and place alone."""

from __future__ import annotations

import math

import numpy as np
import torch

from dlm_dist import randomness
from dlm_dist.device_randomness import keyed_normals, mix32


def lowbias32(word: int) -> int:
    """The hash as its author writes it, on Python's whole numbers."""
    word ^= word >> 16
    word = word * 0x7FEB352D % 2**32
    word ^= word >> 15
    word = word * 0x846CA68B % 2**32
    return word ^ word >> 16


def test_the_hash_is_lowbias32() -> None:
    words = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xDEADBEEF, *range(1000, 1100)]
    assert mix32(torch.tensor(words)).tolist() == [lowbias32(word) for word in words]


def keys(count: int) -> torch.Tensor:
    return torch.from_numpy(randomness.hash_uint64(7, np.arange(count)).view(np.int64))


def test_the_numbers_never_change() -> None:
    found = keyed_normals(torch.tensor(-1234567890123456789), 2, 3)
    assert found.dtype == torch.float32
    expected = [[-1.246625, -1.126632, 3.118847], [0.025457, 0.095172, 0.778836]]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


def test_they_are_normal_and_independent() -> None:
    drawn = torch.stack([keyed_normals(key, 64, 66) for key in keys(100)]).double()
    root = math.sqrt(drawn.numel())
    assert abs(drawn.mean()) * root < 4
    assert abs(drawn.square().mean() - 1) * root / math.sqrt(2) < 4
    assert abs((drawn**4).mean() - 3) * root / math.sqrt(96) < 4
    assert 4.0 < drawn.abs().max() < 4.4
    for one, other in (
        (drawn[:, :-1], drawn[:, 1:]),
        (drawn[:, :, :-1], drawn[:, :, 1:]),
        (drawn[:-1], drawn[1:]),
    ):
        assert abs((one * other).mean()) * root < 4.2
    for share in (0.01, 0.25, 0.5, 0.9):
        below = (drawn < torch.special.ndtri(torch.tensor(share, dtype=torch.float64))).double().mean()
        assert abs(below - share) * root / math.sqrt(share * (1 - share)) < 4


def test_a_number_depends_on_its_key_place_and_channel_alone() -> None:
    first, second = keys(2)
    whole = keyed_normals(first, 40, 16)
    assert torch.equal(keyed_normals(first, 12, 7), whole[:12, :7])
    assert (keyed_normals(second, 40, 16) == whole).float().mean() < 0.01
    other_half = first ^ (1 << 40)
    assert (keyed_normals(other_half, 40, 16) == whole).float().mean() < 0.01
