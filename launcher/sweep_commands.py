"""`dlm sweep list | arguments`: the runs of a grid file, for people and for slurm/sweep.sbatch. Needs no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlm_dist.runs.sweep import Sweep, SweepRun


def add_sweep_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm sweep` with its sub-commands."""
    sweep = subparsers.add_parser("sweep", help="the runs of a grid file (slurm/sweep.sbatch starts them)")
    commands = sweep.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = commands.add_parser(
        "list",
        help="check every run of a grid file, and show how far each is",
        description="Check the configuration of every run, and show its number, folder and progress. docs/slurm.md "
        "says what a grid file holds.",
    )
    listing.add_argument("grid", metavar="GRID", type=Path, help="YAML file with config, dir, overrides and grid")
    listing.add_argument("--json", action="store_true", help="print one JSON object")
    listing.set_defaults(run=run_list)
    one = commands.add_parser(
        "arguments",
        help="what one run is started with: its configuration file, then its overrides, one per line",
        description="Print the configuration file of run INDEX and on further lines its overrides. The exit status is "
        "2 where there is no such run or its configuration is wrong.",
    )
    one.add_argument("grid", metavar="GRID", type=Path)
    one.add_argument("index", metavar="INDEX", type=int, help="from 0 on; the number of the array's task")
    one.set_defaults(run=run_arguments)


def run_list(arguments: argparse.Namespace) -> int:
    """Print a line per run and what to submit. Returns 0."""
    from dlm_dist.runs.sweep import read_sweep

    sweep = read_sweep(arguments.grid)
    entries = [_entry(sweep, run) for run in sweep.runs]
    if arguments.json:
        print(json.dumps({"config": str(sweep.config), "runs": entries}))
    else:
        print("\n".join(_lines(sweep, entries)))
    return 0


def run_arguments(arguments: argparse.Namespace) -> int:
    """Print the arguments of one run, which is checked first. Returns 0."""
    from dlm_dist.runs.sweep import read_sweep

    sweep = read_sweep(arguments.grid)
    run = sweep.run(arguments.index)
    sweep.load(run)
    print("\n".join([str(sweep.config), *run.overrides]))
    return 0


def _entry(sweep: Sweep, run: SweepRun) -> dict[str, Any]:
    from dlm_dist.runs.folder import newest_records

    config = sweep.load(run)
    records = newest_records(run.folder / "metrics.jsonl", 1)
    return {
        "index": run.index,
        "folder": str(run.folder),
        "values": run.values,
        "step": records[-1]["step"] if records else 0,
        "max_steps": config.train.max_steps,
        "done": (run.folder / "DONE").exists(),
    }


def _lines(sweep: Sweep, entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        total = f" of {entry['max_steps']:,}" if entry["max_steps"] is not None else ""
        state = "done" if entry["done"] else f"step {entry['step']:,}{total}" if entry["step"] else "not started"
        yield f"{entry['index']:>4}  {state:<24}  {entry['folder']}"
    left = [entry["index"] for entry in entries if not entry["done"]]
    done = len(entries) - len(left)
    if left:
        submit = f"sbatch --array={_ranges(left)} slurm/sweep.sbatch {sweep.path}"
        yield f"{done} of {len(entries)} done; for the others: {submit}"
    else:
        yield f"all {len(entries)} done; `dlm compare {sweep.runs[0].folder.parent}` compares them"


def _ranges(numbers: list[int]) -> str:
    """0-2,5 for 0, 1, 2, 5, as sbatch --array takes it."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
