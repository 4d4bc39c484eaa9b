"""Noise schedules: the share of hidden tokens as a function of time.

A schedule is one increasing function `rate(t)` with rate(0) = 0 and rate(1) = 1, its derivative and its
inverse. With t uniform on [0, 1] the unbiased weight of a token hidden at time t is rate'(t) / rate(t); every
schedule that reaches both ends gives the same bound in expectation and differs in variance only
(Shi et al., "Simplified and Generalized Masked Diffusion", 2024; Sahoo et al., MDLM, 2024).

Published formulas that stop short of 0 or 1 (sigmoid, geometric, log-linear) are rescaled to
(raw(t) - raw(0)) / (raw(1) - raw(0)): the shares that they leave out belong to the bound as well, and a rescaled
schedule needs no second kind of term for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ALIASES = {"uniform": "linear", "log_linear": "linear"}
"""Other names of `linear`. MDLM's log-linear noise, share (1 - eps) t, is t once it is rescaled to reach 1."""

_GRID = 4097
_SLACK = 1e-9


@dataclass(frozen=True)
class Schedule:
    """`rate`, `derivative` and `inverse` map float64 arrays of any shape elementwise, times and rates in [0, 1].

    `derivative` is that of `rate`, which may be infinite at t = 0 and at t = 1; `formula` says what rate(t) is.
    `parameters` are those that it was made with, by the names of its maker's arguments.

    Raises ValueError where rate(t) leaves [0, 1], does not reach both ends, or does not rise everywhere.
    """

    name: str
    formula: str
    rate: Callable[[Array], Array]
    derivative: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    parameters: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rates = self.rate(np.linspace(0.0, 1.0, _GRID))
        if not (rates.min() >= -_SLACK and rates.max() <= 1.0 + _SLACK):
            raise ValueError(
                f"The schedule {self.name} hides shares from {rates.min():g} to {rates.max():g} of the tokens: "
                "expected shares within 0 and 1."
            )
        if not (abs(rates[0]) <= _SLACK and abs(rates[-1] - 1.0) <= _SLACK):
            raise ValueError(
                f"The schedule {self.name} hides a share of {rates[0]:g} at t = 0 and {rates[-1]:g} at t = 1: "
                "expected 0 and 1, else the loss is no bound."
            )
        # Flat pieces are no less of a problem than falls: a flat rate has no inverse.
        falls = np.flatnonzero(np.diff(rates) <= 0.0)
        if len(falls):
            raise ValueError(
                f"The schedule {self.name} does not rise at t = {falls[0] / (_GRID - 1):.3g}: expected a share of "
                "hidden tokens that grows with t everywhere."
            )


def linear() -> Schedule:
    """rate(t) = t (LLaDA; MDLM's log-linear noise in its own time)."""
    return Schedule("linear", "t", rate=lambda t: t, derivative=np.ones_like, inverse=lambda rate: rate)


def cosine() -> Schedule:
    """rate(t) = 1 - cos(pi t / 2) (MaskGIT): more time is spent at few hidden tokens."""
    return Schedule(
        "cosine",
        "1 - cos(pi t / 2)",
        rate=lambda t: 1.0 - np.cos(0.5 * np.pi * t),
        derivative=lambda t: 0.5 * np.pi * np.sin(0.5 * np.pi * t),
        inverse=lambda rate: 2.0 / np.pi * np.arccos(np.clip(1.0 - rate, -1.0, 1.0)),
    )


def cosine_squared() -> Schedule:
    """rate(t) = 1 - cos^2(pi t / 2) = (1 - cos(pi t)) / 2: more time at both ends (MDLM; Nano-LLaDA's `wsd`)."""
    return Schedule(
        "cosine_squared",
        "1 - cos^2(pi t / 2)",
        rate=lambda t: np.sin(0.5 * np.pi * t) ** 2,
        derivative=lambda t: 0.5 * np.pi * np.sin(np.pi * t),
        inverse=lambda rate: 2.0 / np.pi * np.arcsin(np.sqrt(np.clip(rate, 0.0, 1.0))),
    )


def power(exponent: float = 2.0) -> Schedule:
    """rate(t) = t^exponent: above 1 more time at few hidden tokens, below 1 at many. 0.5 <= exponent <= 20.

    Below 0.5 the few samples with few hidden tokens, which the bound needs, would in practice never be drawn.
    """
    if not 0.5 <= exponent <= 20.0:
        raise ValueError(f"The schedule power has exponent {exponent}: expected a number from 0.5 to 20.")
    return Schedule(
        "power",
        "t^exponent",
        rate=lambda t: t**exponent,
        derivative=lambda t: exponent * np.maximum(t, np.finfo(np.float64).tiny) ** (exponent - 1.0),
        inverse=lambda rate: rate ** (1.0 / exponent),
        parameters={"exponent": exponent},
    )


def sigmoid(steepness: float = 12.0) -> Schedule:
    """raw(t) = 1 / (1 + exp(-steepness (t - 1/2))), rescaled: little time in the middle. 0 < steepness <= 40.

    Unscaled, it stops exp(-steepness / 2) short of both ends.
    """
    if not 0.0 < steepness <= 40.0:
        raise ValueError(f"The schedule sigmoid has steepness {steepness}: expected a number above 0, at most 40.")
    low = 1.0 / (1.0 + math.exp(0.5 * steepness))
    span = math.tanh(0.25 * steepness)  # raw(1) - raw(0)

    def raw(t: Array) -> Array:
        return 1.0 / (1.0 + np.exp(-steepness * (t - 0.5)))

    def inverse(rate: Array) -> Array:
        share = low + span * rate
        # 1 - share, without cancellation at the upper end.
        return np.clip(0.5 + np.log(share / (low + span * (1.0 - rate))) / steepness, 0.0, 1.0)

    return Schedule(
        "sigmoid",
        "(raw(t) - raw(0)) / (raw(1) - raw(0)) with raw(t) = 1 / (1 + exp(-steepness (t - 1/2)))",
        rate=lambda t: np.clip((raw(t) - low) / span, 0.0, 1.0),
        derivative=lambda t: steepness / span * raw(t) * raw(1.0 - t),
        inverse=inverse,
        parameters={"steepness": steepness},
    )


def geometric(sigma_min: float = 1e-4, sigma_max: float = 20.0) -> Schedule:
    """raw(t) = 1 - exp(-sigma(t)), sigma(t) = sigma_min^(1 - t) sigma_max^t, rescaled (SEDD's geometric noise).

    Lou et al., "Discrete Diffusion Modeling by Estimating the Ratios of the Data Distribution", 2024. Unscaled, it
    goes from about sigma_min to 1 - exp(-sigma_max). Half of the time is spent where almost nothing is hidden.
    """
    if not 0.0 < sigma_min < sigma_max <= 30.0:
        raise ValueError(
            f"The schedule geometric has sigma from {sigma_min} to {sigma_max}: expected two rising numbers above 0, "
            "at most 30."
        )
    growth = math.log(sigma_max / sigma_min)
    span = -math.expm1(sigma_min - sigma_max)  # (raw(1) - raw(0)) * exp(sigma_min)

    def above(t: Array) -> Array:
        return sigma_min * np.expm1(growth * t)  # sigma(t) - sigma_min

    return Schedule(
        "geometric",
        "(raw(t) - raw(0)) / (raw(1) - raw(0)) with raw(t) = 1 - exp(-sigma_min^(1 - t) sigma_max^t)",
        rate=lambda t: np.clip(-np.expm1(-above(t)) / span, 0.0, 1.0),
        derivative=lambda t: growth * (sigma_min + above(t)) * np.exp(-above(t)) / span,
        inverse=lambda rate: np.clip(np.log1p(-np.log1p(-span * rate) / sigma_min) / growth, 0.0, 1.0),
        parameters={"sigma_min": sigma_min, "sigma_max": sigma_max},
    )


def table(points: Sequence[float]) -> Schedule:
    """A schedule of one's own: straight lines through shares of hidden tokens at equally spaced times from 0 to 1."""
    if len(points) < 2:
        raise ValueError(f"The schedule table has {len(points)} points: expected at least two, 0 first and 1 last.")
    shares = np.asarray(points, dtype=np.float64)
    times = np.linspace(0.0, 1.0, len(shares))
    slopes = np.diff(shares) * (len(shares) - 1)

    def derivative(t: Array) -> Array:
        return slopes[np.minimum((t * len(slopes)).astype(np.int64), len(slopes) - 1)]

    return Schedule(
        "table",
        "straight lines through the points",
        rate=lambda t: np.interp(t, times, shares),
        derivative=derivative,
        inverse=lambda rate: np.interp(rate, shares, times),
        parameters={"points": tuple(points)},
    )


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "cosine": cosine,
    "cosine_squared": cosine_squared,
    "power": power,
    "sigmoid": sigmoid,
    "geometric": geometric,
    "table": table,
}
"""Makers by name; their arguments are the schedule's parameters."""


def make_schedule(name: str, **parameters: object) -> Schedule:
    """The schedule `name` or one of ALIASES. Raises ValueError for a name or parameters that make none."""
    name = ALIASES.get(name, name)
    if name not in SCHEDULES:
        known = ", ".join(sorted({*SCHEDULES, *ALIASES}))
        raise ValueError(f"The schedule {name} does not exist: expected one of {known}.")
    return SCHEDULES[name](**parameters)
