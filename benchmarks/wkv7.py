"""WKV-7 in chunks beside the token loop: error against fp64, forward and backward time, growth with T.

    python -m benchmarks.wkv7 [--device cpu|cuda] [--threads N] [--rounds 7] [--quick] [--output FILE]

Three tables. Errors: `wkv7_chunked` in fp32 against `wkv7_reference` (the recurrence, token by token) in fp64, each as
the largest difference over the largest value, the worst of output, final state, six gradients and the initial
state's gradient. Besides random operands there are the cases that break careless kernels, the last of them with
gradients as small as a large batch makes them: factors reach e^{-0.61 L} in a chunk of L tokens, and what falls below
1e-38 on the way is lost. That is why the kernel never chooses 128 by itself: it loses gradients below about 1e-5
there (far larger ones where denormal numbers are flushed to zero). Time: forward and backward of the output alone,
fp32, the chunk sizes and the token loop in turns; the loop takes part in the first rounds only, since it is slow.
Growth: the default chunk at rising T. Ends with one line of JSON.

About three minutes on one core. Run it on a machine that does nothing else: threads that wait for a core which another
program has make the loop's small operations many times slower.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe, spread, take_turns
from dlm_dist.kernels.wkv7 import LOG_DECAY_BOUND
from dlm_dist.kernels.wkv7_chunked import wkv7_chunked, wkv7_reference
from dlm_dist.training.metrics import json_line

CHUNKS = (16, 32, 64, 128)
DEFAULT_CHUNK = 64
"""What the kernel itself chooses for rows of 64 tokens and more."""
RESULTS = ("out", "final_state", "d_r", "d_log_w", "d_k", "d_v", "d_a", "d_b", "d_initial_state")
HARD_CASES = (
    ("random", 1.0),
    ("maximum decay", 1.0),
    ("identical keys", 1.0),
    ("correlated keys", 1.0),
    ("maximum decay", 1e-7),
)
"""Kind of operands, and what the gradients that enter the backward pass are multiplied by."""
ERROR_GOAL = 5e-6
SPEED_GOAL = 14.0

Kernel = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """B rows of T tokens, H heads of N channels."""

    batch: int
    length: int
    heads: int
    size: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.length} H{self.heads} N{self.size}"


@dataclass(frozen=True)
class Plan:
    """What is measured. `loop_rounds` says for each of `shapes` how often the token loop is timed."""

    shapes: tuple[Shape, ...]
    loop_rounds: tuple[int, ...]
    hard: Shape
    growth: tuple[Shape, ...]


FULL = Plan(
    shapes=(Shape(4, 512, 8, 64), Shape(2, 2048, 12, 64)),
    loop_rounds=(3, 2),
    hard=Shape(1, 512, 2, 64),
    growth=tuple(Shape(1, length, 8, 64) for length in (512, 1024, 2048, 4096)),
)
QUICK = Plan(
    shapes=(Shape(2, 100, 2, 16), Shape(1, 150, 3, 16)),
    loop_rounds=(1, 1),
    hard=Shape(1, 140, 2, 16),
    growth=tuple(Shape(1, length, 2, 16) for length in (64, 128, 256)),
)
"""Shows that the script runs; its times are all overhead."""


@dataclass(frozen=True)
class Operands:
    """fp64 values that fp32 can hold: r, log_w, k, v, a, b and the initial state, then gradients for both results."""

    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, Tensor]

    @staticmethod
    def draw(kind: str, shape: Shape, device: torch.device) -> Operands:
        """As a layer makes them (a = -kk, b = kk * rate), spread over the whole range of log w, or a hard case."""
        generator = torch.Generator().manual_seed(7)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, dtype=torch.float64)

        tokens = (shape.batch, shape.length, shape.heads, shape.size)
        states = (shape.batch, shape.heads, shape.size, shape.size)
        key = F.normalize(normal(*tokens), dim=-1)
        rate = torch.rand(*tokens, generator=generator, dtype=torch.float64)
        log_w, k = LOG_DECAY_BOUND * torch.sigmoid(2.0 * normal(*tokens)), normal(*tokens)
        if kind == "maximum decay":
            log_w = torch.full_like(log_w, LOG_DECAY_BOUND)
        elif kind == "identical keys":
            key = key[:, :1].expand(tokens)
            rate, log_w, k = torch.ones_like(rate), 1e-4 * log_w, key
        elif kind == "correlated keys":
            key = F.normalize(key[:, :1] + 0.3 * key, dim=-1)
        else:
            assert kind == "random"
        drawn = (normal(*tokens), log_w, k, normal(*tokens), -key, key * rate, normal(*states))
        inputs = tuple(x.float().double().to(device) for x in drawn)
        out, state = (x.float().double().to(device) for x in (normal(*tokens), normal(*states)))
        return Operands(inputs, (out, state))

    def heads(self, start: int, end: int) -> Operands:
        """Those of heads `start` to `end`; heads do not know each other."""
        state, d_state = self.inputs[6][:, start:end], self.gradients[1][:, start:end]
        tokens = tuple(x[:, :, start:end] for x in self.inputs[:6])
        return Operands((*tokens, state), (self.gradients[0][:, :, start:end], d_state))


# --- errors ----------------------------------------------------------------------------------------------------


def results(kernel: Kernel, operands: Operands, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Tensor]:
    """Each of RESULTS from `kernel` in `dtype`; the gradients that enter are `scale` times those of `operands`."""
    leaves = [x.to(dtype).requires_grad_() for x in operands.inputs]
    out, state = kernel(*leaves)
    entering = [(scale * x).to(dtype) for x in operands.gradients]
    found = torch.autograd.grad([out, state], leaves, entering)
    return dict(zip(RESULTS, (out.detach(), state.detach(), *found), strict=True))


def reference_results(operands: Operands) -> dict[str, Tensor]:
    """RESULTS of the token loop in fp64, two heads at a time on CPU, where autograd's memory of all would not fit."""
    heads = operands.inputs[0].shape[2]
    group = heads if operands.inputs[0].is_cuda else 2
    parts = [
        results(wkv7_reference, operands.heads(start, min(start + group, heads)), torch.float64)
        for start in range(0, heads, group)
    ]
    return {name: torch.cat([part[name] for part in parts], 1 if "state" in name else 2) for name in RESULTS}


def relative_errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference over the largest value, for each result; infinite where `got` is not finite."""
    errors = {}
    for name, value in want.items():
        error = ((got[name].double() - value).abs().max() / value.abs().max()).item()
        errors[name] = error if math.isfinite(error) else math.inf
    return errors


def measure_errors(plan: Plan, device: torch.device) -> list[dict[str, Any]]:
    """One row for every case and chunk size, the fp32 token loop among them."""
    cases = [(shape, "random", 1.0) for shape in plan.shapes] + [(plan.hard, *case) for case in HARD_CASES]
    rows: list[dict[str, Any]] = []
    for shape, kind, scale in cases:
        print(f"  errors: {shape}, {kind}", file=sys.stderr, flush=True)
        operands = Operands.draw(kind, shape, device)
        want = reference_results(operands)
        want = {name: value if name in RESULTS[:2] else scale * value for name, value in want.items()}
        kernels = dict(chunk_kernels())
        if shape == plan.hard:
            kernels["token loop"] = wkv7_reference
        for name, kernel in kernels.items():
            errors = relative_errors(results(kernel, operands, torch.float32, scale), want)
            worst = max(errors, key=lambda result: errors[result])
            row = {"shape": str(shape), "operands": kind, "gradient_scale": scale, "kernel": name}
            rows.append(row | {"error": errors[worst], "worst": worst, "errors": errors})
    return rows


def chunk_kernels() -> dict[str, Kernel]:
    """The kernel at each chunk size."""
    return {f"chunk {size}": partial(wkv7_chunked, chunk_size=size) for size in CHUNKS}


# --- time ------------------------------------------------------------------------------------------------------


def training_pass(kernel: Kernel, operands: Operands) -> Callable[[], None]:
    """Forward and backward of the output in fp32, states starting at zero, as in training."""
    leaves = [x.float().requires_grad_() for x in operands.inputs[:6]]
    d_out = operands.gradients[0].float()

    def run() -> None:
        out, _ = kernel(*leaves)
        torch.autograd.grad(out, leaves, d_out)

    return run


def measure_speed(plan: Plan, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Seconds of each chunk size and of the token loop at each shape, and how many times faster than the loop."""
    rows: list[dict[str, Any]] = []
    for shape, loop_rounds in zip(plan.shapes, plan.loop_rounds, strict=True):
        print(f"  time: {shape}", file=sys.stderr, flush=True)
        operands = Operands.draw("random", shape, device)
        kernels = {**chunk_kernels(), "token loop": wkv7_reference}
        passes = {name: training_pass(kernel, operands) for name, kernel in kernels.items()}
        times = take_turns(passes, device, rounds, limits={"token loop": min(loop_rounds, rounds)})
        loop = spread(times["token loop"])["median"]
        for name, seconds in times.items():
            row = {"shape": str(shape), "kernel": name, "rounds": len(seconds), "seconds": spread(seconds)}
            rows.append(row | {"loop_ratio": spread([loop / value for value in seconds])})
    return rows


def measure_growth(plan: Plan, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds by T at the default chunk, and p of the fit seconds ~ T^p (of medians, least squares of logarithms)."""
    print("  growth with T", file=sys.stderr, flush=True)
    lengths = [shape.length for shape in plan.growth]
    kernel = partial(wkv7_chunked, chunk_size=DEFAULT_CHUNK)
    passes = {str(shape.length): training_pass(kernel, Operands.draw("random", shape, device)) for shape in plan.growth}
    times = take_turns(passes, device, rounds)
    medians = [spread(times[str(length)])["median"] for length in lengths]
    return {
        "chunk": DEFAULT_CHUNK,
        "shapes": [str(shape) for shape in plan.growth],
        "rounds": rounds,
        "seconds": {length: spread(values) for length, values in times.items()},
        "microseconds_per_token": {str(n): 1e6 * m / n for n, m in zip(lengths, medians, strict=True)},
        "exponent": fitted_exponent(lengths, medians),
    }


def fitted_exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of y = c x^p by least squares of the logarithms."""
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    covariance = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return covariance / sum((a - mean_u) ** 2 for a in u)


# --- the script ------------------------------------------------------------------------------------------------


def print_tables(
    errors: Sequence[Mapping[str, Any]], speed: Sequence[Mapping[str, Any]], growth: Mapping[str, Any]
) -> None:
    """The three tables, times as median (minimum-maximum)."""
    print("Largest error in fp32 against the fp64 token loop")
    names = list(dict.fromkeys(row["kernel"] for row in errors))
    print(f"{'shape':<18} {'operands':<16} {'gradients':>9} " + " ".join(f"{name:>10}" for name in names))
    for case in dict.fromkeys((row["shape"], row["operands"], row["gradient_scale"]) for row in errors):
        found = {
            row["kernel"]: row["error"]
            for row in errors
            if (row["shape"], row["operands"], row["gradient_scale"]) == case
        }
        cells = [f"{found[name]:>10.1e}" if name in found else f"{'':>10}" for name in names]
        print(f"{case[0]:<18} {case[1]:<16} {case[2]:>9.0e} " + " ".join(cells))
    print("\nForward and backward in fp32")
    print(f"{'shape':<18} {'kernel':<12} {'milliseconds':>28} {'rounds':>6} {'times the loop':>26}")
    for row in speed:
        ms = {key: 1e3 * value for key, value in row["seconds"].items()}
        time, ratio = _text(ms, ",.1f"), _text(row["loop_ratio"], ".1f")
        print(f"{row['shape']:<18} {row['kernel']:<12} {time:>28} {row['rounds']:>6} {ratio:>26}")
    print(f"\nGrowth with T at chunk {growth['chunk']}: {', '.join(growth['shapes'])}")
    for length, value in growth["microseconds_per_token"].items():
        print(f"  T {length:>6}: {value:8.2f} us per token")
    print(f"  time grows as T^{growth['exponent']:.3f}")


def _text(values: Mapping[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['min']:{form}}-{values['max']:{form}})"


def goals(errors: Sequence[Mapping[str, Any]], speed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was asked of the default chunk, what was found, and whether that is met; `speed` may be empty."""
    name = f"chunk {DEFAULT_CHUNK}"
    worst = max(row["error"] for row in errors if row["kernel"] == name)
    found: list[dict[str, Any]] = [
        {"goal": f"largest error at most {ERROR_GOAL:g}", "value": worst, "met": worst <= ERROR_GOAL}
    ]
    for row in speed:
        if row["kernel"] == name:
            value = row["loop_ratio"]["median"]
            text = f"{row['shape']}: at least {SPEED_GOAL:g} times a token loop"
            found.append({"goal": text, "value": value, "met": value >= SPEED_GOAL})
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on CPU (default: one per core)")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes of each kernel (default: 7)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, help="also write the line of JSON to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and the line of JSON."""
    asked = parse(arguments)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    name = asked.device if asked.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device, plan = torch.device(name), QUICK if asked.quick else FULL
    errors = measure_errors(plan, device)
    speed = measure_speed(plan, device, asked.rounds)
    growth = measure_growth(plan, device, asked.rounds)
    result = {
        "benchmark": "wkv7",
        **describe(device),
        "options": {"quick": asked.quick, "rounds": asked.rounds, "chunks": CHUNKS, "plan": asdict(plan)},
        "errors": errors,
        "speed": speed,
        "growth": growth,
        "goals": goals(errors, [] if asked.quick else speed),
    }
    print_tables(errors, speed, growth)
    print()
    for goal in result["goals"]:
        print(f"{'met' if goal['met'] else 'MISSED':<7} chunk {DEFAULT_CHUNK}, {goal['goal']}: {goal['value']:.3g}")
    line = json_line(result)
    print(line)
    if asked.output is not None:
        asked.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
