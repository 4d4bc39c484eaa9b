"""Sweeps: a grid file names a configuration and the values to try; each combination is a run of its own.

    config: configs/my.yaml
    dir: runs/sweep-lr                  # each run is in a folder here that is named by its values
    overrides: [train.max_steps=2000]   # for all of them
    grid:
      optimizer.lr: [3e-4, 6e-4, 1.2e-3]
      run.seed: [0, 1, 2]

The last key varies fastest. Which run has which number follows from the file alone, so tasks of a job array agree.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from dlm_dist import settings
from dlm_dist.config import RunConfig, load_config
from dlm_dist.config_types import Location
from dlm_dist.settings import ConfigError, Mistake, Section, about


class SweepFile(Section):
    """What a grid file holds."""

    config: Location = Field(description="YAML file of the runs; relative paths start where the command is run")
    dir: Location = Field(description="folder in which each run has a folder of its own")
    overrides: tuple[str, ...] = Field(default=(), description="key.sub=value for all runs")
    grid: dict[str, Any] = Field(description="full configuration keys, each with the list of values to try")

    @classmethod
    def contradictions_across(cls, parts: Mapping[str, Any]) -> Iterator[Mistake]:
        if any("\n" in override for override in parts.get("overrides", ())):
            yield Mistake("overrides", "overrides holds the end of a line: expected key.sub=value on one line each")
        if parts.get("grid") == {}:
            yield Mistake("grid", "grid is empty: expected full keys, each with a list of values")
        for key, values in parts.get("grid", {}).items():
            if key == "run.dir":
                yield Mistake("grid", "grid has run.dir: remove it, each run has a folder of its own in dir")
            elif not isinstance(values, list) or not values:
                yield about(f"grid: {key}", values, "expected a list of values, [a, b]")
            elif len({json.dumps(value) for value in values}) < len(values):
                yield about(f"grid: {key}", values, "expected each value once")


@dataclass(frozen=True)
class SweepRun:
    """One combination."""

    index: int
    values: dict[str, Any]
    """By full key."""
    folder: Path
    overrides: tuple[str, ...]
    """All that the run needs besides the configuration file, run.dir with it."""


@dataclass(frozen=True)
class Sweep:
    """The runs of a grid file."""

    path: Path
    config: Path
    runs: tuple[SweepRun, ...]

    def run(self, index: int) -> SweepRun:
        """ValueError where there is no such run."""
        if not 0 <= index < len(self.runs):
            raise ValueError(
                f"{self.path} has {len(self.runs)} runs, 0 to {len(self.runs) - 1}, and no {index}: submit it with "
                f"--array=0-{len(self.runs) - 1}"
            )
        return self.runs[index]

    def load(self, run: SweepRun) -> RunConfig:
        """Its configuration, checked. Raises ConfigError that names the run."""
        try:
            return load_config(self.config, run.overrides)
        except ConfigError as error:
            origin = f"run {run.index} of {self.path} ({self.config}, {run.folder.name})"
            raise ConfigError(error.mistakes, origin) from None


def read_sweep(path: Path) -> Sweep:
    """The runs that the file describes, not yet checked one by one. Raises ConfigError about the file itself."""
    tree, twice = settings.read(path)
    file = settings.validate(SweepFile, tree, twice, str(path))
    keys = list(file.grid)
    shown = _short_names(keys)
    runs = []
    for index, values in enumerate(itertools.product(*file.grid.values())):
        name = ",".join(f"{shown[key]}={_in_a_name(value)}" for key, value in zip(keys, values, strict=True))
        own = [f"{key}={json.dumps(value)}" for key, value in zip(keys, values, strict=True)]
        folder = file.dir / name
        overrides = (*file.overrides, *own, f"run.dir={json.dumps(str(folder))}")
        runs.append(SweepRun(index, dict(zip(keys, values, strict=True)), folder, overrides))
    twins = [folder.name for folder, count in Counter(run.folder for run in runs).items() if count > 1]
    if twins:
        problem = f"several combinations would be in the folder {twins[0]}: their values look alike"
        raise ConfigError([problem], str(path))
    return Sweep(path, file.config, tuple(runs))


def _short_names(keys: list[str]) -> dict[str, str]:
    """The last part of each full key, or the whole where two would be the same."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    return {key: key if last[name := key.rpartition(".")[2]] > 1 else name for key in keys}


def _in_a_name(value: Any) -> str:
    """A value as part of a folder's name: letters, digits, `.`, `_`, `+` and `-`."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or "empty"
