"""JSON lines, plain or compressed with gzip or zstandard: one object a line, the text under one key."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from data_pipeline.errors import DataError
from data_pipeline.formats.base import BadRecord, Document, Piece, ReadOptions

_BLOCK = 1 << 20


class JsonLinesFormat:
    """A plain file is cut into pieces: a piece owns the lines that begin inside it."""

    name: str = "jsonl"
    suffixes: tuple[str, ...] = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst")
    place_name: str = "line"

    def pieces(self, path: Path, piece_bytes: int) -> list[Piece]:
        size = path.stat().st_size
        if path.suffix in (".gz", ".zst"):
            return [Piece(str(path), self.name, 0, size)]
        starts = range(0, max(size, 1), piece_bytes)
        return [Piece(str(path), self.name, start, min(start + piece_bytes, size)) for start in starts]

    def read(self, piece: Piece, options: ReadOptions) -> Iterator[Document | BadRecord]:
        for place, line in enumerate(_lines(piece), start=1):
            if line.strip():
                yield _parse(line, place, options.text_key)

    def places_before(self, path: str, starts: Sequence[int]) -> list[int]:
        counts: list[int] = []
        newlines = position = 0
        with open(path, "rb") as file:
            for start in starts:
                # A piece's first line is the first that begins at or behind its start.
                while position < start - 1:
                    block = file.read(min(_BLOCK, start - 1 - position))
                    newlines += block.count(b"\n")
                    position += len(block)
                counts.append(newlines + 1 if start else 0)
        return counts


def _parse(line: bytes, place: int, key: str) -> Document | BadRecord:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return BadRecord(place, f"not UTF-8 at byte {error.start} of the line ({error.reason})")
    except (json.JSONDecodeError, RecursionError) as error:
        return BadRecord(place, f"not JSON: {error}")
    if not isinstance(value, dict):
        return BadRecord(place, f"not a JSON object but a {type(value).__name__}")
    if key not in value:
        return BadRecord(place, f"no key '{key}', only {', '.join(map(repr, sorted(value)[:8]))}")
    text = value[key]
    if not isinstance(text, str):
        return BadRecord(place, f"the value of '{key}' is not a string but a {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return BadRecord(place, "half a surrogate pair, which UTF-8 cannot write")
    return Document(text, place)


def _lines(piece: Piece) -> Iterator[bytes]:
    try:
        with _open(piece.path) as file:
            if piece.path.endswith((".gz", ".zst")):
                yield from file
                return
            if piece.start > 0:
                file.seek(piece.start - 1)
                file.readline()
            while file.tell() < piece.stop:
                yield file.readline()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{piece.path} is truncated or damaged: {error}") from error


def _open(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstandardReader(path), _BLOCK)
    return open(path, "rb")


class _ZstandardReader(io.RawIOBase):
    """All frames of a .zst file. zstandard's own reader takes a truncated last frame for the end."""

    def __init__(self, path: str) -> None:
        import zstandard

        self._errors = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._file = open(path, "rb")  # noqa: SIM115 - closed in close()
        self._frame = self._decompressor.decompressobj()
        self._inside_frame = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            block = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
                self._inside_frame = False
            block = block or self._file.read(_BLOCK)
            if not block:
                if self._inside_frame:
                    raise EOFError("the last frame has no end")
                return 0
            self._inside_frame = True
            try:
                self._ready = self._frame.decompress(block)
            except self._errors as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
