"""`dlm compare`: runs side by side, with what differs between their configurations. Needs no torch."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlm_dist.runs.comparison import RunSummary, SeedGroup

_FIGURES = ("loss", "bound", "bits_per_byte", "tokens_per_second")


def add_compare_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm compare`."""
    parser = subparsers.add_parser(
        "compare",
        help="put runs side by side, with what differs between their configurations",
        description="Print step, training loss (mean of the last 100 steps), newest held-out bound, bits per "
        "byte and speed of each run, and the keys in which their configurations differ. Runs that differ by run.seed "
        "alone are also shown as one, with the standard deviation over the seeds. What makes numbers "
        "incomparable is told.",
    )
    parser.add_argument("paths", metavar="RUN", type=Path, nargs="+", help="folder of a run, or a folder of runs")
    parser.add_argument(
        "--sort", choices=("loss", "bound", "bits_per_byte", "tokens_per_second"), help="smallest first"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--csv", action="store_true", help="print a line per run, all numbers in full")
    parser.set_defaults(run=run_compare)


def run_compare(arguments: argparse.Namespace) -> int:
    """Print the table. Returns 0."""
    from dlm_dist.runs.comparison import differing_keys, group_by_seed, notes, summarise
    from dlm_dist.runs.folder import find_runs

    runs = [summarise(path) for path in find_runs(arguments.paths)]
    if arguments.sort is not None:
        runs.sort(key=lambda run: (getattr(run, arguments.sort) is None, getattr(run, arguments.sort)))
    keys, groups, remarks = differing_keys(runs), group_by_seed(runs), notes(runs)
    if arguments.json:
        print(json.dumps({"runs": [_record(run, keys) for run in runs], "seeds": _several(groups), "notes": remarks}))
    elif arguments.csv:
        records = [_record(run, keys) for run in runs]
        rows = [{**record, **record.pop("config")} for record in records]
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        for remark in remarks:
            print(f"note: {remark}", file=sys.stderr)
    else:
        print("\n".join(_table(runs, keys)))
        if several := [group for group in groups if len(group.paths) > 1]:
            print("\n" + "\n".join(_seed_table(several)))
        for remark in remarks:
            print(f"note: {remark}")
    return 0


def _record(run: RunSummary, keys: Sequence[str]) -> dict[str, Any]:
    """All of a run, of its configuration what differs."""
    return {**asdict(run), "config": {key: run.config.get(key) for key in keys}}


def _several(groups: Sequence[SeedGroup]) -> list[dict[str, Any]]:
    return [asdict(group) for group in groups if len(group.paths) > 1]


def _table(runs: Sequence[RunSummary], keys: Sequence[str]) -> Iterator[str]:
    common = os.path.commonpath([os.path.dirname(os.path.abspath(run.path)) for run in runs])
    header = ["run", "step", "loss", "bound", "bits/byte", "tokens/s", *keys]
    rows = [
        [
            os.path.relpath(run.path, common),
            f"{run.step:,}" if run.step is not None else "-",
            _with_error(run.loss, run.loss_error),
            _with_error(run.bound, run.bound_error),
            _with_error(run.bits_per_byte, run.bits_per_byte_error),
            f"{run.tokens_per_second:,.0f}" if run.tokens_per_second is not None else "-",
            *(_shown(run.config.get(key)) for key in keys),
        ]
        for run in runs
    ]
    yield from _aligned([header, *rows])


def _seed_table(groups: Sequence[SeedGroup]) -> Iterator[str]:
    keys = list(groups[0].values)
    header = ["seeds", "loss", "bound", "bits/byte", *keys]
    rows = [
        [
            str(len(group.paths)),
            *(_with_error(*(spread or (None, None))) for spread in (group.loss, group.bound, group.bits_per_byte)),
            *(_shown(group.values[key]) for key in keys),
        ]
        for group in groups
    ]
    yield "mean and standard deviation over seeds:"
    yield from _aligned([header, *rows])


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
