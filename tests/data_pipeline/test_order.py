from __future__ import annotations

import math
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.loader import SampleStream
from data_pipeline.order import PERIOD, CubicPrimeOrder, SampleOrder, SkipList, cubic_prime, permute, quotas
from data_pipeline.shards import ShardedSource, write_source
from data_pipeline.tokenizer_backends.bytes import ByteTokenizer


@given(st.integers(1, 3000), st.integers(0, 2**62))
def test_permutation_hits_every_row_once(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 64, 65535, 65536, 65537])
def test_permutation_hits_every_row_once_at_edges(size: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, 5)), np.arange(size))


def test_large_permutations_stay_in_range_without_collisions() -> None:
    for size in (10**12, 2**61 + 1):
        rows = permute(np.arange(20_000), size, 1)
        assert len(np.unique(rows)) == 20_000
        assert rows.min() >= 0
        assert rows.max() < size


def test_small_permutations_are_about_equally_frequent() -> None:
    count = 1500
    seen = Counter(tuple(permute(np.arange(3), 3, key).tolist()) for key in range(count))
    assert len(seen) == 6
    # Four standard errors of a count with probability 1/6.
    bound = 4 * (count * 1 / 6 * 5 / 6) ** 0.5
    assert all(abs(times - count / 6) < bound for times in seen.values()), seen


def test_neighbours_are_not_kept_together() -> None:
    rows = permute(np.arange(100_000), 100_000, 3).astype(float)
    correlation = np.corrcoef(rows[:-1], rows[1:])[0, 1]
    assert abs(correlation) < 4 / 100_000**0.5


def test_golden_vectors() -> None:
    """These never change: a run of yesterday must find the same rows tomorrow."""
    assert permute(np.arange(8), 8, 42).tolist() == GOLDEN_PERMUTATION
    source, epoch, row = SampleOrder([1000, 10, 10**12], [0.7, 0.1, 0.2], seed=7).locate(np.arange(12) * 9973)
    assert source.tolist() == GOLDEN_SOURCE
    assert epoch.tolist() == GOLDEN_EPOCH
    assert row.tolist() == GOLDEN_ROW
    assert (source.dtype, epoch.dtype, row.dtype) == (np.int32, np.int64, np.int64)


GOLDEN_PERMUTATION = [6, 1, 7, 5, 2, 4, 3, 0]
GOLDEN_SOURCE = [0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2]
GOLDEN_EPOCH = [0, 6, 13, 20, 28, 34, 0, 48, 55, 62, 69, 0]
GOLDEN_ROW = [965, 990, 629, 940, 595, 506, 973330316977, 884, 195, 795, 451, 907134872604]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 2**40), st.data())
def test_each_source_is_drawn_epoch_by_epoch(sizes: list[int], seed: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=len(sizes), max_size=len(sizes)))
    order = SampleOrder(sizes, weights, seed)
    source, epoch, row = order.locate(np.arange(2000))
    for number, size in enumerate(sizes):
        drawn = source == number
        draws = np.arange(drawn.sum())
        assert np.array_equal(epoch[drawn], draws // size)
        rows = row[drawn]
        for start in range(0, len(rows) - size + 1, size):
            assert sorted(rows[start : start + size]) == list(range(size))


def test_epochs_and_seeds_and_sources_differ() -> None:
    first = SampleOrder([500, 500], [1, 1], seed=1)
    source, epoch, row = first.locate(np.arange(4000))
    orders = [row[(source == s) & (epoch == e)].tolist() for s in (0, 1) for e in (0, 1, 2)]
    orders.append(SampleOrder([500], [1], seed=2).locate(np.arange(500))[2].tolist())
    orders.append(SampleOrder([500], [1], seed=1).locate(np.arange(500))[2].tolist())
    # Source 0 has the same order whatever stands beside it: the last one equals the first.
    assert orders[-1] == orders[0]
    assert len({tuple(one) for one in orders}) == len(orders) - 1


def test_location_is_a_function_of_the_position_alone() -> None:
    order = SampleOrder([33, 7], [3, 2], seed=9)
    positions = np.arange(3 * PERIOD - 50, 3 * PERIOD + 50)
    together = order.locate(positions)
    shuffled = np.random.default_rng(0).permutation(len(positions))
    apart = SampleOrder([33, 7], [3, 2], seed=9).locate(positions[shuffled])
    for one, other in zip(together, apart, strict=True):
        assert np.array_equal(one[shuffled], other)
    assert [len(part) for part in order.locate(np.zeros(0, dtype=np.int64))] == [0, 0, 0]


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=6), st.integers(0, 50))
def test_every_period_has_the_exact_mixture(weights: list[float], period: int) -> None:
    expected = quotas(weights)
    assert sum(expected) == PERIOD
    total = sum(weights)
    assert all(abs(slots - PERIOD * w / total) < 1 for slots, w in zip(expected, weights, strict=True))
    order = SampleOrder([10**6] * len(weights), weights, seed=3)
    source, _, _ = order.locate(np.arange(period * PERIOD, (period + 1) * PERIOD, 1))
    assert np.bincount(source, minlength=len(weights)).tolist() == expected


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([], [], "at least one source"),
        ([5], [1, 2], "1 sources have 2 weights"),
        ([5, 0], [1, 1], "source 1 has no rows"),
        ([5, 5], [1, 0], "source 1 has the weight 0"),
        ([5, 5], [1, float("nan")], "source 1 has the weight nan"),
        ([5, 5], [1, 1e-9], "less than 1/65536 of the mixture"),
    ],
)
def test_impossible_mixtures_are_refused(sizes: list[int], weights: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SampleOrder(sizes, weights, seed=0)


ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda r: (r[0], r[0] + r[1])), max_size=6)


@given(ranges, st.integers(0, 80), st.integers(0, 30))
def test_skip_list_agrees_with_counting(skipped: list[tuple[int, int]], data_pos: int, n: int) -> None:
    def allowed() -> list[int]:
        inside = {p for start, stop in skipped for p in range(start, stop)}
        return list(islice((p for p in range(10**6) if p not in inside), data_pos + n))

    skip = SkipList(skipped)
    assert skip.positions(data_pos, n).tolist() == allowed()[data_pos:]
    drawn = allowed()[:data_pos]
    last = drawn[-1] if drawn else -1
    assert skip.passed(data_pos) == [(start, stop) for start, stop in skip.ranges if start < last]
    assert all(before[1] < after[0] for before, after in zip(skip.ranges, skip.ranges[1:], strict=False))


def test_skip_list_merges_and_refuses() -> None:
    assert SkipList([(8, 9), (3, 5), (5, 7), (4, 6)]).ranges == [(3, 7), (8, 9)]
    for bad in ((5, 5), (6, 2), (-1, 4)):
        with pytest.raises(DataError, match="is no range of positions to skip"):
            SkipList([bad])


def test_skipping_changes_nothing_before_the_range() -> None:
    plain, skipping = SkipList(), SkipList([(100, 200)])
    assert np.array_equal(plain.positions(0, 100), skipping.positions(0, 100))
    assert skipping.positions(99, 3).tolist() == [99, 200, 201]
    assert skipping.passed(100) == []
    assert skipping.passed(101) == [(100, 200)]


# --- BlinkDL's order -------------------------------------------------------------------------------------------


def test_cubic_prime_is_the_published_one() -> None:
    """--magic_prime of RWKV-LM's recipes: minipile at 512 tokens, the Pile at 4096."""
    assert cubic_prime((1498226207 - 1) // 512) == 2926181
    assert cubic_prime((332115325534 - 1) // 4096) == 81082817


@given(st.integers(3, 5000))
def test_cubic_prime_is_the_largest_below(size: int) -> None:
    prime = cubic_prime(size)
    is_prime = [all(n % d for d in range(2, n)) for n in range(prime, size)]
    assert prime % 3 == 2
    assert is_prime[0]
    assert not any(is_prime[i] for i in range(1, len(is_prime)) if (prime + i) % 3 == 2)


@given(st.integers(3, 3000))
def test_cubic_order_hits_every_row_below_the_prime_once_an_epoch(size: int) -> None:
    order = CubicPrimeOrder(size)
    assert order.epoch_length == order.prime < size
    source, epoch, row = order.locate(np.arange(3 * order.prime))
    assert not source.any()
    assert np.array_equal(epoch, np.repeat([0, 1, 2], order.prime))
    first, *others = row.reshape(3, -1)
    assert np.array_equal(np.sort(first), np.arange(order.prime))
    assert all(np.array_equal(other, first) for other in others)


@pytest.mark.parametrize("size", [2926221, 81082843, 10**9, 7 * 10**9])
def test_cubic_order_is_that_of_rwkv_lm(size: int) -> None:
    """Its dataset.py computes the factor in floats, the rest in Python's integers."""
    order = CubicPrimeOrder(size)
    factor = int(order.prime * ((math.sqrt(5) - 1) / 2))
    positions = np.array([0, 1, 2, 40319, 40320, 2_000_000, order.prime - 1, order.prime, 10**15])
    expected = [factor * (n + 1) ** 3 % order.prime for n in positions.tolist()]
    assert order.locate(positions)[2].tolist() == expected
    assert max(expected) < order.prime


def test_cubic_golden_vectors() -> None:
    """These never change: a run of yesterday must find the same rows tomorrow."""
    source, epoch, row = CubicPrimeOrder((1498226207 - 1) // 512).locate(np.array([0, 1, 2, 40320, 2926180, 2926181]))
    assert row.tolist() == GOLDEN_CUBIC
    assert epoch.tolist() == [0, 0, 0, 0, 0, 1]
    assert (source.dtype, epoch.dtype, row.dtype) == (np.int32, np.int64, np.int64)


GOLDEN_CUBIC = [1808479, 2763108, 2010037, 1232952, 0, 1808479]


def test_cubic_order_needs_three_rows_and_one_source() -> None:
    assert CubicPrimeOrder(3).locate(np.arange(4))[2].tolist() == [1, 0, 1, 0]
    with pytest.raises(DataError, match="at least 3 rows, and this one has 2"):
        CubicPrimeOrder(2)


def test_cubic_stream_skips_and_ends_its_epoch_at_the_prime(tmp_path: Path) -> None:
    write_source(tmp_path, np.arange(30 * 4).reshape(30, 4) % 256, ByteTokenizer())
    source = ShardedSource.open(tmp_path)
    stream = SampleStream([source], [1.0], 0, SkipList([(2, 5)]), max_samples=20, order="cubic_prime")
    order = CubicPrimeOrder(20)
    assert stream.epoch_length == order.prime == 17
    positions = stream.positions(0, 20)
    assert positions.tolist() == [0, 1, *range(5, 23)]
    assert np.array_equal(stream.read(positions).tokens, source.read(order.locate(positions)[2]).tokens)
    with pytest.raises(DataError, match="is one of a single source, and there are 2"):
        SampleStream([source, source], [1.0, 1.0], 0, order="cubic_prime")


# --- how often what was read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_of_each_source_are_counted(seed: int) -> None:
    order = SampleOrder([7, 20, 3], [1.0, 0.3, 2.0], seed)
    source = order.locate(np.arange(2 * PERIOD + 100))[0]
    for position in (0, 1, 2, 500, PERIOD - 1, PERIOD, PERIOD + 1, 2 * PERIOD + 100):
        assert order.drawn(position).tolist() == np.bincount(source[:position], minlength=3).tolist()
    assert CubicPrimeOrder(30).drawn(77).tolist() == [77]


def test_epochs_are_rows_read_over_rows(tmp_path: Path) -> None:
    """By brute force: what the stream has read of each source, skipped ranges left out."""
    sizes = [10, 4]
    for number, size in enumerate(sizes):
        write_source(tmp_path / str(number), np.full((size, 4), number), ByteTokenizer())
    sources = [ShardedSource.open(tmp_path / str(number)) for number in range(2)]
    skip = SkipList([(0, 3), (5, 9), (20, 40)])
    stream = SampleStream(sources, [1.0, 3.0], 7, skip, max_samples=8)
    for data_pos in (0, 1, 2, 3, 11, 12, 64):
        read = stream.read(stream.positions(0, data_pos)).tokens[:, 0]
        expected = [(read == 0).sum() / 8, (read == 1).sum() / 4]
        assert stream.epochs(data_pos) == pytest.approx(expected, abs=1e-12)
