"""Documents to rows: one end of text behind each document, all joined, the whole cut into rows of T tokens.

A split is one long stream of tokens; row r is tokens r*T .. r*T + T - 1 of it, whatever documents or work
units these come from, so rows need no carried state and any of them can be made alone. The last row is
filled with tokens from the beginning of the stream: nothing is dropped, nothing is padded, and how many
tokens are repeated is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def with_end(ids: NDArray[np.integer], eos_id: int) -> NDArray[np.integer]:
    """A document's ids [n] and its end-of-text token: [n + 1]."""
    return np.append(ids, np.array(eos_id, dtype=ids.dtype))


class PackedStream:
    """The concatenation of parts, cut into rows of `sequence_length`.

    lengths: tokens of each part. load: the part of a number, as a 1-d array or memory map of that length;
    called only for parts that the asked rows need.
    """

    def __init__(
        self, lengths: Sequence[int], load: Callable[[int], NDArray[np.integer]], sequence_length: int
    ) -> None:
        self._load = load
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
        self.sequence_length = sequence_length
        self.num_tokens = int(self._starts[-1])
        self.num_rows = -(-self.num_tokens // sequence_length)
        self.repeated_tokens = self.num_rows * sequence_length - self.num_tokens

    def rows(self, first: int, stop: int) -> NDArray[np.integer]:
        """Rows first .. stop - 1: [stop - first, T], in the type of the parts."""
        assert 0 <= first < stop <= self.num_rows, (first, stop, self.num_rows)
        start, end = first * self.sequence_length, stop * self.sequence_length
        pieces = self._slices(start, min(end, self.num_tokens))
        missing = end - self.num_tokens
        while missing > 0:  # More than one turn only if the whole stream is shorter than a row.
            pieces += self._slices(0, min(missing, self.num_tokens))
            missing -= self.num_tokens
        return np.concatenate(pieces).reshape(stop - first, self.sequence_length)

    def _slices(self, start: int, stop: int) -> list[NDArray[np.integer]]:
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        return [
            self._load(part)[max(0, start - int(self._starts[part])) : stop - int(self._starts[part])]
            for part in range(first, last)
            if self._starts[part] < self._starts[part + 1]
        ]
