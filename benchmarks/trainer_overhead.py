"""What guards, figures and keyed noise cost of a training step: the real trainer, its own parts timed where they run.

    python -m benchmarks.trainer_overhead [--steps 60] [--logging-every N] [--cpu-threads 1] [--quick] [--output FILE]

Two sizes of a Qwen3 on a CPU, one rank, ZeRO-1, both spike guards and TensorBoard on, figures at every
`--logging-every` steps (default: what a configuration that does not say has): a step of hundreds of milliseconds and
one of about 50. A step is the time from one to the next. What it must do is wait for rows, forward, backward and
update; everything else that the loop's thread does is overhead, by part: `totals` (sums and hashes over ranks), `agree`
(the loss over ranks, its guard), `judge` (gradient norm and its guard), `updates` (gradients and moves by role, inside
the optimizer's step), `by time` (losses by time of diffusion), `figures`, `sinks` (lines and curves written), `rest`
(the phase clock, the learning rate, dictionaries). `noise` is what the read-ahead threads compute beside reading rows
(times, masks, inputs, hashes), as if it took a core from the training.

A busy machine makes all of it longer, so seconds of the thread's own CPU stand beside those of the clock. Goals: all of
it at most 2 % of the long step (CPU time); figures and sinks under 1 % of 50 ms for the short one (they read the
update of every weight, so a larger model's take longer, as its steps do). Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.machine import describe, in_fresh_process, spread
from data_pipeline.build import BuildOptions, build_dataset
from dlm_dist.config import load_config
from dlm_dist.training import batches, run, step
from dlm_dist.training.distributed import start_distributed
from dlm_dist.training.metrics import MetricsLog, json_line
from dlm_dist.training.step_figures import StepFigures
from dlm_dist.training.update_figures import UpdateMeter
from dlm_dist.training.watchdog import Watchdog

GOAL = 0.02
LOGGING_GOAL = 0.01
LOGGED_STEP = 0.05
"""Seconds of the step that the cost of logging is compared with."""
WARMUP = 5
NEEDED = ("rows", "model", "update")
LOGGING = ("updates", "by time", "figures", "sinks")
SIZES = {
    "long": ("model.hidden_size=384", "model.num_hidden_layers=6", "data.sequence_length=256", "16"),
    "short": ("model.hidden_size=128", "model.num_hidden_layers=4", "data.sequence_length=128", "8"),
}
Seconds = dict[str, tuple[float, float]]


class Ledger:
    """Seconds by part of each step: on the clock, and of the thread's CPU. A part within a part counts once."""

    def __init__(self) -> None:
        self.steps: list[Seconds] = []
        self.beats: list[float] = []
        self.noise: list[float] = []
        self._now: Seconds = {}
        self._open: list[list[float]] = []
        self._since = (0.0, 0.0)
        self._lock = threading.Lock()

    def next_step(self) -> None:
        """The present step is over."""
        now = time.perf_counter(), time.thread_time()
        if self._now:
            whole = now[0] - self._since[0], now[1] - self._since[1]
            rest = (whole[i] - sum(part[i] for part in self._now.values()) for i in range(2))
            self.steps.append({**self._now, "rest": (next(rest), next(rest)), "step": whole})
        self._now, self._since = {}, now

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """What a `with` block takes belongs to `name`, but for what belongs to others inside it."""
        started = time.perf_counter(), time.thread_time()
        self._open.append([0.0, 0.0])
        try:
            yield
        finally:
            whole = time.perf_counter() - started[0], time.thread_time() - started[1]
            inner = self._open.pop()
            if self._open:
                self._open[-1] = [self._open[-1][0] + whole[0], self._open[-1][1] + whole[1]]
            before = self._now.get(name, (0.0, 0.0))
            self._now[name] = before[0] + whole[0] - inner[0], before[1] + whole[1] - inner[1]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time belongs to `name`."""

        def instead(*arguments: Any, **named: Any) -> Any:
            with self.during(name):
                return function(*arguments, **named)

        return instead

    def beat(self, function: Callable[[Watchdog], None], watchdog: Watchdog) -> None:
        """One heartbeat, in the watchdog's thread."""
        started = time.thread_time()
        function(watchdog)
        self.beats.append(time.thread_time() - started)

    def prepare(self, read: Callable[..., Any], *arguments: Any) -> Any:
        """`prepare_step` in a read-ahead thread: all but the reading is noise."""
        reading = 0.0

        def timed_read(positions: Any) -> Any:
            nonlocal reading
            started = time.thread_time()
            rows = read(positions)
            reading += time.thread_time() - started
            return rows

        started = time.thread_time()
        step = batches.prepare_step(timed_read, *arguments)
        with self._lock:
            self.noise.append(time.thread_time() - started - reading)
        return step


class _TimedEngine:
    """The engine, whose own work is what a step needs."""

    def __init__(self, engine: Any, ledger: Ledger) -> None:
        self._engine, self._ledger = engine, ledger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, **inputs: Any) -> Any:
        with self._ledger.during("model"):
            return self._engine(**inputs)

    def backward(self, loss: torch.Tensor, **settings: Any) -> None:
        with self._ledger.during("model"):
            self._engine.backward(loss, **settings)

    def step(self) -> None:
        with self._ledger.during("update"):
            self._engine.step()


class _TimedReadAhead:
    """The read-ahead, for which a step has to wait."""

    def __init__(self, read_ahead: Any, ledger: Ledger) -> None:
        self._read_ahead = read_ahead
        self.next = ledger.timed("rows", read_ahead.next)
        self.seek = read_ahead.seek


@contextlib.contextmanager
def instrumented(ledger: Ledger) -> Iterator[None]:
    """The trainer's parts report to `ledger`."""

    class TimedStepper(step.Stepper):
        def step(self, progress: Any) -> Any:
            ledger.next_step()
            return super().step(progress)

    def stepper(**parts: Any) -> step.Stepper:
        timed = {"engine": _TimedEngine(parts["engine"], ledger)}
        timed["read_ahead"] = _TimedReadAhead(parts["read_ahead"], ledger)  # type: ignore[assignment]
        return TimedStepper(**{**parts, **timed})

    beat = Watchdog._beat
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(run, "Stepper", stepper))
        patches.enter_context(patch.object(run, "prepare_step", ledger.prepare))
        patches.enter_context(patch.object(Watchdog, "_beat", lambda watchdog: ledger.beat(beat, watchdog)))
        for owner, name, part in (
            (step, "gather_totals", "totals"),
            (step.Stepper, "_agree", "agree"),
            (step, "gradient_norm", "judge"),
            (step.Stepper, "_judge", "judge"),
            (step, "sum_by_bucket", "by time"),
            (step, "add_by_time", "by time"),
            (UpdateMeter, "_before", "updates"),
            (UpdateMeter, "_after", "updates"),
            (StepFigures, "begin", "figures"),
            (StepFigures, "measured", "figures"),
            (step, "speed_figures", "figures"),
            (MetricsLog, "step", "sinks"),
        ):
            timed = ledger.timed(part, getattr(owner, name))
            patches.enter_context(patch.object(owner, name, timed))
        yield


def measure(size: str, data: Path, folder: Path, steps: int, threads: int, every: int | None) -> dict[str, Any]:
    """Train one size for a number of steps -> milliseconds and shares. Joins a process group: in a fresh process."""
    *model, batch = SIZES[size]
    config = load_config(
        None,
        [
            *("model.backbone=qwen3", *model, "model.num_attention_heads=4", "model.head_dim=32"),
            *(f"run.dir={folder / size}", f"data.train.0.path={data}", f"train.cpu_threads={threads}"),
            # The last step has no next one that would end it.
            *(f"train.max_steps={steps + WARMUP + 1}", f"train.global_batch_size={batch}"),
            f"train.micro_batch_size={batch}",
            *(() if every is None else (f"logging.every={every}",)),
            *("train.device=cpu", "train.precision=fp32", "zero.stage=1", "checkpoint.every=null"),
            *("guards.loss_spike=1000", "guards.grad_norm_spike=1e6", "guards.window=16", "logging.tensorboard=true"),
        ],
    )
    device = start_distributed("cpu", threads)
    ledger = Ledger()
    with instrumented(ledger), open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        run.train(config, device, None, ["benchmark"])
    result = summary(ledger.steps[WARMUP:], ledger.noise[WARMUP:], ledger.beats, threads)
    return {"logging_every": config.logging.every, **result}


def summary(steps: list[Seconds], noise: list[float], beats: list[float], threads: int) -> dict[str, Any]:
    """Milliseconds of a step by part, and what share of it is overhead, by the clock and by CPU time."""
    names = list(dict.fromkeys(name for step in steps for name in step))
    parts = {
        name: {
            kind: spread([1e3 * step.get(name, (0.0, 0.0))[i] for step in steps])
            for i, kind in enumerate(("wall", "cpu"))
        }
        for name in names
    }
    overhead = [name for name in names if name not in (*NEEDED, "step")]
    # Of all steps together: figures come in some of them only.
    wall, cpu = (
        sum(step.get(name, (0.0, 0.0))[i] for step in steps for name in overhead)
        / sum(step["step"][i] for step in steps)
        for i in range(2)
    )
    noise_share = statistics.median(noise) / statistics.median(step["step"][1] for step in steps) / threads
    # A heartbeat comes every 15 s.
    beat_share = statistics.median(beats) / 15.0
    logging = [sum(step.get(name, (0.0, 0.0))[1] for name in LOGGING) for step in steps]
    total = cpu + noise_share + beat_share
    return {
        "steps": len(steps),
        "milliseconds": parts,
        "noise_milliseconds": spread([1e3 * seconds for seconds in noise]),
        "loop_share_wall": wall,
        "loop_share_cpu": cpu,
        "noise_share": noise_share,
        "heartbeat_share": beat_share,
        "overhead_share": total,
        "logging_milliseconds": spread([1e3 * seconds for seconds in logging]),
        "logging_share_of_50_ms": statistics.fmean(logging) / LOGGED_STEP,
    }


def print_table(size: str, result: Mapping[str, Any]) -> None:
    """Median milliseconds by part, and the shares."""
    print(f"{size} step: {'wall ms':>22} {'cpu ms':>8}")
    for name, kinds in result["milliseconds"].items():
        print(f"  {name:20} {kinds['wall']['median']:12.3f} {kinds['cpu']['median']:8.3f}")
    print(f"  {'noise (threads)':20} {'':12} {result['noise_milliseconds']['median']:8.3f}")
    print(
        f"  loop {result['loop_share_cpu']:.2%} (wall {result['loop_share_wall']:.2%}), noise "
        f"{result['noise_share']:.2%}, together {result['overhead_share']:.2%} of the step; logging "
        f"{result['logging_share_of_50_ms']:.2%} of 50 ms"
    )


def main(arguments: list[str]) -> int:
    """Print a table for each size and one line of JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.trainer_overhead", description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="measured steps of each size (default 60)")
    parser.add_argument("--logging-every", type=int, help="logging.every (default: that of a configuration without it)")
    parser.add_argument("--cpu-threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--quick", action="store_true", help="three short steps: shows that it runs")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args(arguments)
    sizes = ["short"] if options.quick else list(SIZES)
    steps = 3 if options.quick else options.steps
    with tempfile.TemporaryDirectory(prefix="trainer-overhead-") as folder:
        documents = Path(__file__).resolve().parent.parent / "docs"
        results = {}
        for size in sizes:
            data = Path(folder) / f"data-{size}"
            length = int(SIZES[size][2].partition("=")[2])
            build_dataset(BuildOptions((str(documents),), str(data), "bytes", length, include=("*.md",)))
            threads, every = options.cpu_threads, options.logging_every
            results[size] = in_fresh_process(measure, size, data / "train", Path(folder), steps, threads, every)
            print_table(size, results[size])
    line = json_line(
        {
            "benchmark": "trainer_overhead",
            **describe(torch.device("cpu")),
            "sizes": results,
            "goal_met": results["long"]["overhead_share"] <= GOAL if "long" in results else None,
            "logging_goal_met": results["short"]["logging_share_of_50_ms"] < LOGGING_GOAL,
        }
    )
    print(line)
    if options.output is not None:
        options.output.write_text(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
