"""RWKV-7 on a CUDA device, ours beside flash-linear-attention: kernels, layer, training, profile, helpers.

    python -m benchmarks.gpu [--sections errors,kernel,layer,training,profile,helpers] [--output FILE]

    errors    fla's kernel at chunk 64 and 16, and what a run would use, against our fp32 kernel: outputs, states,
              gradients (the self-test of dlm_dist.kernels.wkv7)
    kernel    forward, and forward with backward, of fla's kernel (chunk 64, 16, and 64 without recomputation)
              and of our PyTorch kernel, in bf16
    layer     the whole time mix, ours, ours compiled, and fla's RWKV7Attention with the same weights
    training  tokens per second, MFU and memory of whole steps against fla's RWKV7ForCausalLM (see gpu_training)
    profile   where our step's time goes
    helpers   each step around the kernel: plain, compiled, fla's fused one (see gpu_helpers)

Systems take turns, call by call, between CUDA events, after a round of warm-up; figures are medians with minimum and
maximum. A section or candidate that fails says so in the table and in the JSON, and the others still run; the exit
status is then 1. Needs fla and Triton beside torch. About five minutes; ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_helpers import HelperSize, largest_error, measure_helpers
from benchmarks.gpu_training import ModelSize, measure_profile, measure_training
from benchmarks.machine import PeakMemory, describe, gemm_rates, spread, take_turns
from dlm_dist.kernels.wkv7 import (
    LOG_DECAY_BOUND,
    SELF_TEST_TOLERANCE,
    fla_wkv7,
    select_backend,
    self_test_errors,
    wkv7_chunked,
)
from dlm_dist.models.rwkv7_layers import TimeMix
from dlm_dist.training.metrics import json_line

REPEATS = 3
Rows = list[dict[str, Any]]
Kernel = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class KernelSize:
    """Operands [B, T, H, N]."""

    rows: int
    length: int
    heads: int
    size: int = 64

    def __str__(self) -> str:
        return f"B{self.rows} T{self.length} H{self.heads} N{self.size}"


@dataclass(frozen=True)
class LayerSize:
    """A time mix on [B, T, C]."""

    rows: int
    length: int
    width: int

    def __str__(self) -> str:
        return f"B{self.rows} T{self.length} C{self.width}"


@dataclass(frozen=True)
class Sizes:
    """What each section measures."""

    kernels: tuple[KernelSize, ...] = (KernelSize(8, 4096, 12), KernelSize(8, 4096, 32))
    layers: tuple[LayerSize, ...] = (LayerSize(8, 4096, 768), LayerSize(4, 4096, 2048))
    models: tuple[ModelSize, ...] = (ModelSize("0.1B", 768, 12, 8, 4096), ModelSize("0.4B", 1024, 24, 4, 4096))
    helpers: HelperSize = HelperSize(8, 4096, 1024)  # noqa: RUF009 - it is frozen


# --- kernels ---------------------------------------------------------------------------------------------------


def candidate_kernels(device: torch.device) -> dict[str, Kernel]:
    """The kernels by name; fla's on CUDA only."""
    ours: dict[str, Kernel] = {"ours": wkv7_chunked}
    if device.type != "cuda":
        return ours
    return {
        "fla chunk 64": partial(fla_wkv7, chunk_size=64),
        # The backward pass computes nothing of the forward pass again.
        "fla chunk 64, kept": partial(fla_wkv7, chunk_size=64, disable_recompute=True),
        "fla chunk 16": partial(fla_wkv7, chunk_size=16),
        **ours,
    }


def measure_errors(device: torch.device) -> Rows:
    """Relative errors (2-norm) against our fp32 kernel, then what a run on this device chooses and why."""
    rows: Rows = []
    for name, kernel in candidate_kernels(device).items():
        row: dict[str, Any] = {"kernel": f"{name}, bf16"}
        try:
            errors = self_test_errors(device, kernel)
        except Exception as failure:  # a compiler or launch error of one candidate
            rows.append(row | {"failed": sentence(failure)})
            continue
        worst = max(errors, key=lambda result: errors[result])
        met = errors[worst] <= SELF_TEST_TOLERANCE
        rows.append(row | {"error": errors[worst], "worst": worst, "errors": errors, "met": met})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the row says it
        backend = asdict(select_backend(device))
    chosen = f"chosen: {backend['name']}, chunk {backend['chunk_size'] or 'by length'}"
    rows.append({"kernel": chosen, "reason": backend["reason"], "backend": backend})
    return rows + [{"kernel": f"step {name}", "reason": state} for name, state in backend["helpers"].items()]


def kernel_inputs(size: KernelSize, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """r, log_w (fp32), k, v, a, b as a layer makes them, with gradients."""
    generator = torch.Generator(device).manual_seed(5)
    shape = (size.rows, size.length, size.heads, size.size)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    removed, rate = F.normalize(normal(), dim=-1), normal().sigmoid()
    log_w = LOG_DECAY_BOUND * torch.sigmoid(2.0 * normal() - 2.0)
    inputs = [normal(), log_w, normal(), normal(), -removed, removed * rate]
    return [(x if i == 1 else x.to(dtype)).requires_grad_() for i, x in enumerate(inputs)]


def measure_kernel(size: KernelSize, device: torch.device, rounds: int) -> Rows:
    """Milliseconds of the forward pass, and of forward and backward, and what the latter holds at its highest."""
    inputs = kernel_inputs(size, device, torch.bfloat16)
    d_out = torch.randn_like(inputs[3])

    def forward(kernel: Kernel) -> None:
        with torch.no_grad():
            kernel(*inputs)

    def both(kernel: Kernel) -> None:
        torch.autograd.grad(kernel(*inputs)[0], inputs, d_out)

    kernels = candidate_kernels(device)
    rows: dict[str, dict[str, Any]] = {name: {"size": str(size), "kernel": name} for name in kernels}
    for label, function in (("forward_ms", forward), ("both_ms", both)):
        passes = {name: partial(function, kernel) for name, kernel in kernels.items()}
        for name, result in in_turns(passes, device, rounds, memory=label == "both_ms").items():
            rows[name] |= {label if key == "ms" else key: value for key, value in result.items()}
    return list(rows.values())


# --- layer -----------------------------------------------------------------------------------------------------


def measure_layer(size: LayerSize, device: torch.device, rounds: int, compiled: bool = False) -> Rows:
    """Forward and backward of layer 1 of 24, bf16, gradients of the rows, v_first and all weights."""
    mix: Any = TimeMix(size.width, layer=1, num_layers=24, seed=0).to(device, torch.bfloat16)
    with torch.no_grad():
        mix.output.weight.normal_(std=size.width**-0.5)  # zeros at the start, which leaves nothing to compare
    generator = torch.Generator(device).manual_seed(6)

    def rows_of_width() -> Tensor:
        values = torch.randn(size.rows, size.length, size.width, generator=generator, device=device)
        return values.to(torch.bfloat16)

    x, v_first, d_out = rows_of_width(), rows_of_width(), rows_of_width()

    def ours(layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda rows, first: layer(rows, first)[0]

    layers: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {"ours": (mix, ours(mix))}
    if compiled:
        layers["ours, compiled"] = (mix, ours(torch.compile(mix, dynamic=False)))
    if device.type == "cuda":
        from benchmarks.fla_peer import build_peer_layer

        peer = build_peer_layer(mix, 1, 24).train()
        layers["fla"] = (peer, lambda rows, first: peer(hidden_states=rows, v_first=first)[0])

    def both(module: Any, layer: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        # Copies, because fla's mixes write a gradient over the rows that they were given.
        rows, first = x.clone().requires_grad_(), v_first.clone().requires_grad_()
        out = layer(rows.clone(), first)
        d_rows = torch.autograd.grad(out, [rows, first, *used_parameters(module)], d_out)[0]
        return out.detach(), d_rows

    passes = {name: partial(both, *layer) for name, layer in layers.items()}
    want = passes["ours"]()
    found = in_turns(passes, device, rounds, memory=True)
    table: Rows = []
    for name, result in found.items():
        row: dict[str, Any] = {"size": str(size), "layer": name} | result
        if "ms" in result and name != "ours":
            row["error"] = largest_error(passes[name](), want)
        if "ms" in result and "ms" in found.get("fla", {}):
            row["speed_over_fla"] = found["fla"]["ms"]["median"] / result["ms"]["median"]
        table.append(row)
    return table


def used_parameters(module: torch.nn.Module) -> list[Tensor]:
    """The parameters that take gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


# --- sections --------------------------------------------------------------------------------------------------


def in_turns(
    functions: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, memory: bool = False
) -> dict[str, dict[str, Any]]:
    """`ms` of each function, in turns, with `memory` its peak in GB as well; one that fails has `failed` instead.

    A timing is of REPEATS calls, so that the host is ahead of the device.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, function in functions.items():
        try:
            function()  # compiles
            results[name] = {"peak_gb": _peak_gb(function, device)} if memory else {}
        except Exception as failure:  # a compiler, launch or memory error: the others are still measured
            results[name] = {"failed": sentence(failure)}
    running = {name: _repeated(function) for name, function in functions.items() if "failed" not in results[name]}
    for name, seconds in take_turns(running, device, rounds).items():
        results[name] = {"ms": spread([1e3 * value / REPEATS for value in seconds])} | results[name]
    return results


def _repeated(function: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(REPEATS):
            function()

    return run


def _peak_gb(function: Callable[[], object], device: torch.device) -> float | None:
    """GB of one call on CUDA at its highest, over what was there before."""
    if device.type != "cuda":
        return None
    with PeakMemory(device) as memory:
        function()
    return memory.bytes / 1e9


def sentence(failure: Exception) -> str:
    """The kind and first line of an exception."""
    return " ".join([type(failure).__name__, *str(failure).strip().splitlines()[:1]])


def sections(sizes: Sizes, device: torch.device, rounds: int, steps: int, peak: float) -> dict[str, list[Callable]]:
    """The parts of each section, each giving rows. Rounds of kernels and layers, and steps of training, are timed."""
    cuda = device.type == "cuda"
    return {
        "errors": [partial(measure_errors, device)],
        "kernel": [partial(measure_kernel, size, device, rounds) for size in sizes.kernels],
        "layer": [
            # Compiling takes a minute, so one width must do.
            partial(measure_layer, size, device, rounds, compiled=cuda and size is sizes.layers[0])
            for size in sizes.layers
        ],
        "training": [partial(measure_training, size, device, steps, peak, peer=cuda) for size in sizes.models],
        "profile": [partial(measure_profile, sizes.models[0], device)],
        "helpers": [partial(measure_helpers, sizes.helpers, device, rounds, fla=cuda, compiled=cuda)],
    }


def run_section(name: str, parts: Sequence[Callable[[], Rows]]) -> dict[str, Any]:
    """Rows of all parts, what failed, and the seconds it took."""
    start = time.perf_counter()
    rows: Rows = []
    failures: list[str] = []
    for part in parts:
        print(f"  {name}, after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        try:
            rows += part()
        except Exception as failure:  # the other sections are still worth having
            failures.append(sentence(failure))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    failures += [row[key] for row in rows for key in row if key.endswith("failed")]
    return {"rows": rows, "failures": failures, "seconds": time.perf_counter() - start}


# --- the script ------------------------------------------------------------------------------------------------


def print_section(name: str, section: Mapping[str, Any]) -> None:
    """One table; columns in order of first appearance, figures as median (minimum-maximum)."""
    print(f"\n{name} ({section['seconds']:.0f} s)")
    rows = section["rows"]
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if _cell(value) is not None))
    cells = [[_cell(row.get(column)) or "" for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [columns, *cells] if rows else []:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    for failure in section["failures"]:
        print(f"  FAILED: {failure}")


def _cell(value: Any) -> str | None:
    """A value as text; None for what belongs into the JSON alone."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, dict):
        if set(value) != {"median", "min", "max"}:
            return None
        return f"{_cell(value['median'])} ({_cell(value['min'])}-{_cell(value['max'])})"
    return None if value is None else str(value)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    names = list(sections(Sizes(), torch.device("cpu"), 1, 1, 1.0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--sections", default=",".join(names), help=f"some of {','.join(names)} (default: all)")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds of kernels, layers, helpers (default: 10)")
    parser.add_argument("--steps", type=int, default=6, help="timed training steps of each system (default: 6)")
    parser.add_argument("--output", type=Path, help="also write the line of JSON to this file")
    asked = parser.parse_args(arguments)
    asked.sections = asked.sections.split(",")
    unknown = [name for name in asked.sections if name not in names]
    if unknown:
        parser.error(f"there is no section {unknown[0]!r}: choose from {', '.join(names)}")
    return asked


def measure(asked: argparse.Namespace, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """All that the command line asks for, as the object that is printed last.

    After every section the file of `--output` holds what there is so far.
    """
    rates = spread(gemm_rates(device, torch.bfloat16, 8192 if device.type == "cuda" else 512, 10))
    print(f"bf16 matrix product: {rates['max'] / 1e12:.1f} TFLOP/s", flush=True)
    parts = sections(sizes, device, asked.rounds, asked.steps, rates["max"])
    result: dict[str, Any] = {
        "benchmark": "gpu",
        **describe(device),
        "options": {"sections": asked.sections, "rounds": asked.rounds, "steps": asked.steps, "sizes": asdict(sizes)},
        "gemm_flops": rates,
        "tilelang": importlib.util.find_spec("tilelang") is not None,  # fla prefers it to Triton where it finds it
        "sections": {},
    }
    for name in asked.sections:
        section = result["sections"][name] = run_section(name, parts[name])
        print_section(name, section)
        sys.stdout.flush()
        if asked.output is not None:
            asked.output.write_text(json_line(result) + "\n", encoding="utf-8")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables and the line of JSON -> exit status."""
    asked = parse(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch finds none on this machine.", file=sys.stderr)
        return 2
    result = measure(asked, Sizes(), torch.device("cuda", torch.cuda.current_device()))
    print(json_line(result))
    return 1 if any(section["failures"] for section in result["sections"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
