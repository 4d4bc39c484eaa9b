"""The head's loss in vocabulary blocks beside full logits: time, peak memory and error of value and gradients.

    python -m benchmarks.cross_entropy [--device cpu|cuda] [--threads N] [--rounds 5] [--size full|tiny] [--output FILE]

What a masked-diffusion step asks of its head: 8 rows of 512 positions of width 1024, in row i each position masked
with probability t_i, t spread evenly over (0, 1), masked positions weighted 1 / t_i. `full logits` is the loss as
published code has it (LLaDA's GUIDELINES.md): fp32 logits of all positions, then the cross entropy of the masked ones.
`gathered` makes fp32 logits of the masked positions only. `blocks` is ours. On CUDA `cut-cross-entropy` (Wijmans et
al. 2024) joins where it is installed, as it comes and without its filter, which leaves small gradients out; Liger's and
fla's fused losses compute their gradients in the forward pass and cannot weigh rows.

Forward and backward of each in turns, since machines are noisy: read the ratio to `full logits` within a round. Peak
memory is what value, gradients and everything between add to a fresh process that holds rows and weight already.
Errors are those of the loss and of both gradients against full logits in fp64, as the largest difference over the
largest value and as the norm of the difference over the norm. Ends with the goals, each passed or not, and one line
of JSON. `--size full` needs 10 GB and, on two cores, about ten minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import PeakMemory, describe, in_fresh_process, spread, take_turns
from dlm_dist.kernels.cross_entropy import weighted_cross_entropy_sum
from dlm_dist.training.metrics import json_line

BASE, OURS, GATHERED = "full logits", "blocks", "gathered"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MEMORY_GOAL = 1 / 8
TIME_GOALS = {"bf16": 1 / 3, "fp32": 0.75}
ERROR_GOAL = 1e-5
"""Of both gradients in fp32, both kinds of error."""


@dataclass(frozen=True)
class Size:
    """Rows of positions, the model's width, and the vocabularies."""

    rows: int
    length: int
    width: int
    vocabularies: tuple[int, ...]


SIZES = {
    "full": Size(rows=8, length=512, width=1024, vocabularies=(65_536, 151_936)),
    "tiny": Size(rows=4, length=16, width=32, vocabularies=(500, 1000)),
}
"""tiny shows that the script runs; its figures are all overhead."""


@dataclass(frozen=True)
class Case:
    """One head in one precision. Travels to the processes that measure memory."""

    size: Size
    vocabulary: int
    precision: str
    device: str
    threads: int

    def operands(self) -> Operands:
        """The same values in every process."""
        generator = torch.Generator().manual_seed(0)
        size, dtype = self.size, DTYPES[self.precision]
        positions = size.rows * size.length
        times = (torch.arange(size.rows) + torch.rand(size.rows, generator=generator)) / size.rows
        masked = torch.rand(size.rows, size.length, generator=generator) < times[:, None]
        supervised = masked.flatten().nonzero().squeeze(1)
        hidden = torch.randn(positions, size.width, generator=generator).to(dtype)
        weight = torch.empty(self.vocabulary, size.width, dtype=dtype)
        for block in weight.split(8192):  # fp32 draws of the whole weight would be memory that others use again
            block.copy_(torch.randn(block.shape, generator=generator).mul_(size.width**-0.5))
        targets = torch.randint(self.vocabulary, (len(supervised),), generator=generator)
        weights = (1.0 / times).repeat_interleave(size.length)[supervised]
        device = torch.device(self.device)
        return Operands(
            hidden.to(device).requires_grad_(),
            weight.to(device).requires_grad_(),
            *(value.to(device) for value in (supervised, targets, weights)),
        )


@dataclass(frozen=True)
class Operands:
    """`hidden` [P, C] of all positions, `weight` [V, C]; of the M supervised: index, target and weight, [M] each."""

    hidden: Tensor
    weight: Tensor
    supervised: Tensor
    targets: Tensor
    weights: Tensor


# --- the candidates, each the weighted sum of the supervised rows' losses ----------------------------------------


def _full_logits(operands: Operands) -> Tensor:
    logits = F.linear(operands.hidden, operands.weight).float()
    losses = F.cross_entropy(logits[operands.supervised], operands.targets, reduction="none")
    return (losses * operands.weights).sum()


def _gathered(operands: Operands) -> Tensor:
    logits = F.linear(operands.hidden[operands.supervised], operands.weight).float()
    losses = F.cross_entropy(logits, operands.targets, reduction="none")
    return (losses * operands.weights).sum()


def _blocks(operands: Operands) -> Tensor:
    rows = operands.hidden.index_select(0, operands.supervised)
    return weighted_cross_entropy_sum(rows, operands.weight, operands.targets, operands.weights)


def _cut_cross_entropy(operands: Operands, filter_eps: str | None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    rows = operands.hidden.index_select(0, operands.supervised)
    losses = linear_cross_entropy(rows, operands.weight, operands.targets, reduction="none", filter_eps=filter_eps)
    return (losses.float() * operands.weights).sum()


def candidates(case: Case) -> dict[str, Callable[[Operands], Tensor]]:
    """Those that run on this machine; the first is what the others are measured by."""
    found: dict[str, Callable[[Operands], Tensor]] = {BASE: _full_logits, GATHERED: _gathered, OURS: _blocks}
    # Its kernels are for half precision: in fp32 they would multiply in TF32.
    if case.device == "cuda" and case.precision == "bf16" and find_spec("cut_cross_entropy") is not None:
        found["cut-cross-entropy"] = partial(_cut_cross_entropy, filter_eps="high")
        found["cut-ce unfiltered"] = partial(_cut_cross_entropy, filter_eps=None)
    return found


# --- what is measured --------------------------------------------------------------------------------------------


def _step(loss: Callable[[Operands], Tensor], operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of all positions and of the weight."""
    total = loss(operands)
    grad_hidden, grad_weight = torch.autograd.grad(total, (operands.hidden, operands.weight))
    return total.detach(), grad_hidden, grad_weight


def peak_memory(case: Case, name: str) -> int:
    """Bytes that one step of the candidate adds to this process, which is to be a fresh one, at its highest."""
    device = torch.device(case.device)
    if device.type == "cpu":
        torch.set_num_threads(case.threads)
    loss = candidates(case)[name]
    small = Case(SIZES["tiny"], SIZES["tiny"].vocabularies[0], case.precision, case.device, case.threads)
    _step(loss, small.operands())  # what libraries keep for themselves is no part of the growth
    operands = case.operands()
    with PeakMemory(device) as memory:
        _step(loss, operands)
    return memory.bytes


def reference(operands: Operands, chunk: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients from full logits in fp64, so many rows at a time."""
    weight = operands.weight.detach().double()
    total = weight.new_zeros(())
    grad_hidden, grad_weight = torch.zeros_like(operands.hidden, dtype=torch.float64), torch.zeros_like(weight)
    for index, targets, weights in zip(
        operands.supervised.split(chunk), operands.targets.split(chunk), operands.weights.split(chunk), strict=True
    ):
        rows = operands.hidden.detach()[index].double()
        logits = rows @ weight.t()
        lse = logits.logsumexp(dim=1)
        losses = lse - logits.gather(1, targets[:, None]).squeeze(1)
        total += (losses * weights).sum()
        grad_logits = logits.sub_(lse[:, None]).exp_()
        grad_logits[torch.arange(len(targets), device=targets.device), targets] -= 1.0
        grad_logits.mul_(weights[:, None])
        grad_hidden[index] = grad_logits @ weight
        grad_weight.addmm_(grad_logits.t(), rows)
    return total, grad_hidden, grad_weight


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """Of loss and both gradients: largest difference over largest value, and norm over norm."""
    result = {}
    for name, value, exact in zip(("loss", "d_hidden", "d_weight"), found, expected, strict=True):
        difference = value.double() - exact
        result[name] = {
            "largest": float(difference.abs().max() / exact.abs().max()),
            "norm": float(difference.norm() / exact.norm()),
        }
    return result


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """A row of figures for each candidate."""
    print(f"  {case.precision}, {case.vocabulary} ids", file=sys.stderr, flush=True)
    losses = candidates(case)
    operands = case.operands()
    functions = {name: partial(_step, loss, operands) for name, loss in losses.items()}
    times = take_turns(functions, torch.device(case.device), rounds)
    exact = reference(operands)
    found = {name: errors(function(), exact) for name, function in functions.items()}
    supervised = len(operands.supervised)
    del functions, operands, exact
    peaks = {name: in_fresh_process(peak_memory, case, name) for name in losses}
    return [
        {
            "candidate": name,
            "precision": case.precision,
            "vocabulary": case.vocabulary,
            "supervised_rows": supervised,
            "rounds": rounds,
            "seconds": spread(times[name]),
            "time_ratio": spread([own / base for own, base in zip(times[name], times[BASE], strict=True)]),
            "peak_memory_bytes": peaks[name],
            "memory_ratio": peaks[name] / peaks[BASE],
            "errors": found[name],
        }
        for name in losses
    ]


def goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What ours has to reach, and whether it does: medians of the ratios within a round."""
    result = []
    for row in rows:
        if row["candidate"] != OURS:
            continue
        precision, name = row["precision"], f"{row['precision']}, {row['vocabulary']} ids: "
        reached = {"time / full logits": (row["time_ratio"]["median"], TIME_GOALS[precision])}
        if precision == "bf16":
            reached["peak memory / full logits"] = (row["memory_ratio"], MEMORY_GOAL)
        else:
            worst = max(max(row["errors"][gradient].values()) for gradient in ("d_hidden", "d_weight"))
            reached["error of the gradients"] = (worst, ERROR_GOAL)
        result += [
            {"goal": name + what, "value": value, "at_most": limit, "passed": value <= limit}
            for what, (value, limit) in reached.items()
        ]
    return result


def fastest(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Which candidate took the least time, by case."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        case = f"{row['precision']}, {row['vocabulary']} ids"
        if case not in best or row["seconds"]["median"] < best[case]["seconds"]["median"]:
            best[case] = row
    return {case: str(row["candidate"]) for case, row in best.items()}


# --- the script --------------------------------------------------------------------------------------------------

_COLUMNS = "{:<5} {:>7} {:<18} {:>21} {:>19} {:>8} {:>7} {:>9} {:>9} {:>9}"


def print_tables(rows: Sequence[Mapping[str, Any]], reached: Sequence[Mapping[str, Any]]) -> None:
    """Medians with minimum and maximum, errors by largest value; then the goals."""
    head = ("", "vocab", "candidate", "seconds", "time / full", "peak GB", "/ full", "loss", "d_hidden", "d_weight")
    print(_COLUMNS.format(*head))
    for row in rows:
        print(
            _COLUMNS.format(
                row["precision"],
                row["vocabulary"],
                row["candidate"],
                _text(row["seconds"]),
                _text(row["time_ratio"]),
                f"{row['peak_memory_bytes'] / 1e9:.3f}",
                f"{row['memory_ratio']:.3f}",
                *(f"{row['errors'][name]['largest']:.1e}" for name in ("loss", "d_hidden", "d_weight")),
            )
        )
    for goal in reached:
        verdict = "pass" if goal["passed"] else "FAIL"
        print(f"{verdict}  {goal['goal']}: {goal['value']:.3g}, at most {goal['at_most']:.3g}")


def _text(values: Mapping[str, float]) -> str:
    return f"{values['median']:.3f} ({values['min']:.3f}-{values['max']:.3f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables and goals, and the line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each candidate (default: 5)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on CPU (default: one per core)")
    parser.add_argument("--output", type=Path, help="also write the line of JSON to this file")
    asked = parser.parse_args(arguments)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if asked.device == "auto" else asked.device
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    size = SIZES[asked.size]
    rows: list[dict[str, Any]] = []
    for precision in asked.precisions:
        for vocabulary in size.vocabularies:
            rows += measure(Case(size, vocabulary, precision, name, torch.get_num_threads()), asked.rounds)
    reached = goals(rows)
    print_tables(rows, reached)
    line = json_line(
        {
            "benchmark": "cross_entropy",
            **describe(torch.device(name)),
            "size": asdict(size),
            "rows": rows,
            "goals": reached,
            "fastest": fastest(rows),
        }
    )
    print(line)
    if asked.output is not None:
        asked.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
