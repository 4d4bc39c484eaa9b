"""Runs of several arms at equal seeds, made by the launcher that every run starts with, and their comparison.

Arms at one seed see the same rows, masks and initial values, so the difference of their held-out bounds is paired.
Finished runs are not run again; one that was stopped goes on.
"""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom.
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def train(config: Path, folder: Path, seed: int, overrides: Sequence[str], steps: int, threads: int) -> None:
    """Make the run in `folder`, unless its evaluation after step `steps` is there. ValueError: it holds another run."""
    require_same_run(folder, config, seed, overrides)
    if last_evaluation(folder) == steps:
        return
    launcher = Path(sysconfig.get_path("scripts")) / "deepspeed"
    command = [str(launcher), "--num_gpus", "1", "--master_port", str(_free_port()), "launcher/pretrain.py"]
    command += ["--config", str(config), "--resume", "auto", f"run.dir={folder}", f"run.seed={seed}"]
    command += [f"train.cpu_threads={threads}", *overrides]
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        print(f"{folder.name}: {steps} steps", flush=True)
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)


def require_same_run(folder: Path, config: Path, seed: int, overrides: Sequence[str]) -> None:
    """Raise ValueError where `folder` holds a run of other settings: its numbers are of something else."""
    from dlm_dist.config import load_config

    if not (folder / "config.yaml").exists():
        return
    there = load_config(folder / "config.yaml").model_dump(mode="json")
    wanted = load_config(config, [f"run.seed={seed}", *overrides]).model_dump(mode="json")
    for section, values in wanted.items():
        if not isinstance(values, dict) or section == "logging":
            continue
        for key, value in values.items():
            # Where a run lives, how many threads it has, and what the data decides are not its identity.
            if value is not None and key not in ("dir", "cpu_threads") and there[section].get(key) != value:
                raise ValueError(
                    f"{folder} holds a run with {section}.{key} = {there[section].get(key)}, and this one has {value}: "
                    "remove the folder to run it anew"
                )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run so far."""
    path = folder / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_evaluation(folder: Path) -> int | None:
    """The step of the newest evaluation; None if there is none."""
    found = evaluations(folder)
    return int(found[-1]["step"]) if found else None


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What each step of a run recorded."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def interval(differences: Sequence[float]) -> dict[str, float | None]:
    """Mean of paired differences and its 95 % interval (Student's t); no interval for a single pair."""
    count = len(differences)
    mean = statistics.fmean(differences)
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    # With more pairs than the table knows the interval is a little too wide, never too narrow.
    half = _STUDENT_T[min(count - 1, len(_STUDENT_T)) - 1] * statistics.stdev(differences) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def verdict(difference: dict[str, float | None]) -> str:
    """Better (a lower bound) or worse where the interval does not hold 0, else undecided."""
    if difference["low"] is None or difference["high"] is None:
        return "one seed"
    if difference["high"] < 0:
        return "better"
    return "worse" if difference["low"] > 0 else "undecided"


def span(difference: dict[str, float | None]) -> str:
    """The difference as a table shows it."""
    ends = "" if difference["low"] is None else f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    return f"{difference['mean']:+.4f}{ends} {verdict(difference)}"
