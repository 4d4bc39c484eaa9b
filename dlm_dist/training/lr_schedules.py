"""Learning-rate schedules: each a pure function of the step, never of what ran before."""

from __future__ import annotations

import math
from collections.abc import Callable


def constant(progress: float, floor: float) -> float:
    """1 throughout."""
    return 1.0


def linear(progress: float, floor: float) -> float:
    """A straight line from 1 to `floor`."""
    return 1.0 - (1.0 - floor) * progress


def cosine(progress: float, floor: float) -> float:
    """Half a cosine from 1 to `floor`."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": linear,  # of its last steps
}


def lr_factor(
    name: str, step: int, max_steps: int, warmup_steps: int, min_lr_ratio: float, decay_steps: int | None = None
) -> float:
    """Factor on the peak learning rate for `step` (0-based, the step about to be taken).

    Linear warm-up over `warmup_steps` steps (the first step has 1/warmup_steps of the peak), then the schedule
    from 1 at the end of the warm-up to `min_lr_ratio` at the last step. "wsd" (warm-up, stable, decay) stays at 1
    until `decay_steps` before the end and falls linearly from there.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    first = warmup_steps
    if name == "wsd":
        assert decay_steps is not None
        first = max(first, max_steps - 1 - decay_steps)
    progress = (step - first) / max(1, max_steps - 1 - first)
    return SCHEDULES[name](min(1.0, max(0.0, progress)), min_lr_ratio)
