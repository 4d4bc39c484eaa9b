"""What the cross entropy of a hidden token weighs in the loss.

`elbo` makes the loss an unbiased estimate of the negative evidence bound in nats. The others are named choices of
people who train for other ends; of them only `inverse_rate` is the bound as well, and only for the linear schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dlm_dist.diffusion.base import BoolArray, FloatArray, IntArray
from dlm_dist.diffusion.schedules import Schedule

_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Level:
    """How much of each sample is hidden, before it is decided which tokens.

    schedule: that of the times. times [B]. rates [B]: probability of a token to be hidden. sizes [B]: tokens that may
    be hidden. counts [B]: how many of them are, None where each is hidden by itself.
    """

    schedule: Schedule
    times: FloatArray
    rates: FloatArray
    sizes: IntArray
    counts: IntArray | None

    @classmethod
    def at(cls, schedule: Schedule, times: FloatArray, sizes: IntArray, exact: bool, min_rate: float = 0.0) -> Level:
        """The level of `times` [B]; `exact`: ceil(rate * size) tokens are hidden, at least one where there is one."""
        rates = np.maximum(schedule.rate(times), min_rate)
        counts = None
        if exact:
            counts = np.clip(np.ceil(rates * sizes).astype(np.int64), np.minimum(1, sizes), sizes)
        return cls(schedule, times, rates, sizes, counts)

    def of(self, samples: IntArray) -> Level:
        """The levels of `samples` [S]."""
        counts = None if self.counts is None else self.counts[samples]
        return Level(self.schedule, self.times[samples], self.rates[samples], self.sizes[samples], counts)

    def where(self, chosen: BoolArray, other: Level) -> Level:
        """`other` for the samples that are `chosen` [B], this one for the rest."""
        counts = None
        if self.counts is not None and other.counts is not None:
            counts = np.where(chosen, other.counts, self.counts)
        return Level(
            self.schedule,
            np.where(chosen, other.times, self.times),
            np.where(chosen, other.rates, self.rates),
            self.sizes,
            counts,
        )

    def complement(self) -> Level:
        """The level at which just those tokens are hidden that are visible at this one."""
        rates = 1.0 - self.rates
        counts = None if self.counts is None else self.sizes - self.counts
        return Level(self.schedule, self.schedule.inverse(rates), rates, self.sizes, counts)

    @property
    def shares(self) -> FloatArray:
        """[B] share of tokens that is hidden, or with which each is."""
        if self.counts is None:
            return np.maximum(self.rates, _TINY)
        return np.maximum(self.counts, 1) / np.maximum(self.sizes, 1)


def elbo(level: Level, complementary: float) -> FloatArray:
    """The unbiased weight of a hidden token [B].

    Each by itself: rate' / rate, as the share r = rate(t) of a uniform t has density f(r) = 1 / rate'(t), so 1 / (f r).
    Counted: k of l tokens are hidden with probability q_k = rate^-1(k/l) - rate^-1((k-1)/l), and each weighs
    1 / (q_k k). For the linear schedule that is l / k (MegaDLMs, LLaDA's likelihood evaluation); conditioning on k
    removes the variance of independent draws.

    `complementary`: share of second draws that are the complement of the first. Of such a pair the density f (or q_k)
    is replaced by the mean over both draws, ((2 - c) f(r) + c f(1 - r)) / 2: multiple importance sampling with the
    balance heuristic (Veach and Guibas, "Optimally combining sampling techniques", 1995). So the complement of
    "everything" is no bias.
    """
    schedule = level.schedule
    if level.counts is None:
        if not complementary:
            return schedule.derivative(level.times) / level.shares
        other = schedule.inverse(1.0 - level.rates)
        here, there = (1.0 / np.maximum(schedule.derivative(t), _TINY) for t in (level.times, other))
        with np.errstate(over="ignore"):
            return 2.0 / (((2.0 - complementary) * here + complementary * there) * level.shares)
    sizes, counts = np.maximum(level.sizes, 1), np.maximum(level.counts, 1)
    probability = _count_probability(schedule, counts, sizes)
    if complementary:
        mirrored = _count_probability(schedule, sizes - counts, sizes)
        probability = 0.5 * ((2.0 - complementary) * probability + complementary * mirrored)
    return 1.0 / (probability * counts)


def _count_probability(schedule: Schedule, counts: IntArray, sizes: IntArray) -> FloatArray:
    """Probability of ceil(rate(t) * size) = count for a uniform t; 0 for a count of 0."""
    below = schedule.inverse(np.maximum(counts - 1, 0) / sizes)
    return schedule.inverse(counts / sizes) - below


def inverse_rate(level: Level, complementary: float) -> FloatArray:
    """1 / p: LLaDA's weight, for any schedule."""
    return 1.0 / level.shares


def none(level: Level, complementary: float) -> FloatArray:
    """1."""
    return np.ones_like(level.times)


def one_minus_t(level: Level, complementary: float) -> FloatArray:
    """1 - t: Dream's `linear` time reweighting."""
    return 1.0 - level.times


def snr(level: Level, complementary: float) -> FloatArray:
    """(1 - p) / p: the signal-to-noise ratio of the masked process, visible over hidden; 0 where all is hidden."""
    return (1.0 - level.shares) / level.shares


SAMPLE_WEIGHTINGS: dict[str, Callable[[Level, float], FloatArray]] = {
    "elbo": elbo,
    "inverse_rate": inverse_rate,
    "none": none,
    "one_minus_t": one_minus_t,
    "snr": snr,
}
"""Weights that all hidden tokens of a sample share, by name."""

TOKEN_WEIGHTINGS = ("cart", "soft_tail")
"""Weights that depend on where the other hidden tokens are: `cart_weights` and `recency_weights`."""


def cart_weights(masks: BoolArray, document_ids: NDArray[np.int32], p: float) -> FloatArray:
    """Dream's context-adaptive weight of each token [B, T]: what is visible near it.

    w_i = sum over visible j of p (1 - p)^(|i - j| - 1) / 2, j != i: symmetric and geometric (Ye et al., "Dream 7B",
    2025; there too without 1 / t). `document_ids` [B, T]: only tokens of the same document are seen; -1 is not there.
    """
    length = masks.shape[1]
    # Beyond this distance all the rest together weighs less than 1e-9.
    reach = length - 1 if p <= 0.0 else min(length - 1, int(np.ceil(np.log(1e-9) / np.log1p(-min(p, 0.999999)))) + 1)
    near = 0.5 * p * (1.0 - p) ** np.arange(reach)
    kernel = np.concatenate([near[::-1], [0.0], near])
    weights = np.zeros(masks.shape)
    for i, documents in enumerate(document_ids):
        for document in np.unique(documents[documents >= 0]):
            visible = (documents == document) & ~masks[i]
            seen = np.convolve(visible.astype(np.float64), kernel)[reach : reach + length]
            weights[i] += np.where(documents == document, seen, 0.0)
    return weights


def recency_weights(masks: BoolArray, p: float, beta: float, document_ids: NDArray[np.int32]) -> FloatArray:
    """CARD's weight of each token [B, T]: the less, the more hidden tokens precede it closely.

    w_n = 1 / (beta + S), S = sum over i < n of C_i (1 - p)^(n - 1 - i), C_i = 1 for a hidden token and 2 where the one
    before is hidden as well (arXiv 2601.22031). `document_ids` [B, T]: only tokens of the same document count.
    """
    same = document_ids[:, 1:] == document_ids[:, :-1]
    cost = masks.astype(np.float64)
    cost[:, 1:] += masks[:, 1:] & masks[:, :-1] & same
    weights = np.empty(masks.shape)
    total = np.zeros(len(masks))
    for n in range(masks.shape[1]):
        if n:
            total = np.where(same[:, n - 1], total, 0.0)
        weights[:, n] = 1.0 / (beta + total)
        total = cost[:, n] + (1.0 - p) * total
    return weights
