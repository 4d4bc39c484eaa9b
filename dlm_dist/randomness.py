"""Keyed random numbers: every draw of training is a pure function of (seed, purpose, position).

Nothing here has state. `position` is the global position of a sample in the data order (or any other
non-negative integer that names what is drawn), so a draw does not depend on rank, worker, batch split or on
what was drawn before. The generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), taken from numpy, whose raw words are integers and the same on every platform; golden
vectors in the tests pin them.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

UInt64Array = NDArray[np.uint64]

_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


@lru_cache(maxsize=1024)
def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for the thing called `names` under `seed`; stable across platforms and versions."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class _Key(np.random.bit_generator.ISeedSequence):
    """Gives a generator its key: one made with `key=` alone asks the operating system for a seed it never uses."""

    def __init__(self, key: UInt64Array) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> UInt64Array:
        """The key of Philox4x64, two words."""
        assert (n_words, dtype) == (2, np.uint64)
        return self._key


@lru_cache(maxsize=1024)
def _key(seed: int, purpose: str) -> _Key:
    return _Key(np.array([derive_seed(seed, purpose), 0], dtype=np.uint64))


def uint64(seed: int, purpose: str, position: int, n: int) -> UInt64Array:
    """`n` keyed 64-bit words for `position` [n]. Different purposes and positions give independent streams."""
    # The position sits in the third counter word, so the stream of one position has 2**128 words before
    # it could run into that of the next.
    counter = np.array([0, 0, position, 0], dtype=np.uint64)
    key = _key(seed, purpose)
    return np.random.Philox(key, counter=counter).random_raw(n)  # type: ignore[arg-type]  # stubs know one kind only


def uniform(seed: int, purpose: str, position: int, n: int) -> NDArray[np.float64]:
    """`n` keyed doubles in [0, 1) for `position` [n], 53 bits each."""
    return to_unit_interval(uint64(seed, purpose, position, n))


def to_unit_interval(words: UInt64Array) -> NDArray[np.float64]:
    """64-bit words to doubles in [0, 1): the top 53 bits, exactly representable."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash_uint64(key: int, values: NDArray[np.integer]) -> UInt64Array:
    """A keyed 64-bit mix of each value (same shape as `values`), vectorised over many values at once.

    Two rounds of the splitmix64 finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014) with the key added before each. For permutations and scrambles over arrays of
    integers; use `uint64` where a long stream per position is needed.
    """
    mixed = values.astype(np.uint64)
    with np.errstate(over="ignore"):  # sums and products are modulo 2**64; numpy warns of a single number's
        for round_constant in (_GOLDEN, _MIX_1):
            mixed = mixed + np.uint64((key * round_constant + _GOLDEN) & _WORD)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_MIX_1)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_MIX_2)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed
