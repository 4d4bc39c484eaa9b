"""Plain text in UTF-8: a file is a document, or several if it is cut before each match of an expression."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from data_pipeline.formats.base import BadRecord, Document, Piece, ReadOptions


class TextFormat:
    """Also what any file of unknown suffix is taken for. Nothing is changed: line ends stay as they are."""

    name: str = "text"
    suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".py")
    place_name: str = "part"

    def pieces(self, path: Path, piece_bytes: int) -> list[Piece]:
        return [Piece(str(path), self.name, 0, path.stat().st_size)]

    def read(self, piece: Piece, options: ReadOptions) -> Iterator[Document | BadRecord]:
        try:
            text = Path(piece.path).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            yield BadRecord(1, f"not UTF-8 at byte {error.start} ({error.reason})")
            return
        cuts = [0, len(text)]
        if text and options.split_text_at is not None:
            matches = re.finditer(options.split_text_at, text, flags=re.MULTILINE)
            cuts = sorted({0, len(text), *(match.start() for match in matches)})
        for place, (start, stop) in enumerate(pairwise(cuts), start=1):
            yield Document(text[start:stop], place)

    def places_before(self, path: str, starts: Sequence[int]) -> list[int]:
        return [0 for _ in starts]
