"""Real runs for tests: the deepspeed launcher, several ranks over gloo, killed and resumed like a user's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]

# What must be equal to the bit between a resumed run and the one that never stopped.
EXACT = ("loss", "grad_norm", "lr", "data_pos", "rows_sha256", "noise_sha256", "bits_per_byte", "skipped")
EXACT += ("tokens_seen", "epochs", "loss_by_time", "grad_norm_by_role", "update_ratio_by_role")

MODELS = {
    "rwkv7": ["model.backbone=rwkv7", "model.hidden_size=32", "model.num_hidden_layers=2", "model.head_size=16"],
    "qwen3": [
        "model.backbone=qwen3",
        "model.hidden_size=32",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        "model.head_dim=16",
    ],
}


def build_data(folder: Path, sequence_length: int = 32, documents: int = 24) -> Path:
    """A small data set of bytes in folder/data, with held-out rows; about 45 training rows of 32 tokens."""
    words = ["time", "rank", "shard", "mask", "seed", "token", "row", "loss", "step", "gate"]
    text = folder / "text.jsonl"
    with open(text, "w", encoding="utf-8") as file:
        for i in range(documents):
            line = " ".join(words[(i * 7 + j * j) % len(words)] for j in range(6 + i % 7))
            file.write(json.dumps({"text": line}) + "\n")
    command = [sys.executable, "-m", "launcher.cli", "data", "build", "--input", str(text), "--tokenizer", "bytes"]
    command += ["--sequence-length", str(sequence_length), "--output", str(folder / "data")]
    command += ["--validation-fraction", "0.15"]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=120)
    return folder / "data"


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def overrides(data: Path, run: Path, backbone: str = "rwkv7", **changes: Any) -> list[str]:
    """key=value arguments of a tiny run; `changes` use __ for dots (train__max_steps=8)."""
    values: dict[str, Any] = {
        "run.dir": run,
        "data.train.0.path": data / "train",
        "data.random_length_prob": 0.2,
        "train.max_steps": 12,
        "train.global_batch_size": 8,
        "train.gradient_accumulation_steps": 2,
        "train.device": "cpu",
        # Two threads that wait for each other on busy cores take many times as long as one.
        "train.cpu_threads": 1,
        "optimizer.lr": 1e-3,
        "optimizer.warmup_steps": 3,
        "checkpoint.every": 4,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    lines = [f"{key}={'null' if value is None else value}" for key, value in values.items()]
    return MODELS[backbone] + lines


def command(arguments: Sequence[str], ranks: int, resume: str | None = None) -> list[str]:
    """The command line a user would type."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    launcher += ["--master_port", str(free_port())]
    config = REPOSITORY / "tests" / "distributed" / "tiny.yaml"
    program = [str(REPOSITORY / "launcher" / "pretrain.py"), "--config", str(config)]
    return launcher + program + (["--resume", resume] if resume else []) + list(arguments)


def environment(ranks: int) -> dict[str, str]:
    """The environment of a run on CPU ranks that share this machine."""
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_workers(module: str, ranks: int, folder: Path, *arguments: str) -> None:
    """Run `python -m MODULE RANK RANKS FOLDER ARGUMENTS` on every rank; fails the test where one does not end well."""
    world = {"WORLD_SIZE": str(ranks), "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(folder / f"rank-{rank}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, str(rank), str(ranks), str(folder), *arguments],
                    cwd=REPOSITORY,
                    env=environment(ranks) | world | place,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(ranks))
    assert codes == [0] * ranks, logs


def train(arguments: Sequence[str], ranks: int = 2, resume: str | None = None, timeout: float = 300) -> str:
    """Run to the end; its output. Fails the test with that output when the exit status is not 0."""
    done = attempt(arguments, ranks, resume, timeout)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def attempt(
    arguments: Sequence[str], ranks: int = 2, resume: str | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run to whatever end it comes to; standard output and error together."""
    return subprocess.run(
        command(arguments, ranks, resume),
        env=environment(ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


@contextmanager
def started(
    arguments: Sequence[str], run: Path, at_step: int, ranks: int = 2, resume: str | None = None, timeout: float = 300
) -> Iterator[None]:
    """A run that is under way: entered once metrics.jsonl reaches `at_step`, killed with SIGKILL at the end."""
    log = run.with_suffix(".killed.log")
    with open(log, "w") as output:
        process = subprocess.Popen(
            command(arguments, ranks, resume), env=environment(ranks), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + timeout
        while last_step(run) < at_step:
            assert process.poll() is None, f"ended before step {at_step}: {log.read_text()[-6000:]}"
            assert time.monotonic() < deadline, f"no step {at_step} in {timeout} s: {log.read_text()[-6000:]}"
            time.sleep(0.01)
        yield
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=30)
        process.wait()


def train_and_kill(arguments: Sequence[str], run: Path, at_step: int, ranks: int = 2, resume: str | None = None) -> int:
    """Start a run and SIGKILL all of its processes once metrics.jsonl reaches `at_step` -> last step it recorded."""
    with started(arguments, run, at_step, ranks, resume):
        pass
    return last_step(run)


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl holds; 0 where there is none yet."""
    steps = [record["step"] for record in metrics(run)]
    return steps[-1] if steps else 0


def metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def assert_same_steps(run: Path, reference: Path) -> None:
    """Every step of the two runs agrees in everything that EXACT names, to the bit."""
    ours, theirs = metrics(run), metrics(reference)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in EXACT:
            assert mine[key] == other[key], f"step {mine['step']}: {key} is {mine[key]}, uninterrupted {other[key]}"
