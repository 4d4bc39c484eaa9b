"""Goodput: the share of a run's time that goes into steps which count, with failures, saves and restarts.

Three views of the same run, so that each checks the others: `simulate` plays it event by event, `expected_share` is the
exact long-run value by renewal theory, and `young_interval` and `daly_interval` are the textbook intervals between
saves. `best_interval` minimises the exact form. Nothing here knows of ranks or torch.

The run. N nodes fail independently, each after an exponential time, so the run fails at the rate N / node_mtbf. It
trains for `interval` seconds, stands still for `stall` seconds (a synchronous save: all of it; an asynchronous one:
the copy), and `write` seconds later that checkpoint is there. A save waits for the one before it. A failure costs what
was trained since the newest checkpoint that is there, the time until it is noticed, and a restart, which a further
failure begins anew.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

DAY = 86400.0

NODE_MTBF_DAYS = 264.0
"""Node-days between failures: 419 unexpected interruptions in 54 days on 16,384 GPUs, about 2,048 nodes (Llama 3,
arXiv 2407.21783, table 5)."""


@dataclass(frozen=True)
class Run:
    """What decides the goodput of a run; times in seconds."""

    nodes: int
    interval: float
    """Training between two saves."""
    stall: float
    """Training stands still for a save."""
    restart: float
    """From a noticed failure to the first step: requeue, start, load, seek."""
    write: float = 0.0
    """From the end of the stall until the checkpoint is published."""
    node_mtbf: float = NODE_MTBF_DAYS * DAY
    """Mean time between failures of one node."""
    detect: float = 0.0
    """Until a failure that ends a process is noticed."""
    hang_share: float = 0.0
    """Share of failures after which all processes stay and nothing moves."""
    hang_detect: float = 0.0
    """Until such a failure is noticed: guards.hang_minutes."""
    job: float | None = None
    """Time limit of a job, at which the run saves, ends and restarts; None: no limit."""

    def __post_init__(self) -> None:
        """ValueError with a sentence for numbers that describe no run."""
        for name in ("nodes", "interval", "node_mtbf"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name):g}: expected more than 0")
        for name in ("stall", "restart", "write", "detect", "hang_detect"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name):g}: expected seconds, at least 0")
        if not 0 <= self.hang_share <= 1:
            raise ValueError(f"hang_share is {self.hang_share:g}: expected a share from 0 to 1")
        least = self.stall + self.write + self.restart
        if self.job is not None and not self.job > least:
            raise ValueError(f"a job of {self.job:g} s is not longer than a restart and a save, {least:g} s")

    @property
    def rate(self) -> float:
        """Failures a second of the whole run."""
        return self.nodes / self.node_mtbf

    @property
    def mean_detection(self) -> float:
        """Mean time until a failure is noticed."""
        return (1.0 - self.hang_share) * self.detect + self.hang_share * self.hang_detect


@dataclass
class Account:
    """Where the seconds of a run went; they add up to its length."""

    productive: float = 0.0
    """Steps that count."""
    stall: float = 0.0
    """Saves that hold training up."""
    waiting: float = 0.0
    """Saves that wait for the one before them."""
    lost: float = 0.0
    """Steps that a failure took back."""
    detection: float = 0.0
    restart: float = 0.0
    failures: int = 0

    @property
    def seconds(self) -> float:
        """The length of the run."""
        return self.productive + self.stall + self.waiting + self.lost + self.detection + self.restart

    def shares(self) -> dict[str, float]:
        """Every kind of time over all of it."""
        total = self.seconds
        return {field.name: getattr(self, field.name) / total for field in fields(self) if field.name != "failures"}


class Failure(NamedTuple):
    """When the run fails, in seconds from its beginning, and whether it then hangs."""

    time: float
    hangs: bool


_NEVER = Failure(math.inf, False)


def draw_failures(run: Run, seed: int) -> Iterator[Failure]:
    """The failures of a run without end: a Poisson process, the same for the same seed."""
    draw, now = random.Random(seed), 0.0
    while True:
        now += draw.expovariate(run.rate)
        yield Failure(now, draw.random() < run.hang_share)


def simulate(run: Run, seconds: float, failures: Iterable[Failure], restarts: Iterable[float] = ()) -> Account:
    """The first `seconds` of a run, event by event, from its first start on.

    What is trained and not lost at the end counts. A failure while an earlier one is not noticed yet changes nothing.
    `restarts`: how long the first starts take, where that is known one by one; then `run.restart` holds.
    """
    account, upcoming, starts = Account(), iter(failures), iter(restarts)
    failure, now = next(upcoming, _NEVER), 0.0
    while now < seconds:
        end = min(failure.time, seconds)
        ready = min(now + next(starts, run.restart), end)
        account.restart += ready - now
        leave = now + run.job - run.stall - run.write if run.job is not None else math.inf
        now = _train(run, account, ready, end, leave, fails=failure.time < seconds) if ready < end else end
        if now < end or now >= seconds:
            continue  # the end of a job, or of all
        account.failures += 1
        noticed = min(now + (run.hang_detect if failure.hangs else run.detect), seconds)
        account.detection += noticed - now
        now = noticed
        failure = next((later for later in upcoming if later.time > now), _NEVER)
    return account


def _train(run: Run, account: Account, now: float, end: float, leave: float, fails: bool) -> float:
    """Train and save from `now` until `end`, where the run fails or is no longer looked at, or until the job ends from
    `leave` on -> when that was."""
    trained, published = 0.0, 0.0
    pending, in_flight = -math.inf, 0.0  # when the newest save is there, and what it holds
    while True:
        until = max(now, min(now + run.interval, end, leave))
        trained, now = trained + until - now, until
        if now < end:
            until = min(max(now, pending), end)
            account.waiting, now = account.waiting + until - now, until
        if pending <= now:
            published = in_flight
        leaves = now >= leave
        until = min(now + run.stall + (run.write if leaves else 0.0), end)
        account.stall, now = account.stall + until - now, until
        if now >= end:
            kept = published if fails else trained
            account.productive, account.lost = account.productive + kept, account.lost + trained - kept
            return end
        if leaves:
            account.productive += trained
            return now
        pending, in_flight = now + run.write, trained


def expected_share(run: Run) -> float:
    """Productive share of an endless run; exact for a run without `job`, whose cost is then taken off to first order.

    An up period lasts X, exponential with the rate r, and keeps interval x the checkpoints published within it: of the
    k-th that is at first + (k - 1) cycle, so the mean number is exp(-r first) / (1 - exp(-r cycle)). Every failure
    costs the mean detection D and a restart of R that further failures begin anew: up and down together last
    exp(r R) (1 / r + D) on average. With write = D = 0 that is Daly's complete form (Future Generation Computer
    Systems 22, 2006).
    """
    rate, cycle = run.rate, max(run.interval, run.write) + run.stall
    exponent = rate * (run.interval + run.stall + run.write + run.restart)
    if exponent > 700.0:
        return 0.0  # not one checkpoint in the age of the universe
    checkpoints = math.exp(-exponent) / -math.expm1(-rate * cycle)
    share = run.interval * checkpoints / (1.0 / rate + run.mean_detection)
    if run.job is None:
        return share
    # A job reaches its limit with the probability exp(-r job): so many per second do.
    jobs = rate / math.expm1(min(700.0, rate * run.job))
    return share * (1.0 - (run.restart + run.stall + run.write) * jobs)


def young_interval(stall: float, rate: float) -> float:
    """sqrt(2 stall / rate) (Communications of the ACM 17, 1974): what a save costs over what a failure costs."""
    return math.sqrt(2.0 * stall / rate)


def daly_interval(stall: float, rate: float) -> float:
    """Daly's interval of higher order (2006); 1 / rate where a save takes longer than two failures apart."""
    if stall * rate >= 2.0:
        return 1.0 / rate
    x = stall * rate / 2.0
    return young_interval(stall, rate) * (1.0 + math.sqrt(x) / 3.0 + x / 9.0) - stall


def best_interval(run: Run, least: float = 1.0) -> float:
    """The interval of the largest expected share, at least `least` (seconds: a step); that of `run` plays no role.

    Golden section over the logarithm: the share rises to one maximum and falls behind it.
    """
    low, high = math.log(least), math.log(max(2.0 * least, 10.0 / run.rate))
    ratio = (math.sqrt(5.0) - 1.0) / 2.0

    def share(x: float) -> float:
        return expected_share(replace(run, interval=math.exp(x)))

    while high - low > 1e-6:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if share(a) >= share(b) else (a, high)
    return math.exp((low + high) / 2.0)


def good_intervals(run: Run, slack: float, least: float = 1.0) -> tuple[float, float]:
    """The shortest and the longest interval whose share is at most `slack` below that of the best."""
    best = best_interval(run, least)
    wanted = expected_share(replace(run, interval=best)) - slack

    def good(interval: float) -> bool:
        return expected_share(replace(run, interval=interval)) >= wanted

    return (
        least if good(least) else _border(good, best, least),
        _border(good, best, 1e3 / run.rate),
    )


def largest(run: Run, name: str, wanted: float, least: float = 1.0) -> float | None:
    """How large the field `name` (stall, write, restart, ...) may be for a share of `wanted` at the best interval.

    None: not even 0 suffices.
    """

    def suffices(value: float) -> bool:
        change: dict[str, Any] = {name: value}
        changed = replace(run, **change)
        return expected_share(replace(changed, interval=best_interval(changed, least))) >= wanted

    return _border(suffices, 0.0, 10.0 / run.rate) if suffices(0.0) else None


def _border(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """The last number from `inside`, where `holds` does, towards `outside`, where it does not. Bisection."""
    for _ in range(60):
        middle = (inside + outside) / 2.0
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside
