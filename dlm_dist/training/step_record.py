"""One line of metrics.jsonl: what is known of a step that has ended (docs/metrics.md says what each figure means)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dlm_dist.training.batches import StepTotals
from dlm_dist.training.phases import PHASES
from dlm_dist.training.progress import Progress


def place_figures(progress: Progress, positions: tuple[int, int], skipped: str | None) -> dict[str, Any]:
    """Where the run stands after the step that held `positions`, and why its update was left out, if it was."""
    return {
        "step": progress.step,
        "data_pos": progress.data_pos,
        "tokens_seen": progress.tokens_seen,
        "positions": list(positions),
        "skipped": skipped is not None,
        "skip_reason": skipped,
        "skipped_steps": progress.skipped_steps,
        "rollbacks": progress.rollbacks,
    }


def loss_figures(loss: float, totals: StepTotals, is_bound: bool) -> dict[str, Any]:
    """What was learned from, and how well it was predicted: `loss` in nats per token."""
    bits = loss * totals.denominator / math.log(2.0)
    return {
        "loss": loss,
        "bound_nats_per_token": loss if is_bound else None,
        "bits_per_byte": bits / totals.text_bytes if is_bound and totals.text_bytes else None,
        "rows_sha256": totals.rows_sha256,
        "noise_sha256": totals.noise_sha256,
    }


def speed_figures(
    flops: float, totals: StepTotals, seconds: float, phases: Mapping[str, float], peak_flops: float
) -> dict[str, Any]:
    """How long it took: `seconds` in all for `flops` of the model, `phases` from PhaseClock.

    `peak_flops` (FLOP/s) is that of all ranks.
    """
    return {
        "tokens_per_second": totals.denominator / seconds,
        "mfu": flops / seconds / peak_flops,
        "step_seconds": seconds,
        "data_wait_seconds": phases["data"],
        **{f"{name}_seconds": phases[name] for name in PHASES if name != "data"},
    }
