"""The errors of the data side: one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations


class DataError(ValueError):
    """The user's input, options or files cannot be used as they are."""


class CorruptShardError(DataError):
    """Bytes on disk are not the bytes that were written; the message names file, row and offset."""
