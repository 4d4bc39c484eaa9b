"""A rank that does not get on is ended, and it is said which rank holds the others up, and where.

Every rank writes a heartbeat file from a thread: its step, its phase and since when. When a phase lasts longer than the
limit, the thread reads all heartbeats, says who is behind, writes the stacks of its process beside the heartbeat and
ends the process; collectives cannot be interrupted otherwise.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Heartbeats are read by programs that need no torch.
    from dlm_dist.training.phases import PhaseClock

HUNG = 76
"""Exit status of a rank that its watchdog ended."""

_STALE_BEATS = 4
"""A rank that has missed this many heartbeats is stopped, dead or cut off."""


class Watchdog:
    """Heartbeats of this rank in `folder` (RUN/heartbeats) while it is entered; ends the process after `limit` seconds.

    `limit` None: heartbeats only. `step` tells the completed steps. Errors of the file system are ignored here: a
    heartbeat that cannot be written must not end a run that trains.
    """

    def __init__(
        self, folder: Path, rank: int, clock: PhaseClock, step: Callable[[], int], limit: float | None
    ) -> None:
        self._folder, self._rank, self._clock, self._step, self._limit = folder, rank, clock, step, limit
        self._interval = 15.0 if limit is None else min(15.0, limit / 4.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self._beat()
            if self._limit is not None and time.monotonic() - self._clock.since > self._limit:
                self._end()

    def _beat(self) -> None:
        beat = {
            "rank": self._rank,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "step": self._step(),
            "phase": self._clock.name,
            "seconds_in_phase": round(time.monotonic() - self._clock.since, 1),
            "interval": self._interval,
            "time": time.time(),
        }
        path = heartbeat_path(self._folder, self._rank)
        try:
            path.with_suffix(".tmp").write_text(json.dumps(beat))
            os.replace(path.with_suffix(".tmp"), path)
        except OSError:
            pass

    def _end(self) -> None:
        stacks = heartbeat_path(self._folder, self._rank).with_suffix(".stacks.txt")
        try:
            with open(stacks, "w") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            faulthandler.dump_traceback(sys.stderr)
        # The ranks come to their limits one after another: let the others write what they are doing.
        time.sleep(self._interval + (3.0 if self._rank else 0.0))
        seconds = time.monotonic() - self._clock.since
        print(
            f"pretrain: error: rank {self._rank} has been in the phase {self._clock.name} of step {self._step() + 1} "
            f"for {seconds:.0f} s (guards.hang_minutes): {behind(self._folder)}; the stack is in {stacks}. "
            "Go on with --resume auto",
            file=sys.stderr,
            flush=True,
        )
        os._exit(HUNG)


def heartbeat_path(folder: Path, rank: int) -> Path:
    """Where the heartbeat of `rank` lies."""
    return folder / f"rank-{rank:05d}.json"


def read_heartbeats(folder: Path) -> list[dict[str, Any]]:
    """The heartbeats in `folder` by rank; unreadable ones are left out."""
    beats = []
    for path in sorted(folder.glob("rank-*.json")):
        try:
            beats.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return beats


def is_silent(beat: Mapping[str, Any], now: float) -> bool:
    """Whether the rank of `beat` has given no sign of life for too long."""
    late: bool = now - beat["time"] > _STALE_BEATS * beat["interval"]
    return late


def laggards(beats: Sequence[dict[str, Any]], now: float) -> list[dict[str, Any]]:
    """The heartbeats of the ranks that hold the others up: the silent ones, or else those behind. None where no rank
    differs from the others."""
    silent = [beat for beat in beats if is_silent(beat, now)]
    if silent:
        return silent
    order = ("data", "forward", "wait", "backward", "optimizer", "other", "evaluation", "save")
    place = {beat["rank"]: (beat["step"], order.index(beat["phase"])) for beat in beats}
    last = [beat for beat in beats if place[beat["rank"]] == min(place.values())]
    return last if len(last) < len(beats) else []


def behind(folder: Path) -> str:
    """Which ranks hold the others up, by their heartbeats in `folder`."""
    now, beats = time.time(), read_heartbeats(folder)
    found = laggards(beats, now)
    if not found:
        return f"all {len(beats)} ranks are there"
    return "; ".join(
        f"rank {beat['rank']} on {beat['host']} (process {beat['pid']}) "
        + (
            f"has given no sign of life for {now - beat['time']:.0f} s, last in the phase {beat['phase']} of step "
            f"{beat['step'] + 1}"
            if is_silent(beat, now)
            else f"is behind, in the phase {beat['phase']} of step {beat['step'] + 1} for "
            f"{beat['seconds_in_phase']:.0f} s"
        )
        for beat in found
    )
