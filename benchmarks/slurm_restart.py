"""What a failure costs on a real SLURM cluster of two nodes that this machine plays (needs root; see tests/slurm).

    python -m benchmarks.slurm_restart [--kills 4] [--folder DIR] [--output FILE]

A tiny run of two ranks on two nodes is submitted with slurm/pretrain.sbatch; again and again a rank is killed with
SIGKILL, and the chain goes on by itself. From the kill: `detect` until the chain knows that the attempt is over,
`requeue` until the next job begins, `start` until its first step is made (start of Python on both nodes, rendezvous,
reading of the checkpoint, seek in the data). Ends with one line of JSON, which benchmarks.goodput takes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.killed_runs import submit, write_rows
from benchmarks.machine import describe, spread
from dlm_dist.training.checkpoint_files import list_checkpoints
from dlm_dist.training.metrics import json_line
from tests.slurm.cluster import Cluster, local_cluster, missing


def restarts(cluster: Cluster, folder: Path, kills: int) -> dict[str, list[float]]:
    """Seconds of each part of `kills` restarts."""
    run = folder / "run"
    write_rows(folder / "train")
    job = submit(cluster, folder, folder / "train", f"0-{kills}%1", every=20)
    found: dict[str, list[float]] = {"detect": [], "requeue": [], "start": []}
    events = run / "chain" / "attempts.jsonl"
    for kill in range(kills):
        # A checkpoint of its own, or the chain counts the attempt as one that got nowhere.
        wait(lambda kill=kill: _steps(run, job, kill) > 25 and len(list_checkpoints(run / "checkpoints")) > 0)
        victim = next(p for p in cluster.processes("n2") if "launcher/pretrain.py" in p.cmdline())
        before = _lines(events)
        begun = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        times = [begun]
        wait(lambda before=before: _lines(events) > before)
        times.append(time.monotonic())
        wait(lambda before=before: _lines(events) > before + 1)
        times.append(time.monotonic())
        wait(lambda kill=kill: _steps(run, job, kill + 1) > 0)
        times.append(time.monotonic())
        for name, first, last in zip(found, times, times[1:], strict=False):
            found[name].append(last - first)
        print(", ".join(f"{name} {values[-1]:.1f} s" for name, values in found.items()), flush=True)
    cluster.run("scancel", str(job))
    return found


def wait(holds: Callable[[], bool], seconds: float = 300.0) -> None:
    """Until something is so; RuntimeError where it never is."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the run did not get on within {seconds:.0f} s")
        time.sleep(0.05)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _steps(run: Path, job: int, task: int) -> int:
    """Steps that the attempt of a task has made so far."""
    log = run / "logs" / f"{job}_{task}" / "rank-00000.n1.log"
    return (
        sum(line.startswith("step ") and "loss" in line for line in log.read_text().splitlines()) if log.exists() else 0
    )


def main(arguments: list[str]) -> int:
    """Print a line per restart, a table, and one line of JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.slurm_restart", description=__doc__)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the run is (default: here)")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args(arguments)
    if (reason := missing()) is not None:
        print(f"slurm_restart: {reason}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="slurm-restart-", dir=options.folder)).resolve()
    try:
        with local_cluster() as cluster:
            found = restarts(cluster, folder, options.kills)
    finally:
        shutil.rmtree(folder)
    seconds = {name: spread(values) for name, values in found.items()}
    for name, values in seconds.items():
        print(f"{name:8} {values['median']:6.1f} s ({values['min']:.1f} to {values['max']:.1f})")
    line = json_line(
        {
            "benchmark": "slurm_restart",
            **describe(torch.device("cpu")),
            "load_average": os.getloadavg(),
            "kills": options.kills,
            "seconds": seconds,
        }
    )
    print(line)
    if options.output is not None:
        options.output.write_text(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
