"""A run of eight steps for the cases that are no random kills, and what it must come to."""

from __future__ import annotations

import shutil
from pathlib import Path

from dlm_dist.training import checkpoint_files
from tests.distributed import runs
from tests.faults import starts

STEPS = 8
SAVED = 4
"""Where `prepared` ends."""


def arguments(data: Path, run: Path, **changes: object) -> list[str]:
    """Overrides: a checkpoint every two steps, the last three kept, learning rates that do not know the end."""
    common = {"train__max_steps": STEPS, "zero__stage": 1, "optimizer__name": "adamw8bit"}
    common |= {"checkpoint__every": 2, "checkpoint__keep_last": 3, "optimizer__schedule": "constant"}
    return runs.overrides(data, run, "qwen3", **common | changes)


def left_alone(data: Path, folder: Path, **changes: object) -> Path:
    """The run without any fault."""
    run = folder / "reference"
    statuses, output = starts.to_the_end(arguments(data, run, **changes), None, folder / "reference.log")
    assert statuses == [0], output
    return run


def prepared(data: Path, folder: Path, steps: int = SAVED) -> Path:
    """The run up to `steps`, which a case copies and goes on from."""
    run = folder / "prepared"
    settings = arguments(data, run, train__max_steps=steps)
    statuses, output = starts.to_the_end(settings, None, folder / "prepared.log")
    assert statuses == [0], output
    return run


def assert_same_end(run: Path, reference: Path) -> None:
    """Metrics and last checkpoint are those of the reference, to the bit."""
    runs.assert_same_steps(run, reference)
    mine, other = (one / "checkpoints" / f"step-{STEPS}" for one in (run, reference))
    assert checkpoint_files.verify(mine) == []
    assert checkpoint_files.read_manifest(mine) == checkpoint_files.read_manifest(other)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def copy(run: Path, target: Path) -> Path:
    """A run's folder as it is, without its lease."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns(".lease"))
    return target
