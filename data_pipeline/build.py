"""`build_dataset`: input files to a finished data set, restartable at any moment, the same bytes every time.

Two stages, both cut into independent tasks that may run in worker processes: units of input become token
files in OUTPUT/.build, then ranges of rows become shards. A task leaves a record when it is done, so a build
that was killed goes on with the tasks that have none. index.json and build.json come last; a finished build
with the same options is recognised, one with other options is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline import tokenizers
from data_pipeline.documents import AUTO, FORMATS, ReadOptions, find_files, pieces_of
from data_pipeline.errors import DataError
from data_pipeline.files import atomic_write, read_json, remove_temporaries, write_json
from data_pipeline.packing import PackedStream
from data_pipeline.parallel import Workers
from data_pipeline.shard_file import ShardRecord
from data_pipeline.shards import SPLITS, TOKENIZER_FOLDER, SourceIndex, row_dtype
from data_pipeline.tokenizer_backends.characters import CharacterTokenizer
from data_pipeline.tokenizer_base import DESCRIPTION_FILE, Tokenizer
from data_pipeline.work_units import (
    ShardTask,
    Unit,
    UnitReport,
    UnitTask,
    bad_records,
    characters_of,
    pack_shard,
    read_report,
    read_shard_record,
    report_path,
    scratch_tokenizer,
    tokenise_unit,
    units_of,
)

SCRATCH_FOLDER = ".build"
PLAN_FILE = "plan.json"
BUILD_FILE = "build.json"
QUARANTINE_FILE = "quarantine.jsonl"
_HASH_RANGE = 1 << 64
_SHARD_BYTES = 128 * 2**20


@dataclass(frozen=True)
class BuildOptions:
    """What to build. All but `output` and `workers` decide the result and must not change on a restart.

    inputs: files and folders. format: "auto" (by suffix, else text) or a key of `documents.FORMATS`.
    text_key, split_text_at: see `ReadOptions`. include, exclude: see `documents.find_files`.
    tokenizer: see `tokenizers.load`, or "characters". sequence_length: tokens per row.
    validation_fraction: expected share of the documents that goes to the split `validation`, at least one.
    workers: processes. rows_per_shard: None for shards of about 128 MiB of tokens.
    unit_bytes: input per unit of work.
    """

    inputs: tuple[str, ...]
    output: str
    tokenizer: str
    sequence_length: int
    format: str = AUTO
    text_key: str = "text"
    split_text_at: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    validation_fraction: float = 0.0
    workers: int = 1
    rows_per_shard: int | None = None
    unit_bytes: int = 32 * 2**20


@dataclass(frozen=True)
class SplitSummary:
    """Counts of a split; tokens count every token once, rows hold `repeated_tokens` more."""

    rows: int
    documents: int
    tokens: int
    repeated_tokens: int
    text_bytes: int
    shards: int
    fingerprint: str


@dataclass(frozen=True)
class BuildSummary:
    """The result of a build. quarantine: the file that lists the bad records, None if there are none."""

    output: str
    splits: dict[str, SplitSummary]
    bad_records: int
    empty_documents: int
    input_bytes: int
    quarantine: str | None
    already_built: bool = False


def build_dataset(options: BuildOptions) -> BuildSummary:
    """Build, or finish, the data set `options` describe. Raises DataError with what is wrong and where."""
    _check(options)
    files = find_files(options.inputs, options.include, options.exclude)
    _refuse_output_in_input(options)
    tokenizer = None if options.tokenizer == "characters" else tokenizers.load(options.tokenizer)
    plan = _plan(options, files, tokenizer)
    output = Path(options.output)
    finished = output / BUILD_FILE
    if finished.is_file():
        built = read_json(finished)
        _refuse_other_plan(built["plan"], plan, f"{output} holds a finished build with other options")
        _remove_scratch(output / SCRATCH_FOLDER)
        return _summary(output, built["summary"], already_built=True)
    scratch = output / SCRATCH_FOLDER
    if output.exists() and any(output.iterdir()) and not scratch.is_dir():
        raise DataError(f"{output} is not empty and holds no build; name a new folder or empty this one")
    scratch.mkdir(parents=True, exist_ok=True)
    with _lock(scratch):
        remove_temporaries(output)
        if (scratch / PLAN_FILE).is_file():
            what = f"{output} holds an unfinished build with other options"
            _refuse_other_plan(read_json(scratch / PLAN_FILE), plan, what)
        else:
            write_json(scratch / PLAN_FILE, plan)
        with Workers(options.workers) as workers:
            summary = _build(options, files, tokenizer, output, workers)
        write_json(finished, {"plan": plan, "summary": summary})
        _remove_scratch(scratch)
    return _summary(output, summary, already_built=False)


def _build(
    options: BuildOptions, files: list[Path], tokenizer: Tokenizer | None, output: Path, workers: Workers
) -> dict[str, Any]:
    scratch = output / SCRATCH_FOLDER
    units = units_of(pieces_of(files, options.format, options.unit_bytes), options.unit_bytes)
    tasks = [_unit_task(unit, options, scratch) for unit in units]
    if not (scratch / TOKENIZER_FOLDER / DESCRIPTION_FILE).is_file():
        if tokenizer is None:
            found = workers.run(characters_of, tasks, "learning characters", [unit.size for unit in units], "B")
            tokenizer = CharacterTokenizer(sorted(set().union(*found)))
        tokenizer.save(scratch / TOKENIZER_FOLDER)
    scratch_tokenizer.cache_clear()  # This process may have built another data set in this folder.
    reports = _tokenise(tasks, options, workers)
    bad = bad_records(units, reports)
    if bad:
        with atomic_write(output / QUARANTINE_FILE) as file:
            file.writelines(json.dumps(record).encode() + b"\n" for record in bad)
    if not any(sum(report.documents.values()) for report in reports):
        first = f"; the first: {bad[0]['file']}, {bad[0]['place']}: {bad[0]['reason']}" if bad else ""
        empty = sum(report.empty_documents for report in reports)
        raise DataError(
            f"the input holds no document: {len(files)} files, {empty} empty documents, {len(bad)} bad records{first}"
        )
    splits = SPLITS if options.validation_fraction > 0 else SPLITS[:1]
    return {
        "splits": {split: _pack_split(split, reports, options, output, workers) for split in splits},
        "bad_records": len(bad),
        "empty_documents": sum(report.empty_documents for report in reports),
        "input_bytes": sum(unit.size for unit in units),
    }


def _tokenise(tasks: list[UnitTask], options: BuildOptions, workers: Workers) -> list[UnitReport]:
    """Tokenise all units that are not done, then move a document if a split would be empty."""
    scratch = tasks[0].scratch
    left = [task for task in tasks if read_report(scratch, task.unit.number) is None]
    sizes = [task.unit.size for task in left]
    workers.run(tokenise_unit, left, "tokenising", sizes, "B")
    reports = [_report(scratch, task) for task in tasks]
    if options.validation_fraction == 0:
        return reports
    lowest = min((r.lowest_hash for r in reports if r.lowest_hash is not None), default=None)
    highest = max((r.highest_hash for r in reports if r.highest_hash is not None), default=None)
    if lowest is None or highest is None:
        return reports
    if lowest == highest:
        raise DataError(
            "the input holds one document (or copies of one), and a validation split needs at least two "
            "different ones; cut text files with --split-text-at or leave --validation-fraction out"
        )
    # The documents with the lowest hash are always in validation, those with the highest always in train.
    threshold = min(max(_threshold(options.validation_fraction), lowest + 1), highest)
    for i, (task, report) in enumerate(zip(tasks, reports, strict=True)):
        moved = report.threshold != threshold and {lowest, highest} & {report.lowest_hash, report.highest_hash}
        if moved:
            again = UnitTask(task.unit, task.read_options, scratch, threshold)
            report_path(scratch, task.unit.number).unlink()
            tokenise_unit(again)
            reports[i] = _report(scratch, again)
    return reports


def _report(scratch: str, task: UnitTask) -> UnitReport:
    report = read_report(scratch, task.unit.number)
    assert report is not None
    return report


def _pack_split(
    split: str, reports: list[UnitReport], options: BuildOptions, output: Path, workers: Workers
) -> dict[str, Any]:
    """Write the split's shards that are not done, its tokenizer and its index; returns its summary."""
    scratch, folder = output / SCRATCH_FOLDER, output / split
    folder.mkdir(exist_ok=True)
    lengths = [report.tokens[split] for report in reports]
    tokenizer = scratch_tokenizer(str(scratch))
    length, dtype = options.sequence_length, row_dtype(tokenizer.vocab_size)
    per_shard = options.rows_per_shard or max(1, _SHARD_BYTES // (length * dtype.itemsize))
    stream = PackedStream(lengths, _not_loaded, length)
    tasks = [
        ShardTask(
            scratch=str(scratch),
            folder=str(folder),
            split=split,
            number=number,
            first_row=first,
            stop_row=min(first + per_shard, stream.num_rows),
            sequence_length=length,
            lengths=lengths,
        )
        for number, first in enumerate(range(0, stream.num_rows, per_shard))
    ]
    left = [task for task in tasks if read_shard_record(task) is None]
    sizes = [task.stop_row - task.first_row for task in left]
    workers.run(pack_shard, left, f"writing {split}", sizes, "rows")
    records = [record for task in tasks if (record := read_shard_record(task)) is not None]
    tokenizer.save(folder / TOKENIZER_FOLDER)
    index = SourceIndex(
        split=split,
        sequence_length=length,
        dtype=dtype.str,
        num_rows=stream.num_rows,
        documents=sum(report.documents[split] for report in reports),
        text_bytes=sum(record["text_bytes"] for record in records),
        repeated_tokens=stream.repeated_tokens,
        tokenizer=tokenizer.describe() | {"fingerprint": tokenizer.fingerprint},
        shards=[ShardRecord(**record["shard"]) for record in records],
    )
    index.write(folder)
    return asdict(
        SplitSummary(
            rows=index.num_rows,
            documents=index.documents,
            tokens=stream.num_tokens,
            repeated_tokens=index.repeated_tokens,
            text_bytes=index.text_bytes,
            shards=len(records),
            fingerprint=index.computed_fingerprint(),
        )
    )


def _not_loaded(part: int) -> Any:
    raise AssertionError(f"only lengths are asked for, not part {part}")


def _check(options: BuildOptions) -> None:
    if options.sequence_length < 2:
        raise DataError(f"the sequence length is {options.sequence_length}; a row needs at least 2 tokens")
    if not 0 <= options.validation_fraction < 1:
        raise DataError(f"the validation fraction is {options.validation_fraction}; give a number from 0 to below 1")
    if options.workers < 1:
        raise DataError(f"{options.workers} workers cannot build anything; give at least 1")
    if options.split_text_at is not None:
        try:
            re.compile(options.split_text_at)
        except re.error as error:
            raise DataError(f"'{options.split_text_at}' is no regular expression to split at: {error}") from error
    if options.rows_per_shard is not None and options.rows_per_shard < 1:
        raise DataError(f"{options.rows_per_shard} rows per shard are too few; give at least 1")
    if options.format != AUTO and options.format not in FORMATS:
        raise DataError(f"'{options.format}' is no input format; known: {AUTO}, {', '.join(FORMATS)}")


def _refuse_output_in_input(options: BuildOptions) -> None:
    output = Path(options.output).resolve()
    for given in options.inputs:
        if Path(given).is_dir() and output.is_relative_to(Path(given).resolve()):
            raise DataError(f"the output {output} lies inside the input folder {given}; put it elsewhere")


def _plan(options: BuildOptions, files: list[Path], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """All that decides the result; compared on a restart. Input files are known by size and time."""
    plan: dict[str, Any] = json.loads(json.dumps(asdict(options)))
    for place in ("output", "workers", "inputs", "tokenizer"):
        del plan[place]
    plan["tokenizer"] = "characters" if tokenizer is None else f"{tokenizer.name} {tokenizer.fingerprint}"
    plan["files"] = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return plan


def _refuse_other_plan(there: dict[str, Any], asked: dict[str, Any], what: str) -> None:
    differing = [key for key in sorted(there.keys() | asked.keys()) if there.get(key) != asked.get(key)]
    if not differing:
        return
    said = "; ".join(
        "the input files (other names, sizes or times)"
        if key == "files"
        else f"{key} is {there.get(key)} there, {asked.get(key)} now"
        for key in differing
    )
    raise DataError(f"{what}: {said}; give the same options, another --output, or remove that folder")


def _remove_scratch(scratch: Path) -> None:
    # Another process may be at it too; what stays is harmless and goes at the next start.
    shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _lock(scratch: Path) -> Iterator[None]:
    """One build per folder; the kernel frees the lock of a killed process."""
    with open(scratch / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another build is writing to {scratch.parent}; wait for it or stop it") from error
        yield


def _threshold(fraction: float) -> int:
    return int(fraction * _HASH_RANGE)


def _unit_task(unit: Unit, options: BuildOptions, scratch: Path) -> UnitTask:
    read_options = ReadOptions(text_key=options.text_key, split_text_at=options.split_text_at)
    return UnitTask(unit, read_options, str(scratch), _threshold(options.validation_fraction))


def _summary(output: Path, content: dict[str, Any], already_built: bool) -> BuildSummary:
    fields = content | {"splits": {name: SplitSummary(**split) for name, split in content["splits"].items()}}
    quarantine = os.path.join(output, QUARANTINE_FILE) if content["bad_records"] else None
    return BuildSummary(output=str(output), quarantine=quarantine, already_built=already_built, **fields)
