"""Which rank the others wait for.

A step takes the same time on every rank, since all wait for the slowest. What differs is how long a rank needs until
it meets the others: to get its rows and to run its forward passes. Under ZeRO-3 the ranks meet in every layer of a
forward pass, so there only the wait for rows is counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SLOW_FACTOR = 1.5
"""A rank is slow in a step where it took this many times the median of all,"""
SLOW_SHARE = 0.05
"""and the others lost at least this share of the step by it."""
WINDOW = 50
"""Steps after which the console is told which ranks were slow in more than half of them."""


@dataclass
class RankTimes:
    """The slowest rank of each step, and a word to `tell` where a rank stays slow. Rank 0 only."""

    hosts: Sequence[str]
    """The machine of every rank."""
    tell: Callable[[str], None] | None = None
    window: int = WINDOW
    _steps: list[Sequence[float]] = field(default_factory=list)
    _slow: list[int] = field(default_factory=list)

    def step(self, seconds: Sequence[float], step_seconds: float) -> dict[str, Any]:
        """The figures of a step in which each rank needed `seconds` [ranks] of `step_seconds` to meet the others."""
        median = statistics.median_low(seconds)
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        self._steps.append(seconds)
        if seconds[slowest] > SLOW_FACTOR * median and seconds[slowest] - median > SLOW_SHARE * step_seconds:
            self._slow.append(slowest)
        if len(self._steps) == self.window:
            self._judge()
        return {
            "rank_seconds": {"min": min(seconds), "median": median, "max": seconds[slowest]},
            "slowest_rank": slowest,
            "slowest_host": self.hosts[slowest],
        }

    def _judge(self) -> None:
        """Tell of the rank that was the slowest by far in more than half of the window, and begin another."""
        for rank in set(self._slow):
            times = self._slow.count(rank)
            if times > self.window / 2 and self.tell is not None:
                mine = statistics.median(seconds[rank] for seconds in self._steps)
                usual = statistics.median(statistics.median_low(seconds) for seconds in self._steps)
                self.tell(
                    f"warning: rank {rank} on {self.hosts[rank]} holds the others up: in {times} of {self.window} "
                    f"steps it needed over {SLOW_FACTOR:g} times as long as half of the ranks to get its rows and run "
                    f"its forward passes (median {mine:.3g} s, usual {usual:.3g} s)"
                )
        self._steps.clear()
        self._slow.clear()
