"""What a figure was measured on: hardware, versions, commit, and the rate of a large matrix product."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from dlm_dist.training.phases import Stopwatch
from dlm_dist.training.records import git_commit, versions

T = TypeVar("T")


def describe(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to repeat a figure."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": git_commit(),
        "versions": versions(),
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.release()}",
        },
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: between two events on CUDA, on the clock elsewhere."""
    if device.type != "cuda":
        with Stopwatch() as watch:
            function()
        return watch.seconds
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def take_turns(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warmup: int = 1,
    limits: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds of one call of every function per round; who comes first moves on by one each round.

    A function named in `limits` takes part in that many of the timed rounds only, and in no round of warm-up.
    """
    limits = limits or {}
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if name in limits and not 0 <= number < limits[name]:
                continue
            seconds = timed(functions[name], device)
            if number >= 0:
                times[name].append(seconds)
    return times


def gemm_rates(device: torch.device, dtype: torch.dtype, size: int, tries: int) -> list[float]:
    """FLOP/s of products of two `size` x `size` matrices, one value for each try."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    torch.mm(a, b)
    rates = []
    for _ in range(tries):
        synchronize(device)
        with Stopwatch() as watch:
            torch.mm(a, b)
            synchronize(device)
        rates.append(2.0 * size**3 / watch.seconds)
    return rates


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """What `function(*arguments)` returns when a new process calls it. Both travel there by pickling.

    Raises RuntimeError when the process fails; its error is printed by then.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_call, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return cast(T, receiver.recv())
    except EOFError:
        raise RuntimeError(f"the process that ran {function.__name__} on {arguments} failed") from None
    finally:
        process.join()


def _call(sender: Any, function: Callable[..., object], arguments: Sequence[Any]) -> None:
    sender.send(function(*arguments))


class PeakMemory:
    """Growth of this process's memory in a `with` block, at its highest: resident on CPU, allocated on CUDA.

    Reads /proc on CPU and so needs Linux there. Meant for a fresh process (`in_fresh_process`): memory that an
    earlier part of the process gave back to the allocator would be used again without being seen.
    """

    bytes = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = _status_bytes("VmRSS")
        self.forget_peak()
        return self

    def forget_peak(self) -> None:
        """Count only what comes from here on, still from the same base."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5)

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self.bytes = _status_bytes("VmHWM") - self._before


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
