"""The token files of llm.c, which nanoGPT speed runs also use: .bin files, often many of one data set.

1,024 bytes of header, 256 little-endian int32: magic, version, number of ids, zeros. Magic 20240520, version 1: uint16
ids (GPT-2). Magic 20240801, version 7: uint32 ids (Llama 3). Then the ids. Each document has its delimiter before it:
the end of text of GPT-2, 50256; files of Llama 3 have its begin of text there.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.files import atomic_write
from data_pipeline.token_files import TokenFile, TokenFiles
from data_pipeline.tokenizer_base import Tokenizer

NAME = "llmc"
_HEADER_INTEGERS = 256
_HEADER_BYTES = 4 * _HEADER_INTEGERS
# magic -> version and type of the ids
_TOKENS: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
_CHECKPOINT_MAGIC = 20240326
_MAX_TOKENS = 2**31 - 1
_HELD_OUT = re.compile(r"(^|[_.-])(val|valid|validation|test)([_.-]|$)")


def begins_alike(path: Path) -> bool:
    """Whether the file `path` begins like one of llm.c, of tokens or of a model."""
    head = _head(path, 1)
    return len(head) == 1 and int(head[0]) in (*_TOKENS, _CHECKPOINT_MAGIC)


def find(path: Path) -> list[Path]:
    """The files that `path` names, in the order of their names: one file (with or without its .bin), the .bin files
    of a folder, or those that match a pattern.

    Empty where there is none. Raises DataError for a folder that mixes training and held-out files, or files of llm.c
    and others, and for a pattern that nothing matches.
    """
    if path.is_file():
        return [path] if begins_alike(path) else []
    if path.is_dir():
        found = sorted(path.glob("*.bin"))
        ours = [begins_alike(file) for file in found]
        if not any(ours):
            return []
        if not all(ours):
            other = found[ours.index(False)].name
            raise DataError(
                f"{path} holds files of llm.c and {other}, which is none or is damaged: restore or remove it, or name "
                f"those that you mean with a pattern"
            )
        held_out = [file for file in found if _HELD_OUT.search(file.stem)]
        if held_out and len(held_out) < len(found):
            raise DataError(
                f"{path} holds both training files and held-out ones ({held_out[0].name}): name those that you mean "
                f"with a pattern, such as {path}/*train*.bin"
            )
        return found
    if path.with_name(f"{path.name}.bin").is_file():
        return find(path.with_name(f"{path.name}.bin"))
    if not glob.has_magic(str(path)):
        return []
    matching = [Path(name) for name in sorted(glob.glob(str(path)))]
    if not matching:
        raise DataError(f"no file matches {path}; check the pattern")
    return matching


def open_files(paths: Sequence[Path], tokenizer: Tokenizer) -> TokenFiles:
    """The ids of all files. Raises DataError for a file that is no token file, or not whole."""
    files = tuple(_read_header(path) for path in paths)
    return TokenFiles(NAME, files, _delimiter(files[0], tokenizer), delimiter_starts_document=True)


def _head(path: Path, count: int) -> NDArray[np.int32]:
    try:
        return np.fromfile(path, dtype="<i4", count=count)
    except OSError as error:
        raise DataError(f"the token file {path} cannot be read: {error.strerror}") from error


def _read_header(path: Path) -> TokenFile:
    head = _head(path, _HEADER_INTEGERS)
    if len(head) < _HEADER_INTEGERS:
        raise DataError(f"{path} is no token file of llm.c: it is shorter than the header of 1024 bytes; restore it")
    magic, version, tokens = head[:3].tolist()
    if magic == _CHECKPOINT_MAGIC or (magic in _TOKENS and version != _TOKENS[magic][0]):
        raise DataError(
            f"{path} is a file of llm.c with magic {magic} and version {version}, a model or a newer format: token "
            f"files have {' or '.join(f'magic {m} with version {v}' for m, (v, _) in _TOKENS.items())}"
        )
    if magic not in _TOKENS:
        raise DataError(
            f"{path} is no token file of llm.c: it begins with {magic} instead of {' or '.join(map(str, _TOKENS))}; "
            "leave it out, or build a data set from its text with `dlm data build`"
        )
    dtype = _TOKENS[magic][1]
    size, expected = path.stat().st_size, _HEADER_BYTES + tokens * dtype.itemsize
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes, its header describes {expected} ({tokens} tokens): it is "
            f"{'truncated' if size < expected else 'damaged'}; fetch or write it again"
        )
    return TokenFile(path, _HEADER_BYTES, dtype, tokens)


def _delimiter(first: TokenFile, tokenizer: Tokenizer) -> int | None:
    """What the first document begins with, if that is an id without text; None for the tokenizer's end of text."""
    per_id = tokenizer.token_bytes()
    ids = np.fromfile(first.path, dtype=first.dtype, count=1, offset=first.offset)
    if per_id is None or not len(ids) or ids[0] >= len(per_id) or per_id[ids[0]]:
        return None
    return int(ids[0])


def write(prefix: Path, parts: Iterable[NDArray[np.integer]], total: int, vocab_size: int) -> list[Path]:
    """Write PREFIX.bin, or PREFIX_000000.bin and so on where `total` ids are too many for one; returns the files.

    `parts` joined are the documents with the delimiter before each.
    """
    magic = 20240520 if vocab_size <= 65536 else 20240801
    version, dtype = _TOKENS[magic]
    counts = [min(_MAX_TOKENS, total - start) for start in range(0, total, _MAX_TOKENS)]
    names = [f"{prefix.name}.bin"] if len(counts) == 1 else [f"{prefix.name}_{i:06d}.bin" for i in range(len(counts))]
    pieces = _cut(parts, counts)
    for name, count in zip(names, counts, strict=True):
        header = np.zeros(_HEADER_INTEGERS, dtype="<i4")
        header[:3] = magic, version, count
        with atomic_write(prefix.with_name(name)) as file:
            file.write(header.tobytes())
            for piece in next(pieces):
                file.write(piece.astype(dtype).tobytes())
    return [prefix.with_name(name) for name in names]


def _cut(parts: Iterable[NDArray[np.integer]], counts: Sequence[int]) -> Iterator[Iterator[NDArray[np.integer]]]:
    """The concatenation of `parts` cut into pieces of `counts` ids, each as an iterator to be used up in turn."""
    source = iter(parts)
    left: list[NDArray[np.integer]] = []

    def piece(count: int) -> Iterator[NDArray[np.integer]]:
        while count:
            part = left.pop() if left else next(source)
            if len(part) > count:
                left.append(part[count:])
            yield part[:count]
            count -= min(count, len(part))

    for count in counts:
        yield piece(count)
