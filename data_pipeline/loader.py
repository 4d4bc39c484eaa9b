"""Positions to whole optimizer steps of rows, read ahead by threads.

What a step holds is a pure function of its first position, so threads may finish in any order and a changed
plan (resume, rollback, skipped ranges) only needs the read-ahead emptied. There is no other loader state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.order import CubicPrimeOrder, Order, SampleOrder, SkipList
from data_pipeline.rows import Rows
from data_pipeline.source import Source

Step = TypeVar("Step")


class SampleStream:
    """The endless sequence of training samples: sample number -> row, over weighted sources and skipped ranges.

    order: "keyed", by the seed, or "cubic_prime", BlinkDL's, of a single source; DataError for more of them.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        seed: int,
        skip: SkipList | None = None,
        max_samples: int | None = None,
        order: str = "keyed",
    ) -> None:
        sizes = [min(source.num_rows, max_samples or source.num_rows) for source in sources]
        self.sources = list(sources)
        self.order = _order(order, sizes, weights, seed)
        self.skip = skip if skip is not None else SkipList([])
        self.epoch_length = self.order.epoch_length
        """Samples in one epoch."""

    def positions(self, data_pos: int, n: int) -> np.ndarray:
        """Global positions [n] of the samples number data_pos .. data_pos + n - 1."""
        return self.skip.positions(data_pos, n)

    def epochs(self, data_pos: int) -> list[float]:
        """How often the rows of each source have been read, in the mean, by the samples below number data_pos.

        What is passed over is not read.
        """
        if data_pos == 0:
            return [0.0] * len(self.sources)
        drawn = self.order.drawn(int(self.positions(data_pos - 1, 1)[0]) + 1)
        for start, stop in self.skip.passed(data_pos):
            drawn = drawn - (self.order.drawn(stop) - self.order.drawn(start))
        return (drawn / np.array(self.order.sizes)).tolist()

    def read(self, positions: np.ndarray) -> Rows:
        """The rows at global `positions` [B], each read from its source and verified."""
        source_of, _, row_of = self.order.locate(positions)
        sequence_length = self.sources[0].sequence_length
        tokens = np.empty((len(positions), sequence_length), dtype=np.int64)
        document_ids = np.empty((len(positions), sequence_length), dtype=np.int32)
        text_bytes = np.empty(len(positions), dtype=np.int64)
        before = np.empty(len(positions), dtype=np.int64)
        for number, source in enumerate(self.sources):
            chosen = np.flatnonzero(source_of == number)
            if len(chosen):
                rows = source.read(row_of[chosen])
                tokens[chosen], document_ids[chosen] = rows.tokens, rows.document_ids
                text_bytes[chosen], before[chosen] = rows.text_bytes, rows.before
        return Rows(tokens, document_ids, positions, text_bytes, before)


def _order(name: str, sizes: Sequence[int], weights: Sequence[float], seed: int) -> Order:
    if name == "keyed":
        return SampleOrder(sizes, weights, seed)
    assert name == "cubic_prime", name
    if len(sizes) != 1:
        raise DataError(f"the cubic-prime order is one of a single source, and there are {len(sizes)}")
    return CubicPrimeOrder(sizes[0])


class ReadAhead(Generic[Step]):
    """Prepared steps in order: `prepare(data_pos)` runs in threads, a few steps ahead of the consumer.

    `size_at(data_pos)`: how many samples the step there holds.
    """

    def __init__(
        self, prepare: Callable[[int], Step], size_at: Callable[[int], int], depth: int, num_threads: int
    ) -> None:
        self._prepare = prepare
        self._size_at = size_at
        self._depth = max(1, depth)
        self._pool = ThreadPoolExecutor(max_workers=max(1, num_threads), thread_name_prefix="read-ahead")
        self._queue: deque[Future[Step]] = deque()
        self._next_pos = 0

    def seek(self, data_pos: int) -> None:
        """Continue at sample number `data_pos`; what was read ahead is thrown away."""
        for future in self._queue:
            future.cancel()
        self._queue.clear()
        self._next_pos = data_pos

    def next(self) -> Step:
        """The step at the current position; errors of the reading thread are raised here."""
        while len(self._queue) < self._depth:
            self._queue.append(self._pool.submit(self._prepare, self._next_pos))
            self._next_pos += self._size_at(self._next_pos)
        return self._queue.popleft().result()

    def close(self) -> None:
        """Stop the threads."""
        self.seek(0)
        self._pool.shutdown(wait=True, cancel_futures=True)
