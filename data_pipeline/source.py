"""What a source of rows is to those who read it: numbered rows of one length, and the tokenizer that made them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.rows import SourceRows
from data_pipeline.tokenizer_base import Tokenizer


class Source(ABC):
    """Rows by number. Reads are positional, hold no state, and may come from many threads.

    path: what the user named, for messages. num_rows: rows there are; sequence_length: tokens of each.
    vocab_size, eos_id, mask_id: of the tokenizer. tokenizer_description: `Tokenizer.describe` and "fingerprint".
    fingerprint: the same for the same rows anywhere, and for no others. notes: what the user should know of the data.
    """

    path: Path
    num_rows: int
    sequence_length: int
    vocab_size: int
    eos_id: int
    mask_id: int
    tokenizer_description: dict[str, Any]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @abstractmethod
    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> SourceRows:
        """Rows `indices` [n] -> tokens [n, T], document ids [n, T], text bytes [n], ids before the rows [n].

        Raises DataError for a row that does not exist or cannot be read as it was written.
        """

    @abstractmethod
    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the rows. Raises DataError if it is not there as it was."""

    @abstractmethod
    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of a folder that `Tokenizer.load` reads, by name."""

    @cached_property
    def token_bytes(self) -> NDArray[np.int64] | None:
        """UTF-8 bytes of text per id, int64 [vocab_size]; None where an id has no fixed number of bytes."""
        return self.load_tokenizer().token_bytes()

    def _existing(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """`indices` as int64 [n]; DataError if one is outside."""
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.num_rows):
            raise DataError(
                f"{self.path} has rows 0 to {self.num_rows - 1}, but a row from {wanted.min()} to "
                f"{wanted.max()} was asked for"
            )
        return wanted
