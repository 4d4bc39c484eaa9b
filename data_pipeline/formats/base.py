"""What an input format has to say: how a file is cut into pieces of work, and how a piece is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file, read in one go by one worker; a whole file if it cannot be divided."""

    path: str
    format: str
    start: int
    stop: int


@dataclass(frozen=True)
class Document:
    """One text. place: a line of the piece counted from 1, or a part of a text file."""

    text: str
    place: int


@dataclass(frozen=True)
class BadRecord:
    """Something that should have been a document, with the reason why it is none."""

    place: int
    reason: str


@dataclass(frozen=True)
class ReadOptions:
    """How to read. text_key: the key of the text in a JSON object. split_text_at: a regular expression (as for
    `re.MULTILINE`) before each match of which a text file is cut into documents, None for one document."""

    text_key: str = "text"
    split_text_at: str | None = None


class Format(Protocol):
    """An input format. place_name: what `Document.place` counts, as in "line 7"."""

    name: str
    suffixes: tuple[str, ...]
    place_name: str

    def pieces(self, path: Path, piece_bytes: int) -> list[Piece]:
        """The file cut into pieces of about `piece_bytes`, in order. Depends on the file alone."""
        ...

    def read(self, piece: Piece, options: ReadOptions) -> Iterator[Document | BadRecord]:
        """The piece's documents and what failed to be one, in order. Raises DataError if it is unreadable."""
        ...

    def places_before(self, path: str, starts: Sequence[int]) -> list[int]:
        """How many places come before the pieces that start at `starts` (ascending); reads the file once."""
        ...
