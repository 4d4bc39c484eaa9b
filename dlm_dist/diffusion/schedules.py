"""Noise schedules: the share of hidden tokens as a function of time.

A schedule is one increasing function `rate(t)` with rate(0) = 0 and rate(1) = 1, its derivative and its
inverse. With t uniform on [0, 1] the unbiased weight of a token hidden at time t is rate'(t) / rate(t); every
schedule that reaches both ends gives the same bound in expectation and differs in variance only
(Shi et al., "Simplified and Generalized Masked Diffusion", 2024; Sahoo et al., MDLM, 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """`rate`, `derivative` and `inverse` map float64 arrays of any shape elementwise."""

    name: str
    rate: Callable[[Array], Array]
    derivative: Callable[[Array], Array]
    inverse: Callable[[Array], Array]


SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        # rate(t) = t: LLaDA, MDLM's log-linear schedule in its own time.
        Schedule(
            "linear",
            rate=lambda t: t,
            derivative=np.ones_like,
            inverse=lambda rate: rate,
        ),
        # rate(t) = 1 - cos(pi t / 2): MaskGIT's cosine schedule; more time is spent at few hidden tokens.
        Schedule(
            "cosine",
            rate=lambda t: 1.0 - np.cos(0.5 * np.pi * t),
            derivative=lambda t: 0.5 * np.pi * np.sin(0.5 * np.pi * t),
            inverse=lambda rate: 2.0 / np.pi * np.arccos(np.clip(1.0 - rate, -1.0, 1.0)),
        ),
    )
}
