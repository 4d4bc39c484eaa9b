"""Chains of starts that are killed at random moments, and what must be true after each kill and at the end.

A chain is one run: started with `--resume auto`, killed with SIGKILL, started again, until it is done. Some kills come
at any moment; others wait for something to happen in the run's folder (a lease, a save begun, a checkpoint published)
or in its log, and a little longer, so that short windows are hit as well.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dlm_dist.training import checkpoint_files
from tests.distributed import runs
from tests.faults import starts

DEFAULT_KILLS = 204
EVERY = 3
KEEP_LAST = 2
LAUNCHED_SHARE = 0.06
"""Of the starts that are done by the real launcher, each of which costs ten times as much."""
ONE_RANK_SHARE = 0.3
"""Of the kills on two ranks that hit one of them only."""
AIMS = {"start": 0.1, "load": 0.15, "save": 0.15, "manifest": 0.15, "publish": 0.15, "step": 0.15, "any": 0.15}
PHASES = (
    "before the lease",
    "loading",
    "in a step",
    "saving: files",
    "saving: manifest written, not renamed",
    "between rename and retention",
    "in retention",
)


@dataclass(frozen=True)
class Setting:
    """One combination of the campaign."""

    stage: int
    optimizer: str
    asynchronous: bool
    ranks: int
    backbone: str
    kills: int
    steps: int = 60

    def __str__(self) -> str:
        mode = "async" if self.asynchronous else "sync"
        return f"zero{self.stage}-{self.optimizer}-{mode}-{self.ranks}ranks-{self.backbone}"


def plan(kills: int) -> list[Setting]:
    """`kills` dealt out to ZeRO 0-3 x three optimizers x both ways to save; ranks and backbones take turns."""
    combinations = list(itertools.product(range(4), ("adamw", "adamw8bit", "lion8bit"), (False, True)))
    settings = []
    for number, (stage, optimizer, asynchronous) in enumerate(combinations):
        place = stage + number // 2 % 3 + asynchronous
        backbone = "rwkv7" if number % 8 in (3, 6) else "qwen3"  # whose steps take a quarter of the time
        share = kills // len(combinations) + (number < kills % len(combinations))
        settings.append(Setting(stage, optimizer, asynchronous, 1 + place % 2, backbone, share))
    return settings


@dataclass(frozen=True)
class View:
    """What lies in a run's folder at one moment."""

    staging: frozenset[str]
    published: tuple[int, ...]
    half_deleted: frozenset[str]
    lease: int
    starts: int
    lines: tuple[str, ...]
    """The whole lines of metrics.jsonl."""

    @classmethod
    def of(cls, run: Path) -> View:
        folder = run / "checkpoints"
        steps = checkpoint_files.step_folders(folder)
        published = [path for path in steps if (path / checkpoint_files.MANIFEST).is_file()]
        metrics, manifest = run / "metrics.jsonl", run / "manifest.json"
        return cls(
            staging=frozenset(path.name for path in folder.glob(".step-*")),
            published=tuple(checkpoint_files.step_of(path) or 0 for path in published),
            half_deleted=frozenset(path.name for path in steps if path not in published),
            lease=lease_number(run),
            starts=len(json.loads(manifest.read_text())["starts"]) if manifest.exists() else 0,
            lines=tuple(metrics.read_text().split("\n")[:-1]) if metrics.exists() else (),
        )

    @property
    def newest(self) -> int:
        """The newest published checkpoint; 0 where there is none."""
        return max(self.published, default=0)


def lease_number(run: Path) -> int:
    """The number of the newest lease on a run's folder; 0 where there is none."""
    folder = run / ".lease"
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def phase(run: Path, before: View, after: View, output: str) -> str:
    """Which of PHASES a kill has hit, from what it has left. `before`: when this start began."""
    new = after.staging - before.staging
    if new:
        written = any((run / "checkpoints" / name / checkpoint_files.MANIFEST).exists() for name in new)
        return PHASES[4] if written else PHASES[3]
    if after.half_deleted - before.half_deleted:
        return PHASES[6]
    if after.newest > before.newest and len(after.published) > KEEP_LAST:
        return PHASES[5]
    if after.lease == before.lease:
        return PHASES[0]
    return PHASES[2] if "\nstep " in output else PHASES[1]


@dataclass
class Kill:
    """One SIGKILL, or the start that was to be killed and came to its end first (`phase` "finished")."""

    kind: str
    aim: str
    target: str
    """"all", or the rank that was hit alone."""
    phase: str
    newest: int
    """The newest checkpoint at the kill, which was intact."""
    repeated: int
    """Recorded steps behind it, which have to be done again."""


@dataclass
class Pace:
    """Seconds of an undisturbed start, from which random moments are drawn."""

    lease: float = 0.1
    """Until the lease is taken."""
    load: float = 1.0
    step: float = 0.05
    save: float = 0.05


@dataclass
class Chain:
    """One run under fire, beside `reference`, the same run left alone."""

    setting: Setting
    arguments: list[str]
    run: Path
    reference: list[dict[str, Any]]
    draw: random.Random
    pace: Pace
    kills: list[Kill] = field(default_factory=list)
    resumes: int = 0
    """Starts that were seen to go on from the newest intact checkpoint."""
    seen: set[str] = field(default_factory=set)
    """Every line that metrics.jsonl has held."""

    def one_start(self, kill: bool) -> bool:
        """Start the run, kill it (`kill`) or let it end, and examine what is left -> whether it has reached its end."""
        before = View.of(self.run)
        log = self.run.with_suffix(f".{len(list(self.run.parent.glob('*.log')))}.log")
        kind = starts.choose_kind(self.draw, LAUNCHED_SHARE)
        start = starts.begin(kind, self.arguments, "auto", log, self.setting.ranks)
        aim, target = self.draw.choices(list(AIMS), list(AIMS.values()))[0], "all"
        try:
            if kill:
                self._await_moment(start, aim, before)
                target = self._strike(start, before)
            statuses = start.wait()
        finally:
            start.kill()
        output = start.output()
        finished = statuses == [0] * len(statuses)
        assert kill or finished, output[-6000:]
        after = View.of(self.run)
        self._examine(before, after, output, finished)
        if kill and finished:
            self.kills.append(Kill(kind, aim, target, "finished", after.newest, 0))
        elif kill:
            if target == "all":
                assert set(statuses) == {-9}, f"it ended by itself: {statuses}\n{output[-6000:]}"
            else:
                # The rank that was hit ends by the signal, the others by themselves and not with 0.
                assert 0 not in statuses, output[-6000:]
            repeated = sum(json.loads(line)["step"] > after.newest for line in after.lines)
            hit = phase(self.run, before, after, output)
            self.kills.append(Kill(kind, aim, target, hit, after.newest, repeated))
        return finished

    def _await_moment(self, start: starts.Start, aim: str, before: View) -> None:
        """Return at the moment of the kill, or when the start has ended."""
        count, uniform = self.draw.randint(1, 3), self.draw.uniform
        folder = self.run / "checkpoints"
        if aim in ("start", "any"):
            occurs: Callable[[], bool] = lambda: True  # noqa: E731
            whole = self.pace.load + 3 * EVERY * self.pace.step
            pause = uniform(0, self.pace.lease if aim == "start" else whole)
        elif aim == "load":
            occurs = lambda: lease_number(self.run) > before.lease  # noqa: E731
            pause = uniform(0, self.pace.load)
        elif aim == "save":
            known = set(before.staging)

            def occurs() -> bool:
                if folder.is_dir():
                    known.update(name for name in os.listdir(folder) if name.startswith(".step-"))
                return len(known - before.staging) >= count

            pause = uniform(0, self.pace.save)
        elif aim in ("manifest", "publish"):
            step = before.newest + count * EVERY
            final = folder / f"step-{step}"

            def being_written() -> list[str]:
                names = os.listdir(folder) if folder.is_dir() else []
                return [name for name in names if name.startswith(f".step-{step}.") and name not in before.staging]

            def occurs() -> bool:
                # No rest from here on: what comes before the rename, and behind it, is short.
                while not final.exists() and (names := being_written()) and start.running():
                    if aim == "manifest" and (folder / names[0] / checkpoint_files.MANIFEST).exists():
                        return True
                return final.exists()

            pause = self.draw.choice([0.0, uniform(0, self.pace.save / 4)])
        else:
            occurs = lambda: start.output().count("\nstep ") >= 3 * count  # noqa: E731
            pause = uniform(0, self.pace.step)
        deadline = time.monotonic() + starts.END_SECONDS
        for look in itertools.count():
            if occurs():
                break
            if look % 50 == 0:
                assert time.monotonic() < deadline, f"never came to {aim}: {start.output()[-4000:]}"
                if not start.running():
                    return
            time.sleep(0.0005)
        moment = time.monotonic() + pause
        while time.monotonic() < moment:
            if pause > 0.01:
                time.sleep(0.001)

    def _strike(self, start: starts.Start, before: View) -> str:
        """SIGKILL to all, or to one rank if the ranks have met: until then only a launcher can end the others."""
        met = lease_number(self.run) > before.lease
        if self.setting.ranks > 1 and met and self.draw.random() < ONE_RANK_SHARE:
            rank = self.draw.randrange(self.setting.ranks)
            if start.kill_rank(rank):
                return f"rank {rank}"
        start.kill()
        return "all"

    def _examine(self, before: View, after: View, output: str, finished: bool) -> None:
        """Nothing that was published is gone or damaged, and the start went on from the newest."""
        folder = self.run / "checkpoints"
        for step in after.published:
            problems = checkpoint_files.verify(folder / f"step-{step}")
            assert problems == [], f"published and damaged: {problems}"
        assert after.newest >= before.newest, f"step {before.newest} was published, now {after.newest} is the newest"
        assert not list(folder.glob("set-aside-*")), "a kill leaves nothing that has to be set aside"
        assert "passed over" not in output
        if after.starts > before.starts:
            assert after.starts == before.starts + 1
            entry = json.loads((self.run / "manifest.json").read_text())["starts"][-1]
            expected = str(folder / f"step-{before.newest}") if before.newest else None
            assert entry["resumed_from"] == expected, f"{entry['resumed_from']}, the newest intact one is {expected}"
            self.resumes += before.newest > 0
        self.seen.update(before.lines, after.lines)
        for line in after.lines:
            record = json.loads(line)
            truth = self.reference[record["step"] - 1]
            for key in runs.EXACT:
                assert record[key] == truth[key], f"step {record['step']}: {key} {record[key]}, unharmed {truth[key]}"
        if finished:
            assert len(after.lines) == self.setting.steps

    def check_end(self, reference: Path) -> None:
        """The run is the one that was left alone, to the bit, and everything it did twice is on record."""
        runs.assert_same_steps(self.run, reference)
        kept, last = sorted(path.name for path in (self.run / "checkpoints").iterdir()), self.setting.steps
        assert kept == sorted(f"step-{last - i * EVERY}" for i in range(KEEP_LAST))
        mine, other = (run / "checkpoints" / f"step-{last}" for run in (self.run, reference))
        assert checkpoint_files.verify(mine) == checkpoint_files.verify(other) == []
        assert checkpoint_files.read_manifest(mine) == checkpoint_files.read_manifest(other)
        for kind in ("evaluations", "samples"):
            one, unharmed = self.run / f"{kind}.jsonl", reference / f"{kind}.jsonl"
            assert one.exists() == unharmed.exists()
            assert not one.exists() or one.read_text() == unharmed.read_text()
        replaced = self.run / "metrics.replaced.jsonl"
        repeated = replaced.read_text().split("\n")[:-1] if replaced.exists() else []
        final = (self.run / "metrics.jsonl").read_text().split("\n")[:-1]
        assert len(set(repeated)) == len(repeated), "a line was put aside twice"
        assert self.seen <= set(repeated) | set(final), "a line of metrics.jsonl is lost"
        assert not set(repeated) & set(final)

    def record(self, seconds: float) -> dict[str, Any]:
        """For the report."""
        return {
            "setting": asdict(self.setting),
            "seconds": round(seconds, 1),
            "resumes": self.resumes,
            "kills": [asdict(kill) for kill in self.kills],
        }
