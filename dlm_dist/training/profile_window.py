"""A window of steps in which chosen ranks are profiled: what ran when, and what held memory (docs/metrics.md)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from dlm_dist.config import ConfigError, ProfileSection
from dlm_dist.training.phases import PhaseClock

_SNAPSHOT_ENTRIES = 1_000_000
"""Allocations and frees that a memory snapshot remembers, the newest ones: about 1 GB of host memory at most."""


def profile_notes(settings: ProfileSection | None, done: int, world: int, device: torch.device) -> list[str]:
    """What a start behind `done` steps will not profile, though asked. ConfigError where a rank is none of `world`."""
    if settings is None:
        return []
    first, last = settings.start_step, settings.start_step + settings.steps - 1
    if done >= last:
        return [f"nothing is profiled: logging.profile asks for steps {first} to {last}, and this start is behind them"]
    absent = [rank for rank in settings.ranks if rank >= world]
    if absent:
        raise ConfigError([f"logging.profile.ranks names rank {absent[0]}: expected at most {world - 1}, the last one"])
    notes = []
    if done >= first:
        notes.append(f"only steps {done + 1} to {last} are profiled: logging.profile asks for those from {first} on")
    if settings.memory and device.type != "cuda":
        notes.append(
            f"logging.profile.memory: the trace has the allocations; there are no memory snapshots on {device}"
        )
    return notes


class ProfileWindow:
    """Profiles this rank while it is entered, in the steps that `settings` ask for (None: in none).

    It listens to the phases of `clock`, whose "data" begins each step; `step` tells the completed steps. The step
    before the first one warms the profiler up, if there is one in this start. The trace is written behind the last
    step, or where the run ends or fails before it, to RUN/profile/step-A-B/rank-N.json.gz for the steps that it holds;
    a rollback to steps before the window ends it too. A rank that has nothing to profile, or is done, does not listen.
    """

    def __init__(
        self,
        settings: ProfileSection | None,
        folder: Path,
        rank: int,
        device: torch.device,
        clock: PhaseClock,
        step: Callable[[], int],
        tell: Callable[[str], None] | None,
    ) -> None:
        self._settings = settings if settings is not None and rank in settings.ranks else None
        self._folder, self._rank, self._cuda, self._tell = folder, rank, device.type == "cuda", tell
        self._clock, self._step = clock, step
        self._profiler: profile | None = None
        self._steps: list[int] = []
        self._spans: list[record_function] = []

    def __enter__(self) -> ProfileWindow:
        if self._settings is not None:
            self._clock.listener = self._phase_begins
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Also where a step has failed: what memory held is what one wants to know then.
        if self._profiler is not None:
            self._close()
        self._clock.listener = None

    def _phase_begins(self, name: str) -> None:
        if name == "data":
            self._step_begins(self._step() + 1)
        if self._steps and self._profiler is not None:
            self._end_spans(keep=1)
            self._begin_span(name)

    def _step_begins(self, number: int) -> None:
        assert self._settings is not None
        first = self._settings.start_step
        inside = first <= number < first + self._settings.steps
        if self._profiler is None and (inside or number == first - 1):
            self._open(warm_up=not inside)
        elif self._profiler is not None and inside:
            self._end_spans()
            self._profiler.step()
        elif self._profiler is not None:
            self._close()
            self._clock.listener = None
        if inside:
            self._begin_step(number)

    def _open(self, warm_up: bool) -> None:
        assert self._settings is not None
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        actions = {0: ProfilerAction.WARMUP} if warm_up else {}
        self._profiler = profile(
            activities=activities,
            schedule=lambda step: actions.get(step, ProfilerAction.RECORD),
            record_shapes=True,
            profile_memory=self._settings.memory,
        )
        self._profiler.start()

    def _begin_step(self, number: int) -> None:
        assert self._settings is not None
        if not self._steps and self._cuda and self._settings.memory:
            torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
        self._steps.append(number)
        self._begin_span(f"step {number}")

    def _close(self) -> None:
        assert self._profiler is not None
        assert self._settings is not None
        self._end_spans()
        self._profiler.stop()
        if self._steps:
            folder = self._folder / f"step-{min(self._steps)}-{max(self._steps)}"
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / f"rank-{self._rank}.json.gz", self._profiler.export_chrome_trace)
            if self._cuda and self._settings.memory:
                _write(folder / f"rank-{self._rank}.memory.pickle", torch.cuda.memory._dump_snapshot)
                torch.cuda.memory._record_memory_history(enabled=None)
            if self._tell is not None:
                self._tell(f"profiled steps {min(self._steps)} to {max(self._steps)}: {folder}")
        self._profiler = None

    def _begin_span(self, name: str) -> None:
        span = record_function(name)
        span.__enter__()
        self._spans.append(span)

    def _end_spans(self, keep: int = 0) -> None:
        while len(self._spans) > keep:
            self._spans.pop().__exit__(None, None, None)


def _write(path: Path, write: Callable[[str], None]) -> None:
    """Under another name first: what carries the name is whole."""
    temporary = path.with_name(f"partial.{path.name}")
    write(str(temporary))
    os.replace(temporary, path)
