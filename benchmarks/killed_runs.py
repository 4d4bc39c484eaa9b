"""Runs of the real trainer that fail again and again: as a process of this machine, or as a chain of SLURM jobs."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from data_pipeline.shards import write_source
from data_pipeline.tokenizers import load
from tests.slurm.cluster import Cluster, local_cluster

ROOT = Path(__file__).resolve().parent.parent

SETTINGS = [
    "run.seed=0",
    "logging.every=1",
    "model.backbone=rwkv7",
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.head_size=32",
    "train.max_steps=10000000",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "train.device=cpu",
    "train.cpu_threads=1",
    "train.precision=fp32",
    "optimizer.schedule=constant",
    "checkpoint.asynchronous=true",
    "checkpoint.keep_last=2",
]


@dataclass
class Life:
    """One start of the trainer: when its lines came, by time.monotonic()."""

    begun: float
    ended: float = 0.0
    steps: list[tuple[float, int]] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)
    """Seconds from the beginning of a save until all ranks know that it is published."""

    def read(self, lines: Iterable[str], log: IO[str]) -> None:
        """Note when each step ended, until the trainer does."""
        for line in lines:
            if found := re.match(r"step (\d+)/", line):
                self.steps.append((time.monotonic(), int(found[1])))
            elif found := re.search(r" saved .* in ([\d.]+) s", line):
                self.saves.append(float(found[1]))
            else:
                log.write(line)


Lives = Callable[[Path, Path, int, Sequence[float], float], list[Life]]
"""(folder, data, steps between saves, seconds at which it fails, seconds of all) -> the starts of a run."""


def write_rows(folder: Path) -> None:
    """A data set of 256 rows of 64 bytes."""
    tokenizer = load("bytes")
    text = "".join(f"{i:06d} a row of text that is cut at 64 bytes. " for i in range(512))
    write_source(folder, np.stack([tokenizer.encode(text[64 * i : 64 * (i + 1)]) for i in range(256)]), tokenizer)


def live(folder: Path, data: Path, every: int, until: float) -> Life:
    """Start the run in `folder`, and kill it at `until`."""
    command = [sys.executable, str(ROOT / "launcher" / "pretrain.py"), "--config", str(folder / "empty.yaml")]
    command += ["--resume", "auto", *SETTINGS, f"run.dir={folder / 'run'}", f"data.train.0.path={data}"]
    command += [f"checkpoint.every={every}"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    life = Life(time.monotonic())
    with open(folder / "log", "a") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        )
        assert process.stdout is not None
        reader = threading.Thread(target=life.read, args=(process.stdout, log))
        reader.start()
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        else:
            raise RuntimeError(f"the trainer has ended by itself: {folder / 'log'} says why")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            reader.join()
            life.ended = time.monotonic()
    return life


def lives_of_processes(folder: Path, data: Path, every: int, failures: Sequence[float], seconds: float) -> list[Life]:
    """A run for `seconds`, killed at each of `failures` (seconds from its begin) and started again at once."""
    (folder / "empty.yaml").write_text("{}\n")
    begun = time.monotonic()
    return [live(folder, data, every, begun + until) for until in (*failures, seconds)]


def submit(cluster: Cluster, folder: Path, data: Path, array: str, every: int) -> int:
    """sbatch of a run in `folder`/run, a rank on each of two nodes -> the job's number."""
    (folder / "empty.yaml").write_text("{}\n")
    return cluster.submit(
        f"--chdir={ROOT}",
        "--nodes=2",
        f"--array={array}",
        f"--output={folder}/%a.out",
        "slurm/pretrain.sbatch",
        str(folder / "empty.yaml"),
        *SETTINGS,
        *(f"run.dir={folder / 'run'}", f"data.train.0.path={data}", f"checkpoint.every={every}"),
        "train.micro_batch_size=4",
        environment={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DLM_VENV": "none"},
    )


class Follower:
    """Reads what rank 0 of each start says, as it says it."""

    def __init__(self, run_dir: Path) -> None:
        self._logs = run_dir / "logs"
        self._past: set[Path] = set()
        self._open: IO[str] | None = None
        self._torn = ""
        self.life = Life(time.monotonic())

    def follow(self, until: float) -> None:
        """Note the steps until `until` (time.monotonic())."""
        while time.monotonic() < until:
            self._read()
            time.sleep(0.01)

    def next_life(self, now: float) -> Life:
        """The start of now has ended, what it still says does not count; -> it."""
        self._read()
        over, self.life = self.life, Life(now)
        over.ended = now
        self._past |= set(self._logs.glob("*"))
        if self._open is not None:
            self._open.close()
        self._open, self._torn = None, ""
        return over

    def _read(self) -> None:
        if self._open is None:
            found = [path for path in self._logs.glob("*/rank-00000.*.log") if path.parent not in self._past]
            if not found:
                return
            self._open = open(found[0], encoding="utf-8")  # noqa: SIM115 - for as long as this start lives
        *lines, self._torn = (self._torn + self._open.read()).split("\n")
        self.life.read(lines, io.StringIO())


def lives_on_cluster(folder: Path, data: Path, every: int, failures: Sequence[float], seconds: float) -> list[Life]:
    """A run for `seconds`; at each of `failures` (seconds from its begin) one of its two nodes loses power.

    SLURM finds the node down, puts the job back into its queue, and the node comes back at once: its next start
    begins when the power was lost, what it takes to notice included. A failure while a node is down finds nothing.
    """
    drawn = random.Random(len(failures))
    given_up = folder / "run" / "STOP"
    with local_cluster() as cluster:
        submit(cluster, folder, data, "0", every)
        follower = Follower(folder / "run")
        begun = follower.life.begun
        lives: list[Life] = []
        for failure in failures:
            if begun + failure < time.monotonic():
                continue
            follower.follow(begun + failure)
            name = drawn.choice(cluster.names)
            cluster.kill_node(name)
            lives.append(follower.next_life(time.monotonic()))
            cluster.wait(lambda name=name: cluster.node_states()[name].startswith("down"), 60, f"{name} is down")
            cluster.repair(name)
            cluster.start_node(name)
            if given_up.exists():
                raise RuntimeError(f"the chain has given up: {given_up.read_text()}")
            print(f"{failure:7.0f} s  {name} lost power; {len(lives[-1].steps)} steps before", flush=True)
        follower.follow(begun + seconds)
        lives.append(follower.next_life(time.monotonic()))
    return lives
