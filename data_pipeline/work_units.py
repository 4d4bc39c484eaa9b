"""The parallel part of a build: one unit of input to token files, one range of rows to a shard.

Each function here is a pure function of its task that leaves its result in files, atomically and the record
last, so it may run in any process, in any order, and again after a kill.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.documents import FORMATS, BadRecord, Document, Piece, ReadOptions, name_of, read_piece
from data_pipeline.errors import DataError
from data_pipeline.files import atomic_write, read_json, write_json
from data_pipeline.packing import PackedStream, with_end
from data_pipeline.shard_file import ShardRecord, write_shard
from data_pipeline.shards import SPLITS, row_dtype
from data_pipeline.tokenizer_base import Ids, Tokenizer

_BATCH_CHARACTERS = 1 << 20
_SPLIT_KEY = b"dlm validation split"


@dataclass(frozen=True)
class Unit:
    """Consecutive pieces of the input that one worker tokenises."""

    number: int
    pieces: list[Piece]

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.stop - piece.start for piece in self.pieces)


@dataclass(frozen=True)
class UnitTask:
    """Tokenise `unit` into `scratch`. Documents whose hash is below `threshold` go to validation."""

    unit: Unit
    read_options: ReadOptions
    scratch: str
    threshold: int


@dataclass
class UnitReport:
    """What a unit held. tokens count the ends of text; bad: [piece, place, reason]; hashes of documents."""

    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    empty_documents: int = 0
    bad: list[tuple[int, int, str]] = field(default_factory=list)
    lowest_hash: int | None = None
    highest_hash: int | None = None
    threshold: int = 0


@lru_cache(maxsize=1)
def scratch_tokenizer(scratch: str) -> Tokenizer:
    """The build's tokenizer, loaded once per process."""
    return Tokenizer.load(Path(scratch) / "tokenizer")


def report_path(scratch: str | Path, unit: int) -> Path:
    """The file that says that a unit is done."""
    return Path(scratch) / f"unit-{unit:06d}.json"


def _part_path(scratch: str, unit: int, split: str, what: str) -> Path:
    return Path(scratch) / f"unit-{unit:06d}.{split}.{what}"


def read_report(scratch: str | Path, unit: int) -> UnitReport | None:
    """What a finished unit held, None if it is not finished."""
    path = report_path(scratch, unit)
    return UnitReport(**read_json(path)) if path.is_file() else None


def document_hash(text: str) -> int:
    """A keyed 64-bit hash of a document's text: equal texts always land in the same split."""
    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8, key=_SPLIT_KEY).digest(), "big")


def characters_of(task: UnitTask) -> list[int]:
    """The distinct code points of a unit's documents, ascending."""
    characters: set[str] = set()
    for piece in task.unit.pieces:
        for record in read_piece(piece, task.read_options):
            if isinstance(record, Document):
                characters.update(record.text)
    return sorted(map(ord, characters))


def tokenise_unit(task: UnitTask) -> int:
    """Write the unit's token files and its report; returns the bytes of input that it stands for."""
    tokenizer = scratch_tokenizer(task.scratch)
    dtype = row_dtype(tokenizer.vocab_size)
    report = UnitReport(threshold=task.threshold)
    tokens: dict[str, list[NDArray[np.integer]]] = {split: [] for split in SPLITS}
    byte_counts: dict[str, list[NDArray[np.integer]]] = {split: [] for split in SPLITS}
    for piece, batch in _batches(task, report):
        texts = [document.text for document in batch]
        counts: list[NDArray[np.int64]] = []
        if tokenizer.exact_bytes:
            encoded = tokenizer.encode_batch(texts)
        else:
            encoded, counts = map(list, zip(*tokenizer.encode_with_bytes(texts), strict=True))
        for i, (document, ids) in enumerate(zip(batch, encoded, strict=True)):
            _refuse_reserved(tokenizer, piece, document, ids)
            split = _split_of(document, task.threshold, report)
            tokens[split].append(with_end(ids.astype(dtype), tokenizer.eos_id))
            if counts:
                byte_counts[split].append(with_end(counts[i].astype("<u4"), 0))
    for split in SPLITS:
        report.tokens[split] = _write_part(task, split, "tokens", tokens[split], dtype)
        if not tokenizer.exact_bytes:
            _write_part(task, split, "bytes", byte_counts[split], np.dtype("<u4"))
    write_json(report_path(task.scratch, task.unit.number), asdict(report))
    return task.unit.size


def _batches(task: UnitTask, report: UnitReport) -> Iterator[tuple[Piece, list[Document]]]:
    """The unit's documents in batches of about a million characters; others are noted in `report`."""
    for number, piece in enumerate(task.unit.pieces):
        batch: list[Document] = []
        characters = 0
        for record in read_piece(piece, task.read_options):
            if isinstance(record, BadRecord):
                report.bad.append((number, record.place, record.reason))
            elif not record.text:
                report.empty_documents += 1
            else:
                batch.append(record)
                characters += len(record.text)
                if characters >= _BATCH_CHARACTERS:
                    yield piece, batch
                    batch, characters = [], 0
        if batch:
            yield piece, batch


def _split_of(document: Document, threshold: int, report: UnitReport) -> str:
    value = document_hash(document.text)
    report.lowest_hash = value if report.lowest_hash is None else min(report.lowest_hash, value)
    report.highest_hash = value if report.highest_hash is None else max(report.highest_hash, value)
    split = "validation" if value < threshold else "train"
    report.documents[split] += 1
    return split


def _refuse_reserved(tokenizer: Tokenizer, piece: Piece, document: Document, ids: Ids) -> None:
    if tokenizer.eos_text is not None and tokenizer.eos_text in document.text:
        raise DataError(
            f"{name_of(piece, document.place)} contains the text {tokenizer.eos_text}, which {tokenizer.name} uses "
            "for the end of a document; cut the document there or remove that text"
        )
    for what, reserved in (("mask", tokenizer.mask_id), ("end-of-text", tokenizer.eos_id)):
        if (ids == reserved).any():
            raise DataError(
                f"{name_of(piece, document.place)} contains the {what} id {reserved} of {tokenizer.name}, which no "
                "text may have; remove the text that it stands for"
            )


def _write_part(task: UnitTask, split: str, what: str, parts: list[NDArray[np.integer]], dtype: np.dtype) -> int:
    joined = np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)
    with atomic_write(_part_path(task.scratch, task.unit.number, split, what)) as file:
        file.write(joined.astype(dtype, copy=False).tobytes())
    return len(joined)


def units_of(pieces: list[Piece], unit_bytes: int) -> list[Unit]:
    """Consecutive pieces joined to units of about `unit_bytes`."""
    groups: list[list[Piece]] = []
    size = unit_bytes
    for piece in pieces:
        if size >= unit_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.stop - piece.start
    return [Unit(number, group) for number, group in enumerate(groups)]


def bad_records(units: list[Unit], reports: list[UnitReport]) -> list[dict[str, Any]]:
    """Bad records in input order, places counted from the beginning of each file."""
    bad = [
        (unit.pieces[number], place, reason)
        for unit, report in zip(units, reports, strict=True)
        for number, place, reason in report.bad
    ]
    starts: dict[tuple[str, str], set[int]] = {}
    for piece, _, _ in bad:
        starts.setdefault((piece.path, piece.format), set()).add(piece.start)
    before: dict[tuple[str, int], int] = {}
    for (path, form), wanted in starts.items():
        ordered = sorted(wanted)
        counts = FORMATS[form].places_before(path, ordered)
        before.update({(path, start): count for start, count in zip(ordered, counts, strict=True)})
    return [
        {
            "file": piece.path,
            "place": f"{FORMATS[piece.format].place_name} {before[piece.path, piece.start] + place}",
            "reason": reason,
        }
        for piece, place, reason in bad
    ]


@dataclass(frozen=True)
class ShardTask:
    """Write rows [first_row, stop_row) of a split, whose units have `lengths` tokens, as one shard."""

    scratch: str
    folder: str
    split: str
    number: int
    first_row: int
    stop_row: int
    sequence_length: int
    lengths: list[int]

    @property
    def stem(self) -> str:
        return f"{self.split}-{self.number:06d}"


def read_shard_record(task: ShardTask) -> dict[str, Any] | None:
    """The record of a finished shard, None if it is not finished."""
    path = Path(task.scratch) / f"{task.stem}.json"
    return read_json(path) if path.is_file() else None


def pack_shard(task: ShardTask) -> int:
    """Write the shard and its record {shard, text_bytes}; returns its number of rows."""
    tokenizer = scratch_tokenizer(task.scratch)
    dtype = row_dtype(tokenizer.vocab_size)
    rows = _stream(task, "tokens", dtype).rows(task.first_row, task.stop_row)
    per_id = tokenizer.token_bytes()
    if per_id is None:
        counts = _stream(task, "bytes", np.dtype("<u4")).rows(task.first_row, task.stop_row)
    else:
        counts = per_id.astype(np.uint16)[rows]
    text_bytes = counts.sum(axis=1, dtype=np.int64)
    record: ShardRecord = write_shard(Path(task.folder), task.stem, task.first_row, rows, text_bytes)
    done = {"shard": asdict(record), "text_bytes": int(text_bytes.sum())}
    write_json(Path(task.scratch) / f"{task.stem}.json", done)
    return len(rows)


def _stream(task: ShardTask, what: str, dtype: np.dtype) -> PackedStream:
    def load(unit: int) -> NDArray[np.integer]:
        return np.memmap(_part_path(task.scratch, unit, task.split, what), dtype=dtype, mode="r")

    return PackedStream(task.lengths, load, task.sequence_length)
