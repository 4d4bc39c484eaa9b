"""`dlm checkpoint list | verify`: what a run has saved, and whether it is whole. Needs no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint_diff_command import add_diff_command
from launcher.checkpoint_model_commands import add_model_commands

# Reading as much as this takes seconds: worth a progress bar.
_LARGE_BYTES = 2**30
_STATUS_DAMAGED = 1


@dataclass(frozen=True)
class Entry:
    """One folder step-N; what is not known of it is None, and `problem` says why."""

    path: str
    step: int | None = None
    time: str | None = None
    """When it was published, ISO 8601, local time."""
    bytes: int | None = None
    epoch: int | None = None
    data_pos: int | None = None
    world_size: int | None = None
    zero_stage: int | None = None
    precision: str | None = None
    optimizer: str | None = None
    problem: str | None = None


def add_checkpoint_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm checkpoint` with its sub-commands."""
    checkpoint = subparsers.add_parser("checkpoint", help="list, verify, compare, export and average checkpoints")
    commands = checkpoint.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = commands.add_parser(
        "list",
        help="show what a run has saved",
        description="Show the checkpoints of a run, oldest first; a file that is missing or has another size is told. "
        "`dlm checkpoint verify` reads every byte.",
    )
    listing.add_argument("path", metavar="RUN", type=Path, help="folder of a run, or its checkpoints/")
    listing.set_defaults(run=run_list)
    verify = commands.add_parser(
        "verify",
        help="read checkpoints from end to end and check every byte",
        description="Compare size and SHA-256 of every file with the manifest. The exit status is 1 when a "
        "checkpoint is damaged.",
    )
    verify.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="a checkpoint, or a run for all of its own")
    verify.set_defaults(run=run_verify)
    for command in (listing, verify):
        command.add_argument("--json", action="store_true", help="print one JSON object")
    add_diff_command(commands)
    add_model_commands(commands)


def run_list(arguments: argparse.Namespace) -> int:
    """Print a table. Returns 0, also for a run that has saved nothing yet."""
    entries = [_describe(path) for path in _checkpoints(arguments.path)]
    if arguments.json:
        print(json.dumps({"checkpoints": [asdict(entry) for entry in entries]}))
    elif not entries:
        print(f"{arguments.path} has no checkpoints")
    else:
        print("\n".join(_table(entries)))
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Print a line per checkpoint. Returns 0 if all are whole, 1 if one is not."""
    from data_pipeline.progress import progress
    from dlm_dist.training.checkpoint_files import CheckpointError, read_manifest, verify

    reports: list[dict[str, Any]] = []
    for path in _named(arguments.paths):
        try:
            files = read_manifest(path)
        except CheckpointError as error:
            report: dict[str, Any] = {"path": str(path), "files": None, "bytes": None, "problems": [str(error)]}
        else:
            size = sum(entry["size"] for entry in files.values())
            with progress(str(path), size, "B") if size >= _LARGE_BYTES else nullcontext() as advance:
                problems = verify(path, advance=advance)
            report = {"path": str(path), "files": len(files), "bytes": size, "problems": problems}
        reports.append(report)
        if not arguments.json:
            print(_verdict(report), flush=True)
    if arguments.json:
        print(json.dumps({"checkpoints": reports}))
    return _STATUS_DAMAGED if any(report["problems"] for report in reports) else 0


def _verdict(report: dict[str, Any]) -> str:
    if report["problems"]:
        return f"{report['path']}: damaged: {'; '.join(report['problems'])}"
    return f"{report['path']}: whole, {report['files']} files, {_size(report['bytes'])}"


def _named(paths: list[Path]) -> Iterator[Path]:
    """The checkpoints that the paths stand for. Raises ValueError for a run without any: nothing was verified."""
    for path in paths:
        found = _checkpoints(path)
        if not found:
            raise ValueError(f"{path} has no checkpoints: nothing to verify")
        yield from found


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoint that `path` is, or all folders step-N of the run or checkpoints/ folder that it is.

    Raises ValueError where it is none of these.
    """
    from dlm_dist.training.checkpoint_files import TRAINER_STATE, step_folders, step_of

    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder; name a run or a checkpoint (RUN/checkpoints/step-N)")
    # By its resolved name, so that `.` inside a checkpoint is one too; by its contents, where it was renamed.
    if step_of(path.resolve()) is not None or (path / TRAINER_STATE).is_file():
        return [path]
    if (path / "checkpoints").is_dir():
        return step_folders(path / "checkpoints")
    found = step_folders(path)
    if not found and path.resolve().name != "checkpoints" and not (path / "config.yaml").is_file():
        raise ValueError(f"{path} is neither a run nor a checkpoint: expected checkpoints/, step-N/ or {TRAINER_STATE}")
    return found


def _describe(path: Path) -> Entry:
    from datetime import datetime

    from dlm_dist.training.checkpoint_files import MANIFEST, load_trainer_state, read_manifest, step_of, verify

    step = step_of(path.resolve())
    if not (path / MANIFEST).is_file():
        return Entry(str(path), step, problem="no manifest: not a checkpoint (its deletion or copy was cut short)")
    if problems := verify(path, hashes=False):
        return Entry(str(path), step, problem=f"damaged: {problems[0]}")
    try:
        size = sum(entry["size"] for entry in read_manifest(path).values())
        state = load_trainer_state(path)
        topology = state["topology"]
        return Entry(
            path=str(path),
            step=state["global_step"],
            time=datetime.fromtimestamp((path / MANIFEST).stat().st_mtime).astimezone().isoformat(timespec="seconds"),
            bytes=size,
            epoch=state["epoch"],
            data_pos=state["data_pos"],
            world_size=topology["world_size"],
            zero_stage=topology["zero_stage"],
            precision=topology["precision"],
            optimizer=state["optimizer"],
        )
    except (ValueError, OSError, KeyError, TypeError) as error:
        return Entry(str(path), step, problem=f"damaged: {error}")


_COLUMNS = ("step", "date", "size", "epoch", "data_pos", "ranks", "ZeRO", "precision", "optimizer")


def _table(entries: list[Entry]) -> Iterator[str]:
    rows = [_COLUMNS, *(_cells(entry) for entry in entries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    for row, problem in zip(rows, (None, *(entry.problem for entry in entries)), strict=True):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join([*cells[:1], problem] if problem is not None else cells)


def _cells(entry: Entry) -> tuple[str, ...]:
    step = "?" if entry.step is None else str(entry.step)
    if entry.problem is not None:
        return (step, *[""] * (len(_COLUMNS) - 1))
    assert entry.time is not None
    assert entry.bytes is not None
    known = (entry.epoch, entry.data_pos, entry.world_size, entry.zero_stage, entry.precision, entry.optimizer)
    return (step, entry.time[:16].replace("T", " "), _size(entry.bytes), *map(str, known))


def _size(count: int) -> str:
    """Bytes in the largest decimal unit that leaves a number above 1."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
