"""`dlm goodput`: how often to save on how many nodes, and what failures, saves and restarts then cost."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dlm_dist.goodput import (
    DAY,
    NODE_MTBF_DAYS,
    Run,
    best_interval,
    daly_interval,
    draw_failures,
    expected_share,
    good_intervals,
    largest,
    simulate,
    young_interval,
)

_WEEK = 7 * DAY
_WEEKS = 100
_SHORTEST = 10.0
"""Seconds: no run saves more often, if the time of a step is not given."""
_SLACK = 0.001
_FIELDS = ("node_mtbf", "stall", "write", "restart", "hang_share")


def add_goodput_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm goodput`."""
    parser = subparsers.add_parser(
        "goodput",
        help="how often to save, by nodes, failures and the cost of saves and restarts",
        description="Recommend the interval between checkpoints for a number of nodes, and say where the time of such "
        "a run goes. Take the seconds from a run: `stall` is save_seconds in metrics.jsonl, `write` the rest of "
        "what the console says behind `saved`, `restart` the time from the end of a start to the first step of the "
        "next. docs/slurm.md has an example.",
    )
    add = parser.add_argument
    add("--nodes", type=int, nargs="+", default=[8, 64, 256, 512, 1024], metavar="N", help="(default: 8 to 1,024)")
    add("--stall", type=float, required=True, metavar="SECONDS", help="training stands still for a save")
    add("--restart", type=float, required=True, metavar="SECONDS", help="from a failure to the first step")
    add("--write", type=float, default=0.0, metavar="SECONDS", help="from there until it is written, if asynchronous")
    add("--checkpoint-gb", type=float, metavar="GB", help="add its reading to --restart and its writing to --write")
    add("--storage-gb-per-second", type=float, metavar="GB", help="of all nodes together, for --checkpoint-gb")
    add("--node-mtbf-days", type=float, default=NODE_MTBF_DAYS, metavar="DAYS", help="(default: %(default)g)")
    add("--detect", type=float, default=0.0, metavar="SECONDS", help="until a failure is noticed (default: 0)")
    add("--hang-share", type=float, default=0.0, metavar="SHARE", help="of failures that end no process (default: 0)")
    add("--hang-minutes", type=float, default=60.0, help="until those are noticed, guards.hang_minutes (default: 60)")
    add("--job-hours", type=float, help="time limit of a job, behind which the next one goes on")
    add("--step-seconds", type=float, help="time of a step: the interval is then told in steps too")
    add("--interval-minutes", type=float, help="look at this interval between saves, not at the best one")
    add("--goal", type=float, default=97.0, metavar="PERCENT", help="productive time to reach (default: 97)")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_goodput)


def run_goodput(arguments: argparse.Namespace) -> int:
    """Print a report for each number of nodes. Returns 0, whether or not the goal is met."""
    reports = [report(run, arguments) for run in _runs(arguments)]
    if arguments.json:
        print(json.dumps({"runs": reports}))
    else:
        print("\n".join(_lines(reports)))
    return 0


def _runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """What the options describe, one for each number of nodes. Raises ValueError for options that fit no run."""
    for name in ("checkpoint_gb", "storage_gb_per_second", "node_mtbf_days", "step_seconds", "interval_minutes"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}: expected more than 0")
    if (arguments.checkpoint_gb is None) != (arguments.storage_gb_per_second is None):
        raise ValueError("--checkpoint-gb and --storage-gb-per-second belong together: give both or none")
    transfer = arguments.checkpoint_gb / arguments.storage_gb_per_second if arguments.checkpoint_gb else 0.0
    for nodes in arguments.nodes:
        run = Run(
            nodes=nodes,
            interval=_SHORTEST,
            stall=arguments.stall,
            restart=arguments.restart + transfer,
            write=arguments.write + transfer,
            node_mtbf=arguments.node_mtbf_days * DAY,
            detect=arguments.detect,
            hang_share=arguments.hang_share,
            hang_detect=60.0 * arguments.hang_minutes,
            job=None if arguments.job_hours is None else 3600.0 * arguments.job_hours,
        )
        if arguments.interval_minutes is not None:
            yield replace(run, interval=60.0 * arguments.interval_minutes)
        else:
            yield replace(run, interval=best_interval(run, arguments.step_seconds or _SHORTEST))


def report(run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is said about one run."""
    least = arguments.step_seconds or _SHORTEST
    accounts = [simulate(run, _WEEK, draw_failures(run, seed)) for seed in range(_WEEKS)]
    shares = sorted(account.shares()["productive"] for account in accounts)
    wanted = arguments.goal / 100.0
    return {
        "nodes": run.nodes,
        "hours_between_failures": 1.0 / run.rate / 3600.0,
        "interval_seconds": run.interval,
        "interval_steps": max(1, round(run.interval / arguments.step_seconds)) if arguments.step_seconds else None,
        "interval_seconds_nearly_as_good": good_intervals(run, _SLACK, least),
        "young_interval_seconds": young_interval(run.stall, run.rate),
        "daly_interval_seconds": daly_interval(run.stall, run.rate),
        "expected_share": expected_share(run),
        "simulated_weeks": _WEEKS,
        "simulated_share": statistics.fmean(shares),
        "simulated_share_of_95_weeks": [shares[round(0.025 * _WEEKS)], shares[round(0.975 * _WEEKS) - 1]],
        "shares": {name: statistics.fmean(a.shares()[name] for a in accounts) for name in accounts[0].shares()},
        "goal": wanted,
        "goal_holds_up_to": {name: largest(run, name, wanted, least) for name in ("restart", "stall", "write")},
        "sensitivity": {name: [_changed(run, name, factor, least) for factor in (0.5, 2.0)] for name in _FIELDS},
        "sensitivity_to_interval": [
            expected_share(replace(run, interval=run.interval * factor)) for factor in (0.5, 2.0)
        ],
    }


def _changed(run: Run, name: str, factor: float, least: float) -> float:
    """Expected share with one number halved or doubled, the interval chosen again."""
    value = getattr(run, name) * factor
    changed = replace(run, **{name: min(1.0, value) if name == "hang_share" else value})
    return expected_share(replace(changed, interval=best_interval(changed, least)))


def _lines(reports: list[dict[str, Any]]) -> Iterator[str]:
    yield "nodes  a failure in  save every             productive  saves   lost  noticing  restarts  95 % of weeks"
    for found in reports:
        shares = {name: 100 * value for name, value in found["shares"].items()}
        low, high = (100 * value for value in found["simulated_share_of_95_weeks"])
        steps = f"= {found['interval_steps']:,} steps" if found["interval_steps"] else ""
        yield (
            f"{found['nodes']:>5}  {found['hours_between_failures']:>10.1f} h  "
            f"{found['interval_seconds'] / 60:>6.1f} min {steps:<12}  {100 * found['expected_share']:>8.2f} %  "
            f"{shares['stall'] + shares['waiting']:>5.2f}  {shares['lost']:>5.2f}  {shares['detection']:>8.2f}  "
            f"{shares['restart']:>8.2f}  {low:.2f} to {high:.2f}"
        )
    if len(reports) == 1:
        yield from _details(reports[0])
    else:
        yield "with a single number of nodes: which intervals are nearly as good, what the goal needs, sensitivity"


def _details(found: dict[str, Any]) -> Iterator[str]:
    low, high = (value / 60 for value in found["interval_seconds_nearly_as_good"])
    young, daly = (found[f"{name}_interval_seconds"] / 60 for name in ("young", "daly"))
    yield (
        f"From {low:.1f} to {high:.1f} min at most {100 * _SLACK:g} points are given away (Young: {young:.1f}, Daly: "
        f"{daly:.1f} min)."
    )
    limits = ", ".join(
        f"{name} alone cannot help" if value is None else f"{name} <= {value:.0f} s"
        for name, value in found["goal_holds_up_to"].items()
    )
    verdict = "is met" if found["expected_share"] >= found["goal"] else "is missed"
    yield f"{100 * found['goal']:g} % {verdict}; it needs, each with all else as it is: {limits}."
    yield "Productive with half and with twice the"
    changes = {"interval": found["sensitivity_to_interval"]} | found["sensitivity"]
    for name, (half, double) in changes.items():
        yield f"  {name.replace('_', ' '):<11} {100 * half:>6.2f} %  {100 * double:>6.2f} %"
