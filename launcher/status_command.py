"""`dlm status`: what a run is doing, its newest checkpoint, its rate and the time left. Needs no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm_dist.runs.status import Status


def add_status_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm status`."""
    parser = subparsers.add_parser(
        "status",
        help="say what a run is doing",
        description="Say whether a run is running and where, how far it is, its newest checkpoint, rate and time "
        "left, which ranks are behind, and why it stopped. Reads files of the run's folder only, from any host.",
    )
    parser.add_argument("paths", metavar="RUN", type=Path, nargs="+", help="folder of a run, or a folder of runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_status)


def run_status(arguments: argparse.Namespace) -> int:
    """Print a paragraph for each run. Returns 0, whatever the runs are doing."""
    from dlm_dist.runs.folder import find_runs
    from dlm_dist.runs.status import read_status

    found = [read_status(path) for path in find_runs(arguments.paths, attempted=True)]
    if arguments.json:
        print(json.dumps({"runs": [asdict(status) for status in found]}))
    else:
        print("\n".join(line for status in found for line in _lines(status)))
    return 0


def _lines(status: Status) -> Iterator[str]:
    place = f" on {', '.join(status.hosts)}" if status.hosts and status.state in ("running", "starting") else ""
    yield f"{status.path}: {status.state}{place}" + (f" ({status.why})" if status.why else "")
    total, share = "", ""
    if status.max_steps:
        total, share = f" of {status.max_steps:,}", f" ({100 * status.step / status.max_steps:.1f} %)"
    yield f"  step {status.step:,}{total}{share}" + (f", {status.phase}" if status.phase else "")
    if status.silent_for is not None:
        yield f"  last sign of life {duration(status.silent_for)} ago"
    if status.checkpoint is None:
        yield "  no checkpoint yet"
    else:
        assert status.checkpoint_age is not None
        behind = status.step - status.checkpoint
        since = f", {behind:,} steps ago" if behind else ""
        yield f"  newest checkpoint: step-{status.checkpoint}, written {duration(status.checkpoint_age)} ago{since}"
    if status.seconds_per_step is not None and status.tokens_per_second is not None:
        left = f", about {duration(status.seconds_left)} left" if status.seconds_left is not None else ""
        yield f"  {status.seconds_per_step:.3g} s a step, {status.tokens_per_second:,.0f} tokens/s{left}"
    if status.loss is not None:
        yield f"  loss {status.loss:.4f}, {status.skipped_steps} steps skipped, {status.rollbacks} rollbacks"
    if status.starts > 1:
        yield f"  {status.starts} starts so far"
    if status.attempt is not None:
        yield f"  {status.attempt}"
    if status.excluded:
        yield f"  left out from now on: {', '.join(status.excluded)}"
    for text in status.behind:
        yield f"  behind: {text}"
    for text in status.asked:
        yield f"  asked {text}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `5 d 3 h`."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes:.0f} min"
    if hours < 48:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(hours // 24)} d {int(hours % 24)} h"
