"""The ranks of one node: `srun --ntasks-per-node=1 python -m launcher.node PROGRAM [ARGUMENT ...]`.

Starts one process per rank, each on its share of the node's cores and with a log of its own, and records the node's
environment and how each rank ended. When a rank fails, the others get a few seconds to say why they end as well. The
exit status is 0 where all ranks finished, or stopped early with a checkpoint: the record tells them apart.

Environment: RANKS_PER_NODE (default: SLURM_GPUS_ON_NODE, or 1), CPU_BIND (`none`: ranks are not bound),
MASTER_ADDR, MASTER_PORT (default: the first node, and a port from the job's number), DLM_LOG_DIR (default: logs).
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.slurm import meeting_point, this_host

_RECORDED = re.compile(r"(SLURM|NCCL|GLOO|UCX|FI|CUDA|OMP|MASTER|TORCH|DS|DLM|RANKS|CPU)_\w+|PATH|LD_LIBRARY_PATH")
"""Environment variables that decide how a run runs. No others: they may hold secrets."""

GRACE_SECONDS = 10.0
"""How long the other ranks, here and on other nodes, may take to fail by themselves and say why."""

_STOPPED_EARLY = 75

_ALRIGHT = (0, _STOPPED_EARLY)
"""Exit statuses of ranks that ended together: finished, or stopped early with a checkpoint."""

_SYSTEM = Path("/sys/devices/system")


@dataclass(frozen=True)
class Place:
    """This node among the nodes of the run."""

    name: str
    index: int
    nodes: int
    ranks: int
    """Per node."""

    @staticmethod
    def here(environment: Mapping[str, str]) -> Place:
        """ValueError where RANKS_PER_NODE is no number of ranks."""
        ranks = environment.get("RANKS_PER_NODE") or environment.get("SLURM_GPUS_ON_NODE") or "1"
        if not ranks.isdecimal() or int(ranks) == 0:
            raise ValueError(f"RANKS_PER_NODE is {ranks!r}: expected a number from 1")
        nodes = environment.get("SLURM_STEP_NUM_NODES", "1")
        return Place(this_host(), int(environment.get("SLURM_NODEID", "0")), int(nodes), int(ranks))


@dataclass
class Rank:
    """A rank that was started."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path


def cores_by_place(allowed: set[int], system: Path = _SYSTEM) -> list[list[int]]:
    """The cores that hold the `allowed` CPUs, those of a NUMA node side by side; a core is a list of its CPUs."""
    cores: dict[tuple[int, int], list[int]] = {}
    for cpu in sorted(allowed):
        folder = system / "cpu" / f"cpu{cpu}"
        numa = [int(path.name[4:]) for path in folder.glob("node*") if path.name[4:].isdecimal()]
        siblings = folder / "topology" / "thread_siblings_list"
        first = re.match(r"\d+", siblings.read_text()) if siblings.exists() else None
        cores.setdefault((min(numa, default=0), int(first.group()) if first else cpu), []).append(cpu)
    return [cores[key] for key in sorted(cores)]


def shares(cores: Sequence[Sequence[int]], parts: int) -> list[set[int]] | None:
    """Whole neighbouring cores for each of `parts` ranks; None where there are fewer cores than ranks."""
    if len(cores) < parts:
        return None
    cuts = [len(cores) * i // parts for i in range(parts + 1)]
    return [{cpu for core in cores[start:end] for cpu in core} for start, end in itertools.pairwise(cuts)]


def main(program: Sequence[str]) -> int:
    """Run the ranks of this node to their end -> 0, 75 (all stopped early), or the status of the first that failed."""
    place = Place.here(os.environ)
    if "SLURM_JOB_NODELIST" in os.environ:
        meeting_point(os.environ)
    folder = Path(os.environ.get("DLM_LOG_DIR", "logs"))
    folder.mkdir(parents=True, exist_ok=True)
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        # SLURM signals every process of a step; the ranks know what to do.
        signal.signal(number, lambda number, _: signals.append(number))
    # At once: who leaves no record is taken for a node on which nothing starts.
    _write(folder, {"node": place.name, "status": None, "told": ""})
    record = _record(place)
    _write(folder, record)
    ranks = _start(place, program, folder)
    _warn_of_loopback(place)
    status, last_words = _wait(ranks, place, folder, record, signals)
    if last_words:
        print(f"node {place.name}: {last_words}", file=sys.stderr, flush=True)
    return status


def _start(place: Place, program: Sequence[str], folder: Path) -> list[Rank]:
    allowed = os.sched_getaffinity(0)
    cores = cores_by_place(allowed)
    bound = None if os.environ.get("CPU_BIND") == "none" else shares(cores, place.ranks)
    if bound is None and len(cores) < place.ranks:
        print(
            f"node {place.name}: warning: {place.ranks} ranks share {len(cores)} cores, and will be slow: ask for "
            "more (sbatch --exclusive, or --cpus-per-task)",
            file=sys.stderr,
            flush=True,
        )
    ranks = []
    # A signal that comes while a rank still imports its libraries waits (training/stop_requests.py).
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    for local in range(place.ranks):
        number = place.index * place.ranks + local
        world = place.nodes * place.ranks
        variables = {"RANK": str(number), "LOCAL_RANK": str(local), "WORLD_SIZE": str(world), "PYTHONUNBUFFERED": "1"}
        if bound is None:
            # A bound rank must not divide its cores once more (training/distributed.threads_per_rank).
            variables["LOCAL_WORLD_SIZE"] = str(place.ranks)
        else:
            os.sched_setaffinity(0, bound[local])
        log = folder / f"rank-{number:05d}.{place.name}.log"
        with open(log, "ab") as output:
            # On the console too: what rank 0 says.
            pipe = subprocess.PIPE if number == 0 else output
            process = subprocess.Popen(
                [sys.executable, *program], stdout=pipe, stderr=subprocess.STDOUT, env={**os.environ, **variables}
            )
        ranks.append(Rank(number, process, log))
        if number == 0:
            threading.Thread(target=_copy, args=(ranks[-1],), daemon=True).start()
    os.sched_setaffinity(0, allowed)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    return ranks


def _copy(rank: Rank) -> None:
    assert rank.process.stdout is not None
    with open(rank.log, "ab", buffering=0) as log:
        for line in rank.process.stdout:
            log.write(line)
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


def _wait(
    ranks: Sequence[Rank], place: Place, folder: Path, record: dict[str, Any], signals: Sequence[int]
) -> tuple[int, str]:
    """-> (status of the node, what the first rank that failed said); `signals` are those that this process has got.

    A rank that one of these ended has not failed.
    """
    first: Rank | None = None
    deadline = None
    while True:
        running = [rank for rank in ranks if rank.process.poll() is None]
        from_outside = [-number for number in signals]
        failed = [rank for rank in ranks if rank.process.returncode not in (None, *_ALRIGHT, *from_outside)]
        if failed and first is None:
            first, deadline = failed[0], time.monotonic() + GRACE_SECONDS
            record = record | {"failed": time.time()}
            # At once: who is ended from outside now must have said what failed.
            _write(folder, record | {"status": _status(first.process.returncode), "told": _last_lines(first.log)})
        if deadline is None or (not running and place.nodes == 1):
            if not running:
                break
        elif time.monotonic() > deadline:
            for rank in running:
                rank.process.kill()
            break
        time.sleep(0.1)
    codes = {rank.number: _status(rank.process.wait()) for rank in ranks}
    time.sleep(0.2)  # for the last lines on the console
    ended = {"ended": _now(), "ranks": codes}
    if first is None:
        status = max(codes.values())
        _write(folder, record | ended | {"status": status if status in _ALRIGHT else None})
        return status, ""
    told = _last_lines(first.log)
    status = _status(first.process.returncode)
    _write(folder, record | ended | {"status": status, "told": told})
    return status, f"rank {first.number} ended with status {status}; the end of {first.log}:\n{told}"


def _status(code: int) -> int:
    """As a shell has it: 128 + N for an end by signal N."""
    return code if code >= 0 else 128 - code


def _last_lines(log: Path, count: int = 20) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _record(place: Place) -> dict[str, Any]:
    gpus: list[str] = []
    if shutil.which("nvidia-smi") is not None:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
        gpus = listed.stdout.splitlines()
    return {
        "node": place.name,
        "index": place.index,
        "status": None,
        "told": "",
        "started": _now(),
        "system": platform.platform(),
        "python": sys.executable,
        "cpus": sorted(os.sched_getaffinity(0)),
        "gpus": gpus,
        "environment": {name: value for name, value in sorted(os.environ.items()) if _RECORDED.fullmatch(name)},
    }


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    path = folder / f"node-{record['node']}.json"
    path.with_suffix(".tmp").write_text(json.dumps(record, indent=2), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def _warn_of_loopback(place: Place) -> None:
    """Ranks on a CPU meet at the address of their host's name, unless GLOO_SOCKET_IFNAME names an interface."""
    if place.nodes == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError as error:
        address = f"unknown ({error})"
    if address.startswith("127.") or address.startswith("unknown"):
        print(
            f"node {place.name}: warning: the address of {socket.gethostname()} is {address}: other nodes cannot reach "
            "gloo there; name the interface between the nodes with GLOO_SOCKET_IFNAME",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        # No failure to srun, which would end the launchers of other nodes while they still close their files.
        sys.exit(0 if status == _STOPPED_EARLY else status)
    except (ValueError, OSError) as error:
        sys.exit(f"launcher.node: error: {error}")
