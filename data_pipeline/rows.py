"""Rows of tokens, the form in which data reaches the objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rows:
    """A micro-batch of packed rows.

    tokens: int64 [B, T], ids of the tokenizer.
    document_ids: int32 [B, T], equal where two tokens of a row belong to the same document; -1 marks
        positions that are not there (a truncated tail).
    positions: int64 [B], the global position of each row in the data order.
    text_bytes: int64 [B], UTF-8 bytes of text that the row's tokens stand for (0 for end-of-text tokens).
    before: int64 [B], the id that precedes each row in its source's stream, end of text before the first row.
    """

    tokens: NDArray[np.int64]
    document_ids: NDArray[np.int32]
    positions: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    before: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Rows:
        """The rows `rows` of the batch, as views."""
        return Rows(
            self.tokens[rows], self.document_ids[rows], self.positions[rows], self.text_bytes[rows], self.before[rows]
        )


class SourceRows(NamedTuple):
    """What a source gives of the rows that it is asked for; the shapes and meanings are those of `Rows`."""

    tokens: NDArray[np.int64]
    document_ids: NDArray[np.int32]
    text_bytes: NDArray[np.int64]
    before: NDArray[np.int64]


def document_ids(
    tokens: NDArray[np.integer], delimiter: int, delimiter_starts_document: bool = False
) -> NDArray[np.int32]:
    """Number the documents of each row from 0, [..., T] -> [..., T].

    The delimiter ends its document, as our end of text does, or starts it, as in the files of llm.c.
    """
    delimiters = tokens == delimiter
    seen = np.cumsum(delimiters, axis=-1)
    return (seen - (seen[..., :1] if delimiter_starts_document else delimiters)).astype(np.int32)
