"""A run as a chain of jobs: what each attempt came to, when to give up, and which node is to blame.

`RUN/chain/attempts.jsonl` has one line for the begin and one for the end of every attempt; one without an end was
killed, or its node died. Everything else follows from these lines. Needs neither torch nor SLURM; who starts the
attempts is launcher/chain_command.py.
"""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dlm_dist.training.checkpoint_files import list_checkpoints, step_of
from dlm_dist.training.switches import STOP

FINISHED = 0
LOST_CONTACT = 74  # EX_IOERR: another rank has ended
STOPPED_EARLY = 75  # EX_TEMPFAIL: saved, and to be gone on with
HUNG = 76

FAILURES_TO_EXCLUDE = 2
"""A node that was to blame this often, without a good attempt in between, is left out."""

_VICTIM_SAYS = ("ncclRemoteError", "Watchdog caught collective operation timeout")
"""The last words of a rank that NCCL ended because another one was gone, whatever its status."""


@dataclass(frozen=True)
class NodeResult:
    """What the launcher of one node (launcher/node.py) left behind; see `read_results`."""

    node: str
    status: int | None
    """Exit status of the first of its ranks that failed, or of all; None: it was ended from outside."""
    told: str = ""
    """The last lines of that rank."""
    failed: float | None = None
    """When it failed, in seconds of the node's clock."""


@dataclass(frozen=True)
class Outcome:
    """What an attempt came to."""

    status: int
    blamed: dict[str, str] = field(default_factory=dict)
    """Node -> why."""


@dataclass(frozen=True)
class Attempt:
    """One start of the run by one job."""

    name: str
    nodes: tuple[str, ...]
    checkpoint: int
    """Step of the newest checkpoint at the begin; -1: none."""
    reached: int
    """The same at the end."""
    status: int | None = None
    """None: it has not ended, or not by itself."""
    blamed: Mapping[str, str] = field(default_factory=dict)
    told: bool = False
    """Somebody asked it to end: SLURM, or a person."""
    begun: float = 0.0
    """Unix time."""


class Chain:
    """The attempts on the run in `run_dir`."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.folder = run_dir / "chain"
        self._path = self.folder / "attempts.jsonl"

    def newest(self) -> int:
        """Step of the newest checkpoint; -1: there is none."""
        found = list_checkpoints(self._run_dir / "checkpoints")
        return (step_of(found[-1]) or 0) if found else -1

    def begin(self, name: str, nodes: Sequence[str]) -> None:
        """Record that the attempt `name` starts on `nodes`."""
        self._append({"event": "begin", "attempt": name, "nodes": list(nodes), "checkpoint": self.newest()})

    def asked_to_end(self, name: str) -> None:
        """Record at once that somebody asked the attempt to end: what kills it soon after is no failure of the run."""
        self._append({"event": "told", "attempt": name, "told": True})

    def end(self, name: str, outcome: Outcome, told: bool) -> None:
        """Record what it came to."""
        self._append({"event": "end", "attempt": name, "checkpoint": self.newest(), "told": told, **asdict(outcome)})
        self._list_excluded()

    def died(self, name: str, blamed: Mapping[str, str]) -> None:
        """Record afterwards why an attempt has no end."""
        self._append({"event": "died", "attempt": name, "blamed": dict(blamed)})
        self._list_excluded()

    def give_up(self, reason: str) -> None:
        """Write STOP with the reason, and forget the attempts before it: who removes STOP has mended something."""
        self._append({"event": "stop", "reason": reason})
        (self._run_dir / STOP).write_text(f"{reason}\n", encoding="utf-8")

    def attempts(self) -> list[Attempt]:
        """Since the chain last gave up, oldest first."""
        found: list[dict[str, Any]] = []
        for event in self._events():
            if event["event"] == "stop":
                found = []
            elif event["event"] == "begin":
                if found:
                    found[-1].setdefault("reached", event["checkpoint"])
                begun = datetime.datetime.fromisoformat(event["time"]).timestamp()
                place = {"name": event["attempt"], "nodes": tuple(event["nodes"]), "checkpoint": event["checkpoint"]}
                found.append({**place, "begun": begun})
            elif found and found[-1]["name"] == event["attempt"]:
                found[-1] |= {key: event[key] for key in ("status", "blamed", "told") if key in event}
                if event["event"] == "end":
                    found[-1]["reached"] = event["checkpoint"]
        return [Attempt(**{"reached": self.newest(), **values}) for values in found]

    def why_give_up(self, limit: int) -> str | None:
        """The reason where the last `limit` attempts that nobody interrupted made no new checkpoint; else None."""
        fruitless: list[Attempt] = []
        for attempt in self.attempts():
            if attempt.reached > attempt.checkpoint:
                fruitless = []
            elif not attempt.told:
                fruitless.append(attempt)
        if len(fruitless) < limit:
            return None
        ends = ", ".join(
            f"{attempt.name} on {','.join(attempt.nodes)}: "
            + ("killed, or its node died" if attempt.status is None else f"status {attempt.status}")
            for attempt in fruitless[-limit:]
        )
        return f"{limit} attempts in a row made no new checkpoint ({ends})"

    def excluded(self) -> list[str]:
        """Nodes to leave out from now on. What a node did before an attempt that got on with it is forgotten."""
        failures: Counter[str] = Counter()
        for attempt in self.attempts():
            for node in attempt.nodes:
                if node in attempt.blamed:
                    failures[node] += 1
                elif attempt.reached > attempt.checkpoint:
                    failures[node] = 0
        return sorted(node for node, times in failures.items() if times >= FAILURES_TO_EXCLUDE)

    def _list_excluded(self) -> None:
        path, excluded = self.folder / "excluded_nodes", self.excluded()
        if excluded or path.exists():
            path.write_text("".join(f"{node}\n" for node in excluded), encoding="utf-8")

    def _events(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        # A line without an end is what a kill has left.
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").split("\n")[:-1] if line]

    def _append(self, event: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with open(self._path, "r+b" if torn else "ab") as file:
            if torn:
                file.truncate(self._path.read_bytes().rfind(b"\n") + 1)
                file.seek(0, 2)
            file.write(json.dumps({"time": time, **event}).encode() + b"\n")


def judge(
    nodes: Sequence[str], results: Iterable[NodeResult], laggards: Iterable[str], status: int, told: bool = False
) -> Outcome:
    """What an attempt on `nodes` came to: `results` of their launchers, `status` of the command that started them.

    A node is blamed when it failed first and another did not: what fails alike everywhere is the program's fault, or
    the user's. `laggards` held the others up when watchdogs ended the run. Of a node alone only a crash counts. Of an
    attempt that was `told` to end nobody is blamed.
    """
    ended = {result.node: result for result in results}
    codes = [result.status for result in ended.values() if result.status is not None]
    failed = [result for result in ended.values() if _failed_by_itself(result)]
    if STOPPED_EARLY in codes and not failed:
        return Outcome(STOPPED_EARLY)
    if status == FINISHED or codes == [FINISHED] * len(nodes):
        return Outcome(FINISHED)
    blamed: dict[str, str] = {}
    if failed:
        first = min(failed, key=lambda result: math.inf if result.failed is None else result.failed)
        status = first.status or status
        if len(failed) < len(nodes) or (len(nodes) == 1 and _crashed(first)):
            blamed[first.node] = f"a rank ended with status {first.status}: {first.told}".rstrip(": ")
    elif HUNG in codes:
        status = HUNG
        behind = [node for node in nodes if node in set(laggards)]
        if len(behind) < len(nodes):
            blamed = dict.fromkeys(behind, "it held the others up until their watchdogs ended them")
    elif ended:
        absent = [node for node in nodes if node not in ended]
        if 2 * len(absent) <= len(nodes):  # or it was srun that ended before most of them began
            blamed = dict.fromkeys(absent, "no launcher started there")
    return Outcome(status, {} if told else blamed)


def _failed_by_itself(result: NodeResult) -> bool:
    if result.status in (None, FINISHED, LOST_CONTACT, STOPPED_EARLY, HUNG):
        return False
    return not any(words in result.told for words in _VICTIM_SAYS)


def _crashed(result: NodeResult) -> bool:
    """Whether the end looks like the machine's fault, with no other machine to compare with."""
    assert result.status is not None
    return result.status > 128 or "CUDA error" in result.told


def read_results(folder: Path) -> list[NodeResult]:
    """What the launchers of an attempt left in `folder`: node-NAME.json. OSError where it cannot be read now."""
    found = []
    for path in sorted(folder.glob("node-*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        found.append(NodeResult(values["node"], values["status"], values["told"], values.get("failed")))
    return found


def fell_silent(attempt: Attempt, beats: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Nodes of an attempt without an end whose ranks' hearts stopped long before those of others, each with a sentence.

    `beats`: the heartbeats that are there now (training/watchdog.py). A node without power stops at once; SLURM, which
    then ends the job, takes minutes to see it.
    """
    last: dict[str, float] = {}
    patience = 0.0
    for beat in beats:
        node = beat["host"].partition(".")[0]
        if node in attempt.nodes and beat["time"] >= attempt.begun:
            last[node] = max(last.get(node, 0.0), beat["time"])
            patience = max(patience, 2 * beat["interval"])
    end = max(last.values(), default=0.0)
    silent = {node: end - time for node, time in last.items() if end - time > patience}
    return {node: f"it fell silent {seconds:.0f} s before the others" for node, seconds in silent.items()}
