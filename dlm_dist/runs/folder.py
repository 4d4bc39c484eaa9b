"""Reading what a run left in its folder: configuration, starts, the newest lines of its logs. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dlm_dist import settings

_BLOCK_BYTES = 2**16


def require_run(folder: Path) -> None:
    """ValueError unless `folder` is one of a run that has been started."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; name that of a run (its run.dir)")
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no run: it has no config.yaml, which every start of a run writes")


def has_attempts(folder: Path) -> bool:
    """Whether a chain of jobs has tried to start a run in `folder`, which need not have come to a config.yaml."""
    return (folder / "chain" / "attempts.jsonl").is_file()


def find_runs(paths: Sequence[Path], attempted: bool = False) -> list[Path]:
    """The runs themselves; of a folder that is none, those right below it. Raises ValueError where there is none.

    `attempted`: those too that have attempts of a chain and nothing else.
    """

    def is_run(path: Path) -> bool:
        return (path / "config.yaml").is_file() or (attempted and has_attempts(path))

    found: list[Path] = []
    for path in paths:
        below = [path] if is_run(path) or not path.is_dir() else sorted(filter(is_run, path.iterdir()))
        if not below:
            raise ValueError(f"{path} is no run (no config.yaml), and none of its folders is one")
        found += [run for run in below if run not in found]
    for run in found:
        if not is_run(run):
            require_run(run)
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml of a run, as it was resolved at its last start. Raises ConfigError where it cannot be read."""
    return settings.read(folder / "config.yaml")[0]


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(full key, value) of every leaf, elements of lists of sections counted: `data.train.0.path`."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flat(value, f"{prefix}{key}.")
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for index, item in enumerate(tree):
            yield from flat(item, f"{prefix}{index}.")
    else:
        yield prefix.removesuffix("."), tree


def starts(folder: Path) -> list[dict[str, Any]]:
    """What manifest.json says of every start, oldest first."""
    path = folder / "manifest.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.is_file() else []
    return found


def newest_records(path: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` whole lines of a file of JSON objects, oldest first; reads no more of it than it must."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        position, read = file.seek(0, 2), b""
        while position > 0 and read.count(b"\n") <= count:
            size = min(_BLOCK_BYTES, position)
            position -= size
            file.seek(position)
            read = file.read(size) + read
    # What is behind the last end of a line is being written, or was cut off by a kill.
    lines = read.split(b"\n")[:-1]
    return [json.loads(line) for line in lines[-count:] if line]
