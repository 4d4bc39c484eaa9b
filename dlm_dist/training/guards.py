"""Guards against bad steps: which losses and gradient norms are no longer believed.

A verdict is a function of numbers that all ranks share and of windows that are in the checkpoint, so every rank and
every replay of a step comes to the same one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dlm_dist.training.progress import Progress

_MAD_TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, for normal values."""

_LEAST_DEVIATION = 1e-3
"""Of the median: a window of equal values must not make the next one a spike."""

_LEAST_VALUES = 16
"""Fewer steps than these say nothing about what is usual."""


@dataclass(frozen=True)
class Guards:
    """The limits of a run, in robust standard deviations above the median of the window; None: no limit."""

    loss_spike: float | None = None
    grad_norm_spike: float | None = None
    window: int = 128

    def refuses_loss(self, loss: float, progress: Progress) -> str | None:
        """Why the step that follows `progress` must not update the weights, judged by its loss; None if it may."""
        if not math.isfinite(loss):
            return "the loss is not finite"
        if (progress.step + 1) in progress.condemned:
            return progress.condemned[progress.step + 1]
        return _spike("the loss", loss, progress.losses, self.loss_spike)

    def refuses_norm(self, norm: float, progress: Progress) -> str | None:
        """Why the update just made after `progress` must be taken back, judged by its gradient norm."""
        return _spike("the gradient norm", norm, progress.gradient_norms, self.grad_norm_spike)

    def remember(self, loss: float, norm: float | None, progress: Progress) -> None:
        """Add an accepted step to the windows that a limit reads."""
        if self.loss_spike is not None:
            progress.losses = [*progress.losses, loss][-self.window :]
        if self.grad_norm_spike is not None:
            assert norm is not None
            progress.gradient_norms = [*progress.gradient_norms, norm][-self.window :]


def _spike(what: str, value: float, window: Sequence[float], limit: float | None) -> str | None:
    if limit is None or len(window) < _LEAST_VALUES:
        return None
    deviations = robust_deviations(value, window)
    if deviations <= limit:
        return None
    return f"{what}, {value:.4g}, lies {deviations:.1f} robust deviations above the last {len(window)}"


def robust_deviations(value: float, window: Sequence[float]) -> float:
    """(value - median) / (1.4826 * median absolute deviation) of `window`."""
    median = statistics.median(window)
    spread = _MAD_TO_SIGMA * statistics.median(abs(x - median) for x in window)
    return (value - median) / max(spread, _LEAST_DEVIATION * abs(median), 1e-30)
