"""Megatron's indexed data sets, PREFIX.bin and PREFIX.idx, as Megatron-LM, GPT-NeoX and RWKV-LM write them.

PREFIX.bin is nothing but ids. PREFIX.idx, all little-endian: magic "MMIDIDX\\0\\0", u64 version 1, u8 code of the ids'
type, u64 sequences, u64 document indices; i32 [sequences] lengths in ids, i64 [sequences] byte offsets, i64 [document
indices] number of the first sequence of each document, from 0 on, and behind the last one; i8 [sequences] modes only
where the data is multimodal. Documents end with the end-of-text id, as `--append-eod` and RWKV's tools have it. Rows
need the ids alone, so of the index only the type and the total are used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.files import atomic_write
from data_pipeline.token_files import TokenFile, TokenFiles

NAME = "megatron"
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_INTEGERS = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = (6, 7)  # float64 and float32 in Megatron-LM, the other way round in GPT-NeoX


def find(path: Path) -> tuple[Path, Path] | None:
    """The .bin and .idx that `path` names, itself one of them or what both begin with; None if neither is there.

    A .bin without an .idx may be of another format and counts as nothing. Raises DataError for an .idx alone.
    """
    if path.is_dir():
        return None
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    tokens, index = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
    if not index.is_file():
        return None
    if not tokens.is_file():
        raise DataError(f"{index} is there without {tokens}, which holds the tokens; put both into one folder")
    return tokens, index


def open_files(tokens: Path, index: Path) -> TokenFiles:
    """The ids of a pair. Raises DataError if the index is none, is damaged or belongs to another .bin."""
    dtype, expected = _read_index(index)
    size = tokens.stat().st_size
    if size != expected:
        what = "is truncated, or " if size < expected else ""
        raise DataError(
            f"{tokens} has {size} bytes, and {index.name} describes {expected}: it {what}belongs to another index; "
            "restore the two files that were written together"
        )
    return TokenFiles(NAME, (TokenFile(tokens, 0, dtype, size // dtype.itemsize),))


def _read_index(path: Path) -> tuple[np.dtype, int]:
    """The type of the ids and the bytes of all of them."""
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
        if not head.startswith(_MAGIC):
            raise DataError(f"{path} is no Megatron index: it does not begin with MMIDIDX; restore it")
        if len(head) < _HEADER.size:
            raise DataError(f"{path} is truncated: its header is not complete; restore it")
        _, version, code, sequences, documents = _HEADER.unpack(head)
        if version != _VERSION:
            raise DataError(f"{path} is a Megatron index of version {version}, and only version 1 is known")
        if code not in _INTEGERS:
            kind = "floating-point numbers, not ids" if code in _FLOATS else "an unknown type"
            raise DataError(f"{path} says that its .bin holds {kind} (type code {code}); give token data")
        sizes = [_HEADER.size + sequences * (12 + modes) + documents * 8 for modes in (0, 1)]
        size = path.stat().st_size
        if size not in sizes:
            raise DataError(f"{path} has {size} bytes, its header describes {sizes[0]}: it is damaged; restore it")
        if sequences == 0:
            raise DataError(f"{path} describes a data set without any sequence; build it again")
        # The last sequence gives the total: a sum over all of them would read gigabytes of a large index.
        file.seek(_HEADER.size + 4 * (sequences - 1))
        (length,) = struct.unpack("<i", file.read(4))
        file.seek(_HEADER.size + 4 * sequences + 8 * (sequences - 1))
        (offset,) = struct.unpack("<q", file.read(8))
    dtype = np.dtype(_INTEGERS[code])
    return dtype, offset + length * dtype.itemsize


def write(prefix: Path, parts: Iterable[NDArray[np.integer]], vocab_size: int, eos_id: int) -> list[Path]:
    """Write PREFIX.bin and, last, PREFIX.idx; `parts` joined are documents with `eos_id` behind each.

    uint16 where the vocabulary fits it, else int32. Returns the files.
    """
    code = 8 if vocab_size <= 65536 else 4
    dtype = np.dtype(_INTEGERS[code])
    ends: list[NDArray[np.int64]] = []
    total = 0
    tokens, index = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
    with atomic_write(tokens) as file:
        for part in parts:
            ends.append(np.flatnonzero(part == eos_id) + total + 1)
            total += len(part)
            file.write(part.astype(dtype).tobytes())
    stops = np.concatenate(ends)
    assert stops[-1] == total, "the last document has an end"
    starts = np.concatenate([np.zeros(1, dtype=np.int64), stops[:-1]])
    with atomic_write(index) as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, code, len(stops), len(stops) + 1))
        file.write((stops - starts).astype("<i4").tobytes())
        file.write((starts * dtype.itemsize).astype("<i8").tobytes())
        file.write(np.arange(len(stops) + 1, dtype="<i8").tobytes())
    return [tokens, index]
