"""A week of failures in compressed time: the real trainer killed and resumed, beside the model behind `dlm goodput`.

    python -m benchmarks.goodput [--slurm] [--seconds 600] [--between-failures 60] [--intervals 3 8 20] [--seed 0]
                                 [--quick] [--slurm-restart FILE] [--weeks FILE ...] [--folder DIR] [--output FILE]
                                 [--picture FILE.svg]

For each interval between checkpoints one run of `launcher/pretrain.py` (a tiny RWKV-7, one rank, asynchronous saves) is
killed with SIGKILL at exponentially drawn times, in training, in saves and in starts alike, and started again at once
with --resume auto, until --seconds have passed. With --slurm it is instead a chain of jobs of two ranks on two nodes of
a local SLURM cluster, one of which loses power at each of those times (needs root; see tests/slurm). Its productive
time is the time of the steps that count in the end.
The model is given what was measured: the mean seconds of a step, of the stall and of the writing of a save, and of a
start. Two predictions: for the very failures that happened, with the time that each start took (goal: within 3 points
of the measured share, or the share of one interval, which a failure just before or behind a save decides about), and
for failures drawn anew 1,000 times (goal: the measured share lies among the middle 95 %).

Then the figure for clusters of 8 to 1,024 nodes with a node failing every 264 days: requeue and start as measured on
the local SLURM cluster (--slurm-restart: the record of benchmarks.slurm_restart; else a start of these runs), what
is assumed about a cluster (`ASSUMED`), and checkpoints of a 70 B model at a stated storage rate. Goal: at least 97 %
productive at 512 nodes. --weeks takes the runs of earlier records, and computes and draws the rest anew. Needs
matplotlib for the picture. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.killed_runs import Life, Lives, lives_of_processes, lives_on_cluster, write_rows
from benchmarks.machine import describe
from dlm_dist.goodput import (
    DAY,
    Failure,
    Run,
    best_interval,
    draw_failures,
    expected_share,
    largest,
    simulate,
)
from dlm_dist.training.checkpoint_files import list_checkpoints, step_of
from dlm_dist.training.metrics import json_line
from tests.slurm.cluster import missing

TOLERANCE = 0.03
GOAL = 0.97
DRAWS = 1000
WEEKS = 100
NODES = (8, 16, 32, 64, 128, 256, 512, 1024)

ASSUMED = {
    "parameters": 70e9,
    "bytes_per_parameter": 14.0,  # fp32 master and two moments, and the model in bf16
    "storage_bytes_per_second": 50e9,  # all nodes together; BLOOM wrote 2.3 TB in 40 s, 57e9
    "copy_bytes_per_second_per_node": 10e9,  # device to pinned host memory, eight devices
    "detect_seconds": 300.0,  # SlurmdTimeout's default, as if every failure were the death of a node
    "rendezvous_seconds": 60.0,  # connecting all ranks, which two do not show
    "hang_share": 0.05,
    "hang_minutes": 10.0,
}


def kept_steps(lives: list[Life]) -> int:
    """Steps that count in the end: those that no later start has made again."""
    kept, behind = 0, None
    for life in reversed([life for life in lives if life.steps]):
        kept += sum(1 for _, step in life.steps if behind is None or step <= behind)
        behind = min(life.steps[0][1] - 1, behind if behind is not None else life.steps[0][1])
    return kept


def measured(lives: list[Life], run_dir: Path) -> dict[str, Any]:
    """The shares of the time, and the mean costs that the model is to be given."""
    steps = sum(len(life.steps) for life in lives)
    # A start lasts to the beginning of its first step; of the first step only the end is known.
    gaps = [b[0] - a[0] for life in lives for a, b in itertools.pairwise(life.steps)]
    one = statistics.median(gaps)
    begun = [max(0.0, life.steps[0][0] - one - life.begun) for life in lives if life.steps]
    restart = sum(begun) + sum(life.ended - life.begun for life in lives if not life.steps)
    total = lives[-1].ended - lives[0].begun
    stall = sum(record["save_seconds"] for record in _records(run_dir))
    step = (total - restart - stall) / steps
    last = lives[-1]
    kept = kept_steps(lives) if last.steps else kept_steps(lives) - _unpublished(lives, run_dir)
    saves = [seconds for life in lives for seconds in life.saves]
    mean_stall = stall / max(1, len(saves))
    return {
        "seconds": total,
        "failures": len(lives) - 1,
        "steps": steps,
        "step_seconds": step,
        "saves": len(saves),
        "stall_seconds": mean_stall,
        "write_seconds": max(0.0, statistics.fmean(saves) - mean_stall) if saves else 0.0,
        "restart_seconds": statistics.fmean(begun),
        "restart_seconds_one_by_one": [
            max(0.0, life.steps[0][0] - one - life.begun) if life.steps else None for life in lives
        ],
        "shares": {
            "productive": kept * step / total,
            "stall": stall / total,
            "lost": (steps - kept) * step / total,
            "restart": restart / total,
        },
    }


def _unpublished(lives: list[Life], run_dir: Path) -> int:
    """Steps behind the newest checkpoint, of a run that ended in a start."""
    newest = max((step_of(path) or 0 for path in list_checkpoints(run_dir / "checkpoints")), default=0)
    last = next(life for life in reversed(lives) if life.steps)
    return sum(1 for _, step in last.steps if step > newest)


def _records(run_dir: Path) -> list[dict[str, Any]]:
    """Every step that was made, those that a failure took back too."""
    records = []
    for name in ("metrics.jsonl", "metrics.replaced.jsonl"):
        if (run_dir / name).exists():
            lines = (run_dir / name).read_bytes().split(b"\n")[:-1]
            records += [json.loads(line) for line in lines]
    return records


def week(folder: Path, data: Path, interval: float, step: float, options: argparse.Namespace) -> dict[str, Any]:
    """One run with failures for --seconds, and what the model says of it."""
    folder.mkdir()
    every = max(1, round(interval / step))
    draw = Run(nodes=1, interval=1.0, stall=0.0, restart=0.0, node_mtbf=options.between_failures)
    times = (failure.time for failure in draw_failures(draw, options.seed))
    lives = options.lives(
        folder, data, every, list(itertools.takewhile(lambda time: time < options.seconds, times)), options.seconds
    )
    begun = lives[0].begun
    found = measured(lives, folder / "run")
    failures = [Failure(life.ended - begun, False) for life in lives[:-1]]
    run = replace(
        draw,
        interval=every * found["step_seconds"],
        stall=found["stall_seconds"],
        write=found["write_seconds"],
        restart=found["restart_seconds"],
    )
    return {
        "slurm": options.slurm,
        "interval_seconds": run.interval,
        "every": every,
        **found,
        "failure_seconds": [failure.time for failure in failures],
        "model": compare(run, found, failures),
    }


def compare(run: Run, found: dict[str, Any], failures: list[Failure]) -> dict[str, Any]:
    """The model's shares for the failures that were, and for others of the same rate, beside the measured one."""
    seconds, share = found["seconds"], found["shares"]["productive"]
    # A start that a failure cut short would have taken longer.
    starts = [math.inf if taken is None else taken for taken in found["restart_seconds_one_by_one"]]
    same = simulate(run, seconds, failures, starts).shares()
    tolerance = max(TOLERANCE, run.interval / seconds)
    drawn = sorted(simulate(run, seconds, draw_failures(run, seed)).shares()["productive"] for seed in range(DRAWS))
    low, high = drawn[round(0.025 * DRAWS)], drawn[round(0.975 * DRAWS) - 1]
    return {
        "for_these_failures": same,
        "difference": share - same["productive"],
        "tolerance": tolerance,
        "within_tolerance": abs(share - same["productive"]) <= tolerance,
        "for_drawn_failures": [low, statistics.fmean(drawn), high],
        "within_drawn": low <= share <= high,
        "expected_share": expected_share(run),
    }


def step_time(folder: Path, data: Path, seconds: float, lives: Lives) -> float:
    """Seconds of a step of a run that nothing ends for a while."""
    folder.mkdir()
    (life,) = lives(folder, data, 10**6, [], seconds)
    if len(life.steps) < 10:
        raise RuntimeError(f"{len(life.steps)} steps in {seconds:g} s: {folder} may say why")
    return statistics.median(b[0] - a[0] for a, b in itertools.pairwise(life.steps))


def cluster(nodes: int, start: float, assumed: dict[str, float] = ASSUMED) -> Run:
    """A run on a cluster that saves at its best interval; requeue and start take `start` seconds, as measured here."""
    size = assumed["parameters"] * assumed["bytes_per_parameter"]
    transfer = size / assumed["storage_bytes_per_second"]
    run = Run(
        nodes=nodes,
        interval=1.0,
        stall=size / nodes / assumed["copy_bytes_per_second_per_node"],
        write=transfer,
        restart=start + assumed["rendezvous_seconds"] + transfer,
        detect=assumed["detect_seconds"],
        hang_share=assumed["hang_share"],
        hang_detect=60.0 * assumed["hang_minutes"],
    )
    return replace(run, interval=best_interval(run, least=10.0))


def cluster_figures(
    start: float, node_counts: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
) -> dict[str, Any]:
    """The figure: shares at the best interval by nodes; what 512 nodes need for the goal; what changes it."""
    rows = []
    for nodes in NODES:
        run = cluster(nodes, start)
        accounts = [simulate(run, 7 * DAY, draw_failures(run, seed)) for seed in range(WEEKS)]
        shares = {name: statistics.fmean(a.shares()[name] for a in accounts) for name in accounts[0].shares()}
        rows.append({**asdict(run), "expected_share": expected_share(run), "simulated_shares": shares})
    run = cluster(512, start)
    limits = {name: largest(run, name, GOAL, 10.0) for name in ("restart", "detect", "write", "stall", "hang_detect")}
    changes = {}
    for name in ("storage_bytes_per_second", "parameters", "detect_seconds", "hang_share", "hang_minutes"):
        changes[name] = [expected_share(cluster(512, start, ASSUMED | {name: ASSUMED[name] * f})) for f in (0.5, 2.0)]
    for name in ("node_mtbf", "interval"):
        changes[name] = [expected_share(_scaled(run, name, f)) for f in (0.5, 2.0)]
    synchronous = replace(run, stall=run.stall + run.write, write=0.0)
    synchronous = replace(synchronous, interval=best_interval(synchronous, 10.0))
    return {
        "assumed": ASSUMED,
        "start_seconds": start,
        "runs": rows,
        "goal": GOAL,
        "share_at_512": expected_share(run),
        "goal_met": expected_share(run) >= GOAL,
        "goal_needs_at_most": limits,
        "share_with_half_and_twice": changes,
        "share_at_512_every_10_minutes": expected_share(replace(run, interval=600.0)),
        "share_with_synchronous_saves": expected_share(synchronous),
    }


def _scaled(run: Run, name: str, factor: float) -> Run:
    change: dict[str, Any] = {name: getattr(run, name) * factor}
    changed = replace(run, **change)
    return changed if name == "interval" else replace(changed, interval=best_interval(changed, 10.0))


def draw_picture(result: dict[str, Any], path: Path) -> None:
    """Productive share by interval for every number of nodes, and measured beside predicted shares."""
    from matplotlib.figure import Figure

    from benchmarks.objective_pictures import save

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in result["cluster"]["runs"]:
        run = Run(**{name: row[name] for name in Run.__dataclass_fields__})
        intervals = np.geomspace(60, 4 * 3600, 60)
        shares = [100 * expected_share(replace(run, interval=x)) for x in intervals]
        (line,) = left.plot(intervals / 60, shares, label=f"{run.nodes} nodes")
        left.plot(run.interval / 60, 100 * row["simulated_shares"]["productive"], "o", color=line.get_color())
    left.axhline(100 * GOAL, color="grey", linestyle=":")
    left.set(xscale="log", ylim=(85, 100), xlabel="minutes of training between saves", ylabel="productive time (%)")
    left.legend(fontsize=8, loc="lower left")
    left.set_title(f"lines: exact; dots: {WEEKS} simulated weeks at the best interval", fontsize=9)
    weeks = result["weeks"]
    places = np.arange(len(weeks))
    for kind, colour in (("productive", "#1f4e79"), ("stall", "#c00000"), ("lost", "#e07b00"), ("restart", "#9db8d2")):
        for shift, of in ((-0.2, "measured"), (0.2, "model")):
            below, height = zip(*(_bar(found, kind, of) for found in weeks), strict=True)
            label = kind if of == "measured" else None
            right.bar(places + shift, height, 0.36, bottom=below, color=colour, label=label)
    right.set_xticks(places, [f"{found['interval_seconds']:.1f} s{_place(found)}" for found in weeks])
    right.set(xlabel="training between saves", ylabel="share of the time (%)", ylim=(0, 100))
    right.set_title("the real trainer killed again and again: measured (left), model (right)", fontsize=9)
    right.legend(fontsize=8, loc="lower right")
    save(figure, path)


def _place(found: dict[str, Any]) -> str:
    return "\nSLURM" if found.get("slurm") else ""


def _bar(found: dict[str, Any], kind: str, of: str) -> tuple[float, float]:
    """(bottom, height) of one part of a bar, in percent."""
    shares = dict(found["shares"] if of == "measured" else found["model"]["for_these_failures"])
    shares["stall"] += shares.get("waiting", 0.0)
    kinds = ["productive", "stall", "lost", "restart"]
    return 100 * sum(shares[other] for other in kinds[: kinds.index(kind)]), 100 * shares[kind]


def print_tables(result: dict[str, Any]) -> None:
    """The compressed weeks, then the clusters."""
    print(
        "between saves  failures  productive   stall   lost  restart   model for these failures   middle 95 % of draws"
    )
    for found in result["weeks"]:
        shares, model = found["shares"], found["model"]
        low, _, high = model["for_drawn_failures"]
        print(
            f"{found['interval_seconds']:>11.1f} s  {found['failures']:>8}  {100 * shares['productive']:>8.1f} %  "
            f"{100 * shares['stall']:>5.2f}  {100 * shares['lost']:>5.1f}  {100 * shares['restart']:>7.1f}  "
            f"{100 * model['for_these_failures']['productive']:>19.1f} %  {100 * low:.1f} to {100 * high:.1f} %  "
            f"{_place(found).strip()}"
        )
    print("nodes  save every  productive (simulated)")
    for row in result["cluster"]["runs"]:
        expected, simulated = 100 * row["expected_share"], 100 * row["simulated_shares"]["productive"]
        print(f"{row['nodes']:>5}  {row['interval'] / 60:>6.1f} min  {expected:.2f} % ({simulated:.2f} %)")
    found = result["cluster"]
    print(f"512 nodes: {100 * found['share_at_512']:.2f} % (goal: at least {100 * GOAL:g} %)")


def run_weeks(options: argparse.Namespace) -> dict[str, Any]:
    """The record of the runs with failures."""
    folder = Path(tempfile.mkdtemp(prefix="goodput-benchmark-", dir=options.folder)).resolve()
    try:
        write_rows(folder / "train")
        step = step_time(folder / "free", folder / "train", 40.0, options.lives)
        weeks = [
            week(folder / f"week-{i}", folder / "train", interval, step, options)
            for i, interval in enumerate(options.intervals)
        ]
    finally:
        shutil.rmtree(folder)
    settings = {name: getattr(options, name) for name in ("seconds", "between_failures", "seed")}
    measured_on = {**describe(torch.device("cpu")), "load_average": os.getloadavg()}
    return {"benchmark": "goodput", **measured_on, **settings, "draws": DRAWS, "weeks": weeks}


def read_weeks(paths: list[Path]) -> dict[str, Any]:
    """The first of the records at `paths`, with the runs of all."""
    first, *others = (json.loads(path.read_text()) for path in paths)
    return {**first, "weeks": [found for record in (first, *others) for found in record["weeks"]]}


def main(arguments: list[str]) -> int:
    """Print the tables and one line of JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.goodput", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of each run (default 600)")
    parser.add_argument("--between-failures", type=float, default=60.0, help="seconds, on average (default 60)")
    parser.add_argument("--intervals", type=float, nargs="+", default=[3.0, 8.0, 20.0], help="seconds between saves")
    parser.add_argument("--seed", type=int, default=0, help="of the failures")
    parser.add_argument("--slurm", action="store_true", help="on a local SLURM cluster of two nodes that lose power")
    parser.add_argument("--quick", action="store_true", help="one run of 75 s: shows that it runs")
    parser.add_argument("--slurm-restart", type=Path, metavar="FILE", help="record of benchmarks.slurm_restart")
    parser.add_argument("--weeks", type=Path, nargs="+", metavar="FILE", help="records of runs, not to be made again")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the runs are (default: here)")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    parser.add_argument("--picture", type=Path, help="draw this file (SVG)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds, options.between_failures, options.intervals = 75.0, 40.0, [2.0]
    options.lives = lives_of_processes
    if options.slurm:
        if (reason := missing()) is not None:
            print(f"goodput: {reason}", file=sys.stderr)
            return 2
        options.lives = lives_on_cluster
    record = run_weeks(options) if options.weeks is None else read_weeks(options.weeks)
    start = statistics.fmean(found["restart_seconds"] for found in record["weeks"])
    if options.slurm_restart is not None:
        parts = json.loads(options.slurm_restart.read_text())["seconds"]
        start = parts["requeue"]["median"] + parts["start"]["median"]
    result: dict[str, Any] = {**record, "cluster": cluster_figures(start)}
    print_tables(result)
    if options.picture is not None:
        draw_picture(result, options.picture)
    line = json_line(result)
    print(line)
    if options.output is not None:
        options.output.write_text(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
