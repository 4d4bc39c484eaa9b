"""Finished or running runs side by side: what they came to, in what their configurations differ, and whether their
numbers may be compared at all. Needs no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm_dist.runs.folder import flat, newest_records, read_config

WINDOW = 100
"""Steps over which a training loss and a speed are averaged."""

_PLACE = ("run.dir", "logging.", "train.device")
"""Where a run is and who hears of it: no difference between runs."""

_OTHER_NUMBER = {
    "objective.name": "their training losses are different numbers",
    "objective.weighting": "their training losses are weighted differently",
    "objective.normalization": "their training losses are divided by different counts",
    "objective.block_lengths": "their bounds are those of different blocks",
    "data.sequence_length": "a token sees contexts of different lengths",
    "data.isolate_documents": "a token sees different contexts",
    "data.tokenizer": "their tokens are different units: compare bits per byte",
    "train.eval_rows": "their bounds are over different held-out rows",
    "train.eval_draws": "their bounds have different spreads",
}
"""Keys whose difference makes a number another number, and what of it."""


@dataclass(frozen=True)
class RunSummary:
    """What one run came to; None for what it does not have."""

    path: str
    config: dict[str, Any]
    """By full key, what says only where the run is left out."""
    step: int | None = None
    loss: float | None = None
    """Mean of the last WINDOW steps that updated the weights (nats per token)."""
    loss_error: float | None = None
    """Standard error of that mean."""
    evaluated_step: int | None = None
    bound: float | None = None
    """Of the newest evaluation, nats per token."""
    bound_error: float | None = None
    exact: bool | None = None
    bits_per_byte: float | None = None
    bits_per_byte_error: float | None = None
    held_out: str | None = None
    """Fingerprint of the held-out data."""
    tokens_per_second: float | None = None
    """Median of the last WINDOW steps."""
    skipped_steps: int | None = None


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ by run.seed alone: means, and standard deviations over the seeds (None for fewer than two)."""

    paths: tuple[str, ...]
    values: dict[str, Any]
    """Of the keys in which the groups differ."""
    loss: tuple[float, float | None] | None
    bound: tuple[float, float | None] | None
    bits_per_byte: tuple[float, float | None] | None


def summarise(run: Path) -> RunSummary:
    """Read one run. Raises ConfigError or ValueError where its files are not those of a run."""
    config = {key: value for key, value in flat(read_config(run)) if not key.startswith(_PLACE)}
    records = newest_records(run / "metrics.jsonl", WINDOW)
    evaluations = newest_records(run / "evaluations.jsonl", 1)
    losses = [record["loss"] for record in records if not record["skipped"] and record["loss"] is not None]
    summary: dict[str, Any] = {}
    if records:
        speeds = [record["tokens_per_second"] for record in records]
        summary |= {"step": records[-1]["step"], "skipped_steps": records[-1]["skipped_steps"]}
        summary["tokens_per_second"] = statistics.median(speeds)
    if losses:
        error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
        summary |= {"loss": statistics.fmean(losses), "loss_error": error}
    if evaluations:
        summary |= _evaluated(evaluations[0])
    return RunSummary(str(run), config, **summary)


def _evaluated(record: dict[str, Any]) -> dict[str, Any]:
    bound, error, bits = record["bound_nats_per_token"], record["standard_error"], record["bits_per_byte"]
    known = bits is not None and error is not None and bound
    return {
        "evaluated_step": record["step"],
        "bound": bound,
        "bound_error": error,
        "exact": record["exact"],
        "bits_per_byte": bits,
        # The bytes behind the rows are a constant: the relative error is that of the bound.
        "bits_per_byte_error": bits * error / bound if known else None,
        "held_out": record.get("held_out"),
    }


def differing_keys(runs: Sequence[RunSummary]) -> list[str]:
    """The keys whose values are not the same in all runs, in the order of the configuration."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [key for key in keys if any(run.config.get(key) != runs[0].config.get(key) for run in runs)]


def group_by_seed(runs: Sequence[RunSummary]) -> list[SeedGroup]:
    """Groups of runs that differ by run.seed alone, in the order of their first runs."""
    keys = [key for key in differing_keys(runs) if key != "run.seed"]
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:
        groups.setdefault(repr([run.config.get(key) for key in keys]), []).append(run)
    return [
        SeedGroup(
            tuple(run.path for run in group),
            {key: group[0].config.get(key) for key in keys},
            *(_spread([getattr(run, name) for run in group]) for name in ("loss", "bound", "bits_per_byte")),
        )
        for group in groups.values()
    ]


def _spread(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def notes(runs: Sequence[RunSummary]) -> list[str]:
    """Why numbers of these runs may not be comparable, a sentence each."""
    differing = differing_keys(runs)
    found = [
        f"{key} differs ({_listed(runs, key)}): {consequence}"
        for key, consequence in _OTHER_NUMBER.items()
        if key in differing
    ]
    data = {run.held_out for run in runs if run.held_out is not None}
    if len(data) > 1:
        found.append(f"{len(data)} different sets of held-out rows: their bounds are not comparable")
    elif "data.validation" in differing and any(run.bound is not None and run.held_out is None for run in runs):
        found.append("data.validation differs, and older runs do not tell which rows are in it")
    if len({run.exact for run in runs if run.exact is not None}) > 1:
        found.append("some bounds are the exact likelihood, others lie above it")
    for what, steps in (
        ("stand at", {run.step for run in runs if run.step is not None}),
        ("were evaluated at", {run.evaluated_step for run in runs if run.evaluated_step is not None}),
    ):
        if len(steps) > 1:
            found.append(f"the runs {what} different steps, {min(steps):,} to {max(steps):,}")
    return found


def _listed(runs: Sequence[RunSummary], key: str) -> str:
    return ", ".join(dict.fromkeys(str(run.config.get(key)) for run in runs))
