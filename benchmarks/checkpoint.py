"""Saving and loading a checkpoint beside what the disk can do, torch.save and torch.distributed.checkpoint.

    python -m benchmarks.checkpoint [--megabytes 1024] [--rounds 5] [--threads N] [--folder DIR] [--quick]
                                    [--output FILE]

One rank, fp32 tensors in host memory, everything durable (fsync) when its time ends. In turns, each on a disk that has
nothing left to write: raw write() and fsync of the same bytes, also past the page cache (O_DIRECT, one thread); one
SHA-256 of them in memory, below which no save that hashes one file can come; ours, which hashes every file, writes the
manifest and renames; torch.save and fsync; torch.distributed.checkpoint (its default: one thread, fsync). Then
asynchronous: what the training loop waits for (`stall`: for ours the copy, the start, and both agreements at borders
between steps), and how long the save takes in all, beside one copy of the state into memory that is used again. Then
loading from files that are in memory already: ours as the check of every byte (`verify`) and the reading, and the
others, which check none. Ratios are medians over the rounds, within each round. Goals: ours at least 0.9 of the rate of
raw write and fsync, its stall at most 1.5 copies. Ends with one line of JSON.

Needs three times the megabytes on the disk of --folder and in memory. Run it on a machine that does nothing else: the
hash needs a core of its own.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor

from benchmarks.machine import describe, spread
from dlm_dist.training.checkpoint_files import TRAINER_STATE, verify
from dlm_dist.training.checkpoint_snapshot import HostBuffers, Snapshot
from dlm_dist.training.checkpoint_writer import CheckpointWriter
from dlm_dist.training.durable_files import file_sha256
from dlm_dist.training.metrics import json_line
from dlm_dist.training.phases import Stopwatch
from dlm_dist.training.safetensors_files import state_files

TENSORS = 64
CHUNK = 2**26
SAVE_GOAL = 0.9
STALL_GOAL = 1.5

Times = dict[str, float]
Case = Callable[[Path], Times]


class Bench:
    """The cases. Each works in a folder of its own and returns seconds by name."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = dict(state)
        self.target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        self.buffers = HostBuffers()

    def raw(self, folder: Path) -> Times:
        """write() in chunks of 64 MiB, then fsync."""
        with Stopwatch() as clock, open(folder / "raw", "wb", buffering=0) as file:
            for tensor in self.state.values():
                view = memoryview(tensor.numpy()).cast("B")
                for start in range(0, len(view), CHUNK):
                    file.write(view[start : start + CHUNK])
            os.fsync(file.fileno())
        return {"raw write + fsync": clock.seconds}

    def raw_direct(self, folder: Path) -> Times:
        """The same past the page cache, from one aligned buffer that is filled again and again; the disk alone."""
        space = mmap.mmap(-1, CHUNK)
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.state.values())
        with Stopwatch() as clock, open(folder / "raw", "wb", buffering=0) as file:
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
            for _ in range(0, size, CHUNK):
                file.write(space)
            os.fsync(file.fileno())
        return {"raw O_DIRECT + fsync": clock.seconds * size / (-(-size // CHUNK) * CHUNK)}

    def sha256(self, folder: Path) -> Times:
        """One hash of the state where it lies in memory."""
        digest = hashlib.sha256()
        with Stopwatch() as clock:
            for tensor in self.state.values():
                digest.update(tensor.numpy().data)
        return {"SHA-256 alone": clock.seconds}

    def ours(self, folder: Path) -> Times:
        """Synchronous: the tensors as they are, written, hashed, published."""
        writer = CheckpointWriter(folder)
        with Stopwatch() as clock:
            writer.start(self._snapshot(self.state))
            writer.finish()
        writer.close()
        _into_memory(folder)
        with Stopwatch() as check:
            assert verify(folder / "step-1") == []
        with Stopwatch() as load:
            for path in (folder / "step-1" / "tensors").glob("*.safetensors"):
                with safe_open(path, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - not a mapping
                        self.target[name].copy_(tensors.get_tensor(name))
        self._check()
        return {"ours": clock.seconds, "verify ours": check.seconds, "read ours": load.seconds}

    def ours_asynchronous(self, folder: Path) -> Times:
        """What a loop waits for, and the time until all ranks know that the checkpoint is published."""
        writer = CheckpointWriter(folder)
        stall = 0.0
        with Stopwatch() as total:
            with Stopwatch() as copied:
                writer.start(self._snapshot({name: self.buffers.copy(name, x) for name, x in self.state.items()}))
            stall += copied.seconds
            for _ in range(2):
                while not writer.ready():
                    time.sleep(0.001)
                with Stopwatch() as agreed:
                    writer.advance()
                stall += agreed.seconds
        writer.close()
        assert (folder / "step-1").is_dir()
        return {"ours async stall": stall, "ours async total": total.seconds}

    def torch_save(self, folder: Path) -> Times:
        """torch.save into a file, then fsync."""
        with Stopwatch() as clock, open(folder / "state.pt", "wb") as file:
            torch.save(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        _into_memory(folder)
        with Stopwatch() as load:
            for name, tensor in torch.load(folder / "state.pt", weights_only=True).items():
                self.target[name].copy_(tensor)
        self._check()
        return {"torch.save + fsync": clock.seconds, "load torch": load.seconds}

    def dcp(self, folder: Path) -> Times:
        """torch.distributed.checkpoint with its defaults."""
        with Stopwatch() as clock:
            dcp.save(self.state, checkpoint_id=folder / "dcp")
        _into_memory(folder)
        with Stopwatch() as load:
            dcp.load(self.target, checkpoint_id=folder / "dcp")
        self._check()
        return {"DCP": clock.seconds, "load DCP": load.seconds}

    def dcp_asynchronous(self, folder: Path) -> Times:
        """Its async_save: until the call returns, and until the result is there."""
        with Stopwatch() as total:
            with Stopwatch() as stall:
                future = dcp.async_save(self.state, checkpoint_id=folder / "dcp")
            future.result()
        return {"DCP async stall": stall.seconds, "DCP async total": total.seconds}

    def copy(self, folder: Path) -> Times:
        """One copy of the state into memory that is there already."""
        with Stopwatch() as clock:
            for name, tensor in self.state.items():
                self.target[name].copy_(tensor)
        return {"copy": clock.seconds}

    def _snapshot(self, tensors: dict[str, Tensor]) -> Snapshot:
        return Snapshot(1, state_files(0, tensors), {TRAINER_STATE: b"{}"})

    def _check(self) -> None:
        """What was loaded is what was saved; forgotten for the next case."""
        for name, target in self.target.items():
            assert torch.equal(target, self.state[name]), name
            target.zero_()


def _into_memory(folder: Path) -> None:
    """Read every file once, so that loading is measured from the page cache: what ours writes goes past it."""
    for file in folder.rglob("*"):
        if file.is_file():
            file_sha256(file)


def measure(bench: Bench, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds by name, one value a round; a first round warms up; who comes first moves on by one each round."""
    cases: list[Case] = [bench.raw, bench.ours, bench.torch_save, bench.dcp, bench.raw_direct, bench.sha256]
    cases += [bench.copy, bench.ours_asynchronous, bench.dcp_asynchronous]
    found: dict[str, list[float]] = {}
    for number in range(-1, rounds):
        for place in range(len(cases)):
            case = cases[(number + place) % len(cases)]
            own = Path(tempfile.mkdtemp(dir=folder))
            os.sync()
            for name, seconds in case(own).items():
                found.setdefault(name, [])
                if number >= 0:
                    found[name].append(seconds)
            shutil.rmtree(own)
    return found


def summary(times: Mapping[str, list[float]], size: int) -> dict[str, object]:
    """Rates in GB/s, the ratios, and whether the goals are met."""
    rates = {name: spread([size / 1e9 / seconds for seconds in values]) for name, values in times.items()}
    seconds = {name: spread(values) for name, values in times.items()}
    over_raw = _ratio(times["raw write + fsync"], times["ours"])
    over_copy = _ratio(times["ours async stall"], times["copy"])
    load = [check + read for check, read in zip(times["verify ours"], times["read ours"], strict=True)]
    return {
        "bytes": size,
        "seconds": seconds,
        "gigabytes_per_second": rates,
        "save_over_raw": over_raw,
        "save_goal_met": over_raw >= SAVE_GOAL,
        "stall_in_copies": over_copy,
        "dcp_stall_in_copies": _ratio(times["DCP async stall"], times["copy"]),
        "torch_save_over_raw": _ratio(times["raw write + fsync"], times["torch.save + fsync"]),
        "dcp_save_over_raw": _ratio(times["raw write + fsync"], times["DCP"]),
        "load_over_torch": _ratio(times["load torch"], load),
        "load_over_dcp": _ratio(times["load DCP"], load),
        "stall_goal_met": over_copy <= STALL_GOAL,
    }


def _ratio(above: list[float], below: list[float]) -> float:
    """Median over the rounds: both were measured under the same noise of the machine."""
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


def print_table(result: Mapping[str, object]) -> None:
    """Median, least and most of each."""
    seconds, rates = result["seconds"], result["gigabytes_per_second"]
    assert isinstance(seconds, dict)
    assert isinstance(rates, dict)
    print(f"{'':20} {'seconds':>8} {'min':>8} {'max':>8} {'GB/s':>8}")
    for name, values in seconds.items():
        cells = " ".join(f"{values[key]:8.3f}" for key in ("median", "min", "max"))
        print(f"{name:20} {cells} {rates[name]['median']:8.2f}")
    print(f"ours saves at {result['save_over_raw']:.2f} of raw write + fsync (goal: at least {SAVE_GOAL})", end="; ")
    print(f"torch.save at {result['torch_save_over_raw']:.2f}, DCP at {result['dcp_save_over_raw']:.2f}")
    print(f"ours stalls for {result['stall_in_copies']:.2f} copies (goal: at most {STALL_GOAL})", end="; ")
    print(f"DCP for {result['dcp_stall_in_copies']:.2f}")
    print(f"ours checks and reads at {result['load_over_torch']:.2f} of torch.load", end=", ")
    print(f"{result['load_over_dcp']:.2f} of DCP, which check nothing")


def main(arguments: list[str]) -> int:
    """Print the table and one line of JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the state (default 1024)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk that is measured (default: here)")
    parser.add_argument("--quick", action="store_true", help="8 MB, one round: shows that it runs")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.megabytes, options.rounds = 8, 1
    own_group = not dist.is_initialized()
    if own_group:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    each = options.megabytes * 10**6 // (4 * TENSORS)
    state = {f"tensor-{i}": torch.randn(each, generator=torch.Generator().manual_seed(i)) for i in range(TENSORS)}
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=options.folder))
    try:
        times = measure(Bench(state), folder, options.rounds)
    finally:
        shutil.rmtree(folder)
        if own_group:
            dist.destroy_process_group()
    result = summary(times, 4 * each * TENSORS)
    print_table(result)
    line = json_line({"benchmark": "checkpoint", **describe(torch.device("cpu")), "rounds": options.rounds, **result})
    print(line)
    if options.output is not None:
        options.output.write_text(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
