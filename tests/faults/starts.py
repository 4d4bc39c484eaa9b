"""Starts of a run that a test may kill: forked from a process that has imported everything, or by a real launcher.

A start of `launcher/pretrain.py` spends four fifths of its time on imports. A campaign of hundreds of starts forks them
from a server (multiprocessing's forkserver) that has done these once; what runs from there on is the program, one
process per rank, found by each other through the environment that launchers set. A share of the starts is the real
thing all the same: `python launcher/pretrain.py`, or `deepspeed launcher/pretrain.py` with its processes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.distributed import runs

CONFIG = runs.REPOSITORY / "tests" / "distributed" / "tiny.yaml"
END_SECONDS = 600.0
"""By then a start has come to any moment, and what was killed, or lost contact, is gone; on the busiest machine."""

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.faults.preload"])


class Start(ABC):
    """One start of a run: its processes form one process group; output goes to `log`."""

    def __init__(self, arguments: Sequence[str], resume: str | None, log: Path, **environment: str) -> None:
        self.log = log
        self.arguments = ["--config", str(CONFIG), *(["--resume", resume] if resume else []), *arguments]
        self.environment = {**runs.environment(1), **environment}

    @property
    @abstractmethod
    def group(self) -> int:
        """The process group of all ranks."""

    @abstractmethod
    def running(self) -> bool:
        """Whether any process of it is there."""

    @abstractmethod
    def statuses(self) -> list[int]:
        """Exit statuses once it has ended: of every rank, or of the launcher; a signal's is negative."""

    @abstractmethod
    def rank_process(self, rank: int) -> int | None:
        """The process of `rank`; None before it is started."""

    def kill(self) -> None:
        """SIGKILL to all processes at once."""
        with contextlib.suppress(ProcessLookupError):  # it may have come to its end by itself
            os.killpg(self.group, signal.SIGKILL)

    def kill_rank(self, rank: int) -> bool:
        """SIGKILL to one rank alone -> whether it was there."""
        process = self.rank_process(rank)
        if process is None:
            return False
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def wait(self, seconds: float = END_SECONDS) -> list[int]:
        """Wait for the end of all processes -> `statuses`; fails the test where they outlive `seconds`."""
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {seconds} s: {self.output()[-4000:]}")
            time.sleep(0.005)
        return self.statuses()

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class ForkedStart(Start):
    """Ranks forked from the server."""

    def __init__(
        self,
        arguments: Sequence[str],
        resume: str | None,
        log: Path,
        ranks: int = 1,
        prepare: Callable[[], None] | None = None,
        **environment: str,
    ) -> None:
        super().__init__(arguments, resume, log, **environment)
        port = str(runs.free_port())
        self._ranks = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            mine = self.environment | {name: str(value) for name, value in place.items()}
            if ranks > 1:
                mine |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            group = self._ranks[0].pid if self._ranks else 0
            process = _FORKS.Process(target=_run, args=(self.arguments, mine, str(log), group, prepare))
            process.start()
            self._ranks.append(process)

    @property
    def group(self) -> int:
        pid = self._ranks[0].pid
        assert pid is not None
        return pid

    def running(self) -> bool:
        return any(process.is_alive() for process in self._ranks)

    def statuses(self) -> list[int]:
        return [process.exitcode if process.exitcode is not None else 0 for process in self._ranks]

    def rank_process(self, rank: int) -> int | None:
        return self._ranks[rank].pid if self._ranks[rank].is_alive() else None

    def kill(self) -> None:
        super().kill()
        for process in self._ranks:  # one that has not joined the group yet
            process.kill()


def _run(
    arguments: list[str], environment: dict[str, str], log: str, group: int, prepare: Callable[[], None] | None
) -> None:
    """A rank, from the fork on: what `python launcher/pretrain.py` does."""
    deadline = time.monotonic() + 10
    while True:
        try:
            os.setpgid(0, group)
            break
        except PermissionError:  # the leader has not founded it yet, or is dead already
            if time.monotonic() > deadline:
                os._exit(1)
            time.sleep(0.001)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    program = str(runs.REPOSITORY / "launcher" / "pretrain.py")
    sys.argv = [program, *arguments]
    import traceback

    from launcher.pretrain import main

    try:
        if prepare is not None:
            prepare()
        status = main(arguments)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class LaunchedStart(Start):
    """`python launcher/pretrain.py` for one rank, `deepspeed launcher/pretrain.py` for several."""

    def __init__(
        self, arguments: Sequence[str], resume: str | None, log: Path, ranks: int = 1, **environment: str
    ) -> None:
        super().__init__(arguments, resume, log, **environment)
        self._single = ranks == 1
        program = [str(runs.REPOSITORY / "launcher" / "pretrain.py"), *self.arguments]
        command = [sys.executable, *program] if self._single else runs.command(arguments, ranks, resume)
        with open(log, "w") as output:
            self._process = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def group(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        if self._process.poll() is None:
            return True
        # What has ended stays in the group until its parent looks, which in a container may be never.
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                if os.getpgid(process.pid) == self.group and process.status() != psutil.STATUS_ZOMBIE:
                    return True
        return False

    def statuses(self) -> list[int]:
        return [self._process.wait()]

    def rank_process(self, rank: int) -> int | None:
        if self._single:
            return self._process.pid if self._process.poll() is None else None
        try:
            for child in psutil.Process(self._process.pid).children(recursive=True):
                line = child.cmdline()
                if f"--local_rank={rank}" in line and any(part.endswith("pretrain.py") for part in line):
                    return child.pid
        except psutil.Error:
            pass  # gone while we looked
        return None


def begin(
    kind: str, arguments: Sequence[str], resume: str | None, log: Path, ranks: int = 1, **environment: str
) -> Start:
    """A start of either kind, "forked" or "launched"."""
    return (ForkedStart if kind == "forked" else LaunchedStart)(arguments, resume, log, ranks, **environment)


def choose_kind(draw: random.Random, share: float) -> str:
    """Forked, or with probability `share` launched."""
    return "launched" if draw.random() < share else "forked"


def to_the_end(
    arguments: Sequence[str],
    resume: str | None,
    log: Path,
    ranks: int = 1,
    prepare: Callable[[], None] | None = None,
) -> tuple[list[int], str]:
    """Start forked, `prepare` each rank, wait for their end -> (exit statuses, output)."""
    start = ForkedStart(arguments, resume, log, ranks, prepare)
    return start.wait(), start.output()
