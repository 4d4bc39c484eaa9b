"""A data set of ours as token files for others: its documents in order, with the delimiters of the other format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.shards import ShardedSource
from data_pipeline.token_formats import llmc, megatron

FORMATS = (megatron.NAME, llmc.NAME)
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class ExportSummary:
    """files: what was written. tokens: ids in them, one delimiter per document included."""

    files: list[str]
    tokens: int
    documents: int


def export_source(
    source: ShardedSource, form: str, output: str | Path, advance: Callable[[int], None] = lambda rows: None
) -> ExportSummary:
    """Write every document of `source` once, as `form`, to files that begin with `output`; `advance` hears of rows.

    The tokens that fill the last row a second time are left out. Raises DataError for files that exist already, and
    where a row is damaged.
    """
    assert form in FORMATS, form
    prefix = Path(output)
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    for end in (".bin", ".idx", "_000000.bin"):
        if prefix.with_name(prefix.name + end).exists():
            raise DataError(f"{prefix}{end} exists; name another --output or remove it")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    num_tokens = source.num_rows * source.sequence_length - source.index.repeated_tokens
    unended = int(_last_token(source, num_tokens) != source.eos_id)
    documents = _ended(_tokens(source, num_tokens, advance), source.eos_id)
    num_tokens += unended
    if form == megatron.NAME:
        files = megatron.write(prefix, documents, source.vocab_size, source.eos_id)
    else:
        files = llmc.write(prefix, _delayed(documents, source.eos_id), num_tokens, source.vocab_size)
    return ExportSummary([str(file) for file in files], num_tokens, source.index.documents + unended)


def _last_token(source: ShardedSource, num_tokens: int) -> int:
    row, place = divmod(num_tokens - 1, source.sequence_length)
    return int(source.read([row]).tokens[0, place])


def _tokens(source: ShardedSource, num_tokens: int, advance: Callable[[int], None]) -> Iterator[NDArray[np.int64]]:
    """The first `num_tokens` tokens of the rows, in parts."""
    for start in range(0, source.num_rows, _ROWS_AT_ONCE):
        rows = np.arange(start, min(source.num_rows, start + _ROWS_AT_ONCE))
        part = source.read(rows).tokens.reshape(-1)
        advance(len(rows))
        yield part[: num_tokens - start * source.sequence_length]


def _ended(parts: Iterable[NDArray[np.int64]], eos_id: int) -> Iterator[NDArray[np.int64]]:
    """`parts` with an end of text behind the last document if it has none, as rows from memory may."""
    last = eos_id
    for part in parts:
        yield part
        last = int(part[-1]) if len(part) else last
    if last != eos_id:
        yield np.array([eos_id])


def _delayed(parts: Iterable[NDArray[np.int64]], eos_id: int) -> Iterator[NDArray[np.int64]]:
    """The stream behind one `eos_id` and without its last, so that each delimiter stands before its document."""
    before = eos_id
    for part in parts:
        yield np.concatenate([[before], part[:-1]]) if len(part) else part
        before = int(part[-1]) if len(part) else before
