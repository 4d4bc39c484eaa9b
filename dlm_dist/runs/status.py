"""What a run is doing, from the files in its folder alone: lease, heartbeats, metrics, checkpoints and markers.

From the host that trains, the lease says whether the process is there; from any other, its heart must beat. Needs no
torch, and reads only the ends of long files.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dlm_dist.runs.folder import has_attempts, newest_records, read_config, require_run, starts
from dlm_dist.training.chain import Chain
from dlm_dist.training.checkpoint_files import list_checkpoints, step_of
from dlm_dist.training.lease import EXPIRY_SECONDS, Owner, last_owner
from dlm_dist.training.switches import DONE, SAVE, STOP
from dlm_dist.training.watchdog import is_silent, laggards, read_heartbeats

RATE_STEPS = 100
"""Steps over which the speed is taken."""

State = Literal["starting", "running", "finished", "stopped", "killed", "silent"]


@dataclass(frozen=True)
class Status:
    """One run; None for what is not known."""

    path: str
    state: State
    """starting: before its first step. stopped: it ended by itself, before its last step. killed: its process is gone
    and has not said why. silent: it is on another host, and nothing has been heard of it for EXPIRY_SECONDS."""
    why: str | None
    """More about the state, a phrase."""
    hosts: tuple[str, ...]
    ranks: int | None
    starts: int
    step: int
    max_steps: int | None
    phase: str | None
    """What the ranks that are furthest behind are doing."""
    checkpoint: int | None
    """Step of the newest checkpoint."""
    checkpoint_age: float | None
    """Seconds."""
    seconds_per_step: float | None
    """Mean of the last RATE_STEPS, with saves and evaluations."""
    tokens_per_second: float | None
    seconds_left: float | None
    """At that speed; only of a run that is running."""
    loss: float | None
    """Of the last step."""
    skipped_steps: int | None
    rollbacks: int | None
    behind: tuple[str, ...]
    """Ranks that hold the others up, or give no sign of life, a phrase each."""
    asked: tuple[str, ...]
    """What people have asked of it by marker files and it has not done yet."""
    silent_for: float | None
    """Seconds since the last sign of life of a run that has not ended by itself."""
    attempt: str | None
    """What the last job of a chain came to, a phrase; None while one is at work."""
    excluded: tuple[str, ...]
    """Nodes that the chain leaves out."""


def read_status(run: Path, now: float | None = None) -> Status:
    """Look at `run`; `now` (Unix time) defaults to the clock of this host. Raises ValueError where it is no run."""
    if not has_attempts(run):
        require_run(run)
    now = time.time() if now is None else now
    begun = starts(run)
    start = begun[-1] if begun else {}
    ranks = start.get("topology", {}).get("world_size")
    beats = [beat for beat in read_heartbeats(run / "heartbeats") if ranks is None or beat["rank"] < ranks]
    held = last_owner(run)
    records = newest_records(run / "metrics.jsonl", RATE_STEPS)
    checkpoints = list_checkpoints(run / "checkpoints")
    checkpoint = checkpoints[-1] if checkpoints else None
    saved = step_of(checkpoint) if checkpoint is not None else None
    step = records[-1]["step"] if records else saved or 0
    configured = (run / "config.yaml").is_file()
    max_steps = start.get("max_steps") or (read_config(run)["train"]["max_steps"] if configured else None)
    signs = [beat["time"] for beat in beats] + ([held[1]] if held is not None else [])
    state, why = _state(run, held, beats, saved, max_steps, now)
    alive = state in ("running", "starting")
    found = laggards(beats, now) if state == "running" else []
    each, chain = _seconds_per_step(records), Chain(run)
    return Status(
        path=str(run),
        state=state,
        why=why,
        hosts=tuple(dict.fromkeys(beat["host"] for beat in beats)),
        ranks=ranks,
        starts=len(begun),
        step=step,
        max_steps=max_steps,
        phase=_phase(found or beats) if state == "running" else None,
        checkpoint=saved,
        checkpoint_age=now - checkpoint.stat().st_mtime if checkpoint is not None else None,
        seconds_per_step=each,
        tokens_per_second=statistics.median(record["tokens_per_second"] for record in records) if records else None,
        seconds_left=each * max(0, max_steps - step) if alive and each is not None and max_steps is not None else None,
        loss=records[-1]["loss"] if records else None,
        skipped_steps=records[-1]["skipped_steps"] if records else None,
        rollbacks=records[-1]["rollbacks"] if records else None,
        behind=tuple(_described(beat, now) for beat in found),
        asked=tuple(text for name, text in _ASKED.items() if (run / name).exists() and alive),
        silent_for=now - max(signs) if state in ("silent", "killed") and signs else None,
        attempt=None if alive else _last_attempt(chain),
        excluded=tuple(chain.excluded()),
    )


_ASKED = {STOP: "to end behind this step (STOP)", SAVE: "for a checkpoint now (SAVE)"}


def _state(
    run: Path,
    held: tuple[Owner, float] | None,
    beats: Sequence[dict[str, Any]],
    saved: int | None,
    max_steps: int | None,
    now: float,
) -> tuple[State, str | None]:
    """-> (state, more about it)."""
    owner, beat = held if held is not None else (None, 0.0)
    alive = owner.lives(Owner.this_process()) if owner is not None else False
    if alive is None and now - beat <= EXPIRY_SECONDS:
        alive = True
    if alive:
        assert owner is not None
        # The ranks beat from their first step on; heartbeats of an earlier start may still lie there.
        since = datetime.datetime.fromisoformat(owner.since).timestamp()
        started = any(beat["time"] >= since for beat in beats)
        return ("running" if started else "starting"), str(owner)
    if (run / DONE).exists() or (saved is not None and max_steps is not None and saved >= max_steps):
        return "finished", None
    if (run / STOP).exists():
        return "stopped", f"STOP is there: {_text(run / STOP) or 'it says no reason'}"
    stacks = [path for path in (run / "heartbeats").glob("*.stacks.txt") if path.stat().st_mtime >= beat - 60.0]
    if stacks and (owner is None or not owner.released):
        names = ", ".join(path.name.partition(".")[0] for path in sorted(stacks))
        return "stopped", f"its watchdog ended it: the stacks of {names} are in {run / 'heartbeats'}"
    if owner is None:
        return "stopped", "nobody holds its folder"
    if owner.released:
        return "stopped", f"it ended by itself, and its log says why (it was {owner})"
    if alive is None:
        return "silent", f"it was {owner}"
    return "killed", f"it was {owner}"


def _last_attempt(chain: Chain) -> str | None:
    attempts = chain.attempts()
    if not attempts:
        return None
    last = attempts[-1]
    end = "was killed, or its node died" if last.status is None else f"ended with status {last.status}"
    blamed = "".join(f"; node {node}: {why.splitlines()[0]}" for node, why in last.blamed.items())
    return f"attempt {last.name} on {','.join(last.nodes)} {end}{blamed}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()


def _seconds_per_step(records: Sequence[dict[str, Any]]) -> float | None:
    """The first record's save and evaluation lie before the window."""
    if not records:
        return None
    between = sum(record["save_seconds"] + record["evaluation_seconds"] for record in records[1:])
    return (sum(record["step_seconds"] for record in records) + between) / len(records)


def _phase(beats: Sequence[dict[str, Any]]) -> str | None:
    if not beats:
        return None
    slowest = max(beats, key=lambda beat: (-beat["step"], beat["seconds_in_phase"]))
    return f"{slowest['phase']} of step {slowest['step'] + 1} for {slowest['seconds_in_phase']:.0f} s"


def _described(beat: dict[str, Any], now: float) -> str:
    who = f"rank {beat['rank']} on {beat['host']} (process {beat['pid']})"
    if is_silent(beat, now):
        return f"{who} has given no sign of life for {now - beat['time']:.0f} s"
    return f"{who} is in the phase {beat['phase']} of step {beat['step'] + 1} for {beat['seconds_in_phase']:.0f} s"
