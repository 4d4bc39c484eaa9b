"""The order of the data: global position -> (source, epoch, row), by integers alone and with no state.

Three steps. A period table of 65,536 slots says which source a position draws from, each source having its
exact share of every period. The j-th draw from a source with N rows is row number j % N of epoch j // N. A
permutation of [0, N), keyed by (seed, source, epoch), says which row that is: a Feistel network on the
smallest binary domain that holds N, walked along its cycles until it lands inside [0, N) (Black and Rogaway,
"Ciphers with arbitrary finite domains", CT-RSA 2002). Nothing depends on the numpy version: golden vectors
in the tests pin it. `CubicPrimeOrder` is another order, for those who want to repeat RWKV-LM's runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import isqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from dlm_dist.randomness import derive_seed, hash_uint64, uint64

PERIOD = 65536
_ROUNDS = 6
# On fewer bits a network of 6 rounds does not reach all permutations about equally often.
_MINIMUM_BITS = 4


def permute(
    values: NDArray[np.int64], size: int, key: int, tweaks: NDArray[np.uint64] | None = None
) -> NDArray[np.int64]:
    """Where keyed permutations of [0, size) send each of `values` [n]; O(1) memory per value.

    The permutation is chosen by `key` and, value by value, by `tweaks` [n] (None: 0 for all).
    """
    bits = max(_MINIMUM_BITS, (size - 1).bit_length())
    round_keys = [derive_seed(key, "feistel", i) for i in range(_ROUNDS)]
    if tweaks is None:
        tweaks = np.zeros(len(values), dtype=np.uint64)
    result = _feistel(values.astype(np.uint64), bits, round_keys, tweaks)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        walked = _feistel(result[outside], bits, round_keys, tweaks[outside])
        result[outside] = walked
        outside = outside[walked >= size]
    return result.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], bits: int, round_keys: Sequence[int], tweaks: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """A keyed bijection of [0, 2**bits). The halves swap each round."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left = values >> np.uint64(right_bits)
    right = values & np.uint64((1 << right_bits) - 1)
    for key in round_keys:
        mixed = hash_uint64(key, right ^ tweaks) & np.uint64((1 << left_bits) - 1)
        left, right = right, left ^ mixed
        left_bits, right_bits = right_bits, left_bits
    # An even number of rounds: the halves have their first widths again.
    return (left << np.uint64(right_bits)) | right


def quotas(weights: Sequence[float], period: int = PERIOD) -> list[int]:
    """Slots per source: exact shares of `period` by the largest-remainder rule; they sum to `period`."""
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    shares = [period * weight / total for weight in exact]
    slots = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (slots[i] - shares[i], i))
    for i in by_remainder[: period - sum(slots)]:
        slots[i] += 1
    return slots


class Order(Protocol):
    """Where the sample at a position lies: a function of the position alone."""

    sizes: list[int]
    """Rows of each source that are drawn."""
    epoch_length: int
    """Positions after which every row that the order draws was drawn once, in the mean over the sources."""

    def drawn(self, position: int) -> NDArray[np.int64]:
        """How many of the positions below `position` draw from each source, [sources]."""

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Positions int64 [n] -> source int32 [n], epoch int64 [n], row int64 [n]."""


class SampleOrder:
    """Which row of which source each global position draws.

    sizes: rows of each source. weights: relative shares of the sources, any positive numbers.
    Raises DataError for an empty source, a weight that is not positive, or one too small for a slot.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        _check_mixture(sizes, weights)
        self.sizes = [int(size) for size in sizes]
        self.epoch_length = sum(self.sizes)
        self.seed = seed
        self._quotas = np.array(quotas(weights), dtype=np.int64)
        if (self._quotas == 0).any():
            source = int(np.flatnonzero(self._quotas == 0)[0])
            raise DataError(
                f"the weight {weights[source]} of source {source} is less than 1/{PERIOD} of the mixture, "
                "so it would never be drawn; raise the weight or remove the source"
            )
        # A stable sort of fixed words is the same on every platform and numpy version.
        shuffle = np.argsort(uint64(seed, "order/mixture", 0, PERIOD), kind="stable")
        self._source_of_slot = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self._quotas)[shuffle]
        self._slots = [np.flatnonzero(self._source_of_slot == source) for source in range(len(self.sizes))]
        self._earlier_in_period = np.zeros(PERIOD, dtype=np.int64)
        for slots in self._slots:
            self._earlier_in_period[slots] = np.arange(len(slots))

    def drawn(self, position: int) -> NDArray[np.int64]:
        """How many of the positions below `position` draw from each source, [sources]."""
        periods, rest = divmod(position, PERIOD)
        within = np.array([np.searchsorted(slots, rest) for slots in self._slots], dtype=np.int64)
        return periods * self._quotas + within

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Positions int64 [n] -> source int32 [n], epoch int64 [n], row int64 [n]."""
        assert positions.ndim == 1
        assert len(positions) == 0 or positions.min() >= 0
        period, slot = np.divmod(positions.astype(np.int64), PERIOD)
        source = self._source_of_slot[slot]
        draw = period * self._quotas[source] + self._earlier_in_period[slot]
        epoch, within = np.divmod(draw, np.array(self.sizes, dtype=np.int64)[source])
        row = np.empty_like(within)
        for number, size in enumerate(self.sizes):
            here = np.flatnonzero(source == number)
            key = derive_seed(self.seed, "order/shuffle", number)
            epoch_keys = hash_uint64(derive_seed(key, "epoch"), epoch[here])
            row[here] = permute(within[here], size, key, epoch_keys)
        return source, epoch, row


class CubicPrimeOrder:
    """BlinkDL's order of the rows of one source (RWKV-LM), which needs no seed: the same for everyone.

    p is the largest prime = 2 (mod 3) below `size`, so that x -> x^3 is a permutation of the numbers below p. Position
    n, from 0 on, has row floor(p * (sqrt(5) - 1) / 2) * (n + 1)^3 mod p. After p samples the same permutation comes
    again, as it does in RWKV-LM; the rows from p to size - 1 are never drawn. With the rows of a token file p is his
    --magic_prime: the largest such prime below tokens / T - 1. Raises DataError for fewer than 3 rows.
    """

    def __init__(self, size: int) -> None:
        self.prime = cubic_prime(size)
        self.sizes = [self.prime]
        self.epoch_length = self.prime
        # floor((sqrt(5 p^2) - p) / 2), and the inner floor changes nothing, as p is an integer.
        self._factor = (isqrt(5 * self.prime**2) - self.prime) // 2

    def drawn(self, position: int) -> NDArray[np.int64]:
        """Positions below `position`, [1]."""
        return np.array([position], dtype=np.int64)

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Positions int64 [n] -> source int32 [n] (all 0), epoch int64 [n], row int64 [n]."""
        prime = self.prime
        # Python's integers: the products pass 64 bits.
        rows = [self._factor * pow(n + 1, 3, prime) % prime for n in positions.tolist()]
        return np.zeros(len(rows), dtype=np.int32), positions // prime, np.array(rows, dtype=np.int64)


def cubic_prime(size: int) -> int:
    """The largest prime = 2 (mod 3) below `size`. Raises DataError if there is none."""
    for candidate in range(size - 1, 1, -1):
        if candidate % 3 == 2 and all(candidate % divisor for divisor in range(2, isqrt(candidate) + 1)):
            return candidate
    raise DataError(f"the cubic-prime order needs a source of at least 3 rows, and this one has {size}")


def _check_mixture(sizes: Sequence[int], weights: Sequence[float]) -> None:
    if not sizes:
        raise DataError("the data order needs at least one source")
    if len(sizes) != len(weights):
        raise DataError(f"{len(sizes)} sources have {len(weights)} weights; give one weight for each source")
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        if size < 1:
            raise DataError(f"source {source} has no rows; remove it or build it again")
        if not 0 < weight < float("inf"):
            raise DataError(f"source {source} has the weight {weight}; a weight is a positive number")


class SkipList:
    """Half-open ranges [start, stop) of absolute positions that training passes over.

    Sample number s (the s-th that is not skipped) has an absolute position of its own; noise and rows are
    keyed by the absolute position, so a later skip changes nothing before it. Ranges may overlap; they are
    sorted and merged. Raises DataError for a range that is empty or starts below zero.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self.ranges: list[tuple[int, int]] = _merge(ranges)
        starts = np.array([start for start, _ in self.ranges], dtype=np.int64)
        lengths = np.array([stop - start for start, stop in self.ranges], dtype=np.int64)
        self._skipped_up_to = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        # The number of the first sample behind each range.
        self._first_behind = starts - self._skipped_up_to[:-1]

    def positions(self, data_pos: int, n: int) -> NDArray[np.int64]:
        """Absolute positions [n] of the samples number data_pos .. data_pos + n - 1."""
        samples = np.arange(data_pos, data_pos + n, dtype=np.int64)
        return samples + self._skipped_up_to[np.searchsorted(self._first_behind, samples, side="right")]

    def passed(self, data_pos: int) -> list[tuple[int, int]]:
        """The ranges with a drawn sample behind them once `data_pos` samples are drawn: these are history."""
        return self.ranges[: int(np.searchsorted(self._first_behind, data_pos, side="left"))]


def _merge(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((int(start), int(stop)) for start, stop in ranges):
        if start < 0 or stop <= start:
            raise DataError(f"[{start}, {stop}) is no range of positions to skip: need 0 <= start < stop")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged
