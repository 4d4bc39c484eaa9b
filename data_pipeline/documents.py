"""From input paths to pieces of work, and from pieces to documents; a format is one module and one line here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.formats.base import BadRecord, Document, Format, Piece, ReadOptions
from data_pipeline.formats.jsonl import JsonLinesFormat
from data_pipeline.formats.text import TextFormat

__all__ = ["FORMATS", "BadRecord", "Document", "Piece", "ReadOptions", "find_files", "pieces_of", "read_piece"]

FORMATS: dict[str, Format] = {one.name: one for one in (TextFormat(), JsonLinesFormat())}
AUTO = "auto"


def find_files(paths: Sequence[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Path]:
    """The files meant by `paths`: each file itself, each folder's files in the order of their names.

    include, exclude: globs that a file inside a folder must, or must not, match with its name or with its
    path below that folder; without `include` all match. Links to folders are not followed.
    Raises DataError if a path is missing, unreadable, or a folder in which nothing matches.
    """
    files: list[Path] = []
    for given in paths:
        path = Path(given)
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            inside = [f for f in _walk(path) if _chosen(f.relative_to(path), include, exclude)]
            if not inside:
                chosen = f" that matches {' or '.join(include)}" if include else ""
                raise DataError(f"the input folder {path} holds no file{chosen}")
            files += inside
        else:
            raise DataError(f"the input path {path} does not exist")
    if not files:
        raise DataError("no input was given; name at least one file or folder")
    for file in files:
        if not os.access(file, os.R_OK):
            raise DataError(f"the input file {file} cannot be read: permission denied")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"the input folder {error.filename} cannot be read: {error.strerror}") from error

    found = [Path(parent, name) for parent, _, names in os.walk(folder, onerror=refuse) for name in names]
    return iter(sorted((path for path in found if path.is_file()), key=lambda path: path.parts))


def _chosen(relative: Path, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(globs: Sequence[str]) -> bool:
        return any(fnmatch(relative.name, glob) or fnmatch(relative.as_posix(), glob) for glob in globs)

    return (not include or matches(include)) and not matches(exclude)


def format_of(path: Path, wanted: str) -> Format:
    """The format called `wanted`; for "auto" the one that claims the suffix, else plain text."""
    if wanted != AUTO:
        if wanted not in FORMATS:
            raise DataError(f"'{wanted}' is no input format; known: {AUTO}, {', '.join(FORMATS)}")
        return FORMATS[wanted]
    name = path.name.lower()
    return next((one for one in FORMATS.values() if name.endswith(one.suffixes)), FORMATS["text"])


def pieces_of(files: Sequence[Path], wanted_format: str, piece_bytes: int) -> list[Piece]:
    """The files cut into pieces of about `piece_bytes` or less where the format allows it, in order."""
    return [piece for file in files for piece in format_of(file, wanted_format).pieces(file, piece_bytes)]


def read_piece(piece: Piece, options: ReadOptions) -> Iterator[Document | BadRecord]:
    """Documents and bad records of a piece, in order. Raises DataError naming a file that cannot be read."""
    try:
        yield from FORMATS[piece.format].read(piece, options)
    except OSError as error:
        raise DataError(f"the input file {piece.path} cannot be read: {error.strerror or error}") from error


def name_of(piece: Piece, place: int) -> str:
    """How an error names a document: the file and the line or part."""
    form = FORMATS[piece.format]
    before = form.places_before(piece.path, [piece.start])[0]
    return f"{piece.path}, {form.place_name} {before + place}"
