"""What this rank is doing and for how long: the split of a step's time, and what a watchdog looks at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeAlias

import torch

PHASES = ("data", "forward", "wait", "backward", "optimizer", "save", "evaluation", "other")
"""What a step does; "wait" is for other ranks, in front of the first forward pass and of the last backward pass."""

_Mark: TypeAlias = tuple[str, float, torch.cuda.Event | None]


class PhaseClock:
    """Seconds by phase since the last `take`. On CUDA they are the device's, between events on its stream."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.name = "other"
        self.since = time.monotonic()
        """When the present phase began, on the monotonic clock."""
        self.listener: Callable[[str], None] | None = None
        """Told the name of each phase that begins."""
        self._marks: list[_Mark] = [self._mark("other")]

    def enter(self, name: str) -> None:
        """End the present phase and begin `name`."""
        assert name in PHASES, name
        if self.listener is not None:
            self.listener(name)
        self._marks.append(self._mark(name))
        self.name, self.since = name, time.monotonic()

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Phase `name` inside a `with` block, then the one before again."""
        before = self.name
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; the present phase goes on. On CUDA it waits for the device.

        They sum to the time since then: "other" is what no phase accounts for.
        """
        end = self._mark(self.name)
        seconds = self._split(end)
        self._marks = [end]
        return seconds

    def so_far(self) -> dict[str, float]:
        """What `take` would give, which still gives it later."""
        return self._split(self._mark(self.name))

    def _split(self, end: _Mark) -> dict[str, float]:
        if end[2] is not None:
            end[2].synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (name, started, first), (_, ended, last) in zip(self._marks, [*self._marks[1:], end], strict=True):
            if first is not None and last is not None and name in ("forward", "backward", "optimizer"):
                seconds[name] += first.elapsed_time(last) / 1000.0
            elif name != "other":
                seconds[name] += ended - started
        seconds["other"] = end[1] - self._marks[0][1] - sum(seconds.values())
        return seconds

    def _mark(self, name: str) -> _Mark:
        event = None
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return name, time.perf_counter(), event


class Stopwatch:
    """Seconds spent in a `with` block."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
