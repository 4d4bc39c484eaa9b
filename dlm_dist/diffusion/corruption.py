"""What is hidden from the model, as a pure function of (seed, global sample position).

Every draw here (time, masked set, truncation length) is keyed by the sample's position in the data order, so
the noise of a sample is the same on any number of ranks, in any batch split, and after any resume. Host side
and numpy only: it runs in the loader's threads, so the denominators of a step are known before its first
forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dlm_dist import randomness
from dlm_dist.diffusion.schedules import Schedule

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

TIME_WINDOW_BITS = 16
"""Times are stratified over aligned windows of 2**16 positions."""


@dataclass(frozen=True)
class NoisyBatch:
    """A corrupted batch: what the model sees, and what it is asked.

    Targets come aligned with inputs: the model's output at a position is scored against the target there.
    """

    inputs: IntArray
    """[B, T] what the model reads."""
    targets: IntArray
    """[B, T] clean ids; only those with a positive weight are scored."""
    weights: NDArray[np.float32]
    """[B, T] weight of each cross entropy (nats) in the loss sum; 0 where a token is not scored."""
    document_ids: NDArray[np.int32] | None
    """[B, T] tokens see each other only where ids agree, -1 is not there; None: every row is one document."""
    times: FloatArray
    """[B] diffusion time of each sample, in [0, 1)."""
    lengths: IntArray
    """[B] tokens of each sample that are there (random-length truncation cuts the rest)."""
    positions: IntArray
    """[B] global sample positions."""
    text_bytes: IntArray
    """[B] bytes of text that the `lengths` tokens stand for; -1 where unknown."""

    @property
    def denominator(self) -> int:
        """Tokens that this batch accounts for: the loss is the sum of weighted nats per such token."""
        return int(self.lengths.sum())

    @property
    def masks(self) -> BoolArray:
        """[B, T] where the input was changed to the mask token or is scored."""
        return self.weights > 0


def stratified_times(seed: int, positions: IntArray) -> FloatArray:
    """Times in [0, 1) for `positions` [B] -> [B], uniform each, stratified over any aligned block of positions.

    Within each window of 2**16 positions this is van der Corput's sequence in base 2 under two keyed nested
    scrambles (Owen, "Randomly permuted (t,m,s)-nets", 1995): any aligned block of 2**m positions has exactly one
    time in each interval of length 2**-m, whatever batch it is cut into. The scramble of the index decides which
    position gets which interval, that of the digits where in the interval its time lies.
    """
    bits = TIME_WINDOW_BITS
    key = randomness.derive_seed(seed, "time")
    window = randomness.hash_uint64(key, positions >> bits)
    index = _nested_scramble(key + 1, window, positions & ((1 << bits) - 1))
    reversed_index = np.zeros_like(index)
    for bit in range(bits):
        reversed_index |= ((index >> np.uint64(bit)) & np.uint64(1)) << np.uint64(bits - 1 - bit)
    fraction = _nested_scramble(key + 2, window, reversed_index)
    jitter = randomness.to_unit_interval(randomness.hash_uint64(key + 3, positions))
    return (fraction.astype(np.float64) + jitter) * 2.0**-bits


def _nested_scramble(key: int, window: NDArray[np.uint64], values: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Flip each of the 16 bits of `values` by a hash of the bits above it: a bijection that keeps aligned blocks."""
    values = values.astype(np.uint64)
    result = np.zeros_like(values)
    for bit in range(TIME_WINDOW_BITS):
        above = values >> np.uint64(bit + 1)
        # A leading one tells the levels apart, so that equal prefixes of different length hash differently.
        prefix = above | np.uint64(1 << (TIME_WINDOW_BITS - bit))
        flip = randomness.hash_uint64(key, window ^ prefix)
        result |= (((values >> np.uint64(bit)) ^ flip) & np.uint64(1)) << np.uint64(bit)
    return result


def random_lengths(seed: int, positions: IntArray, sequence_length: int, probability: float) -> IntArray:
    """Tokens kept of each sample [B]: all, or with `probability` a length uniform on 1..sequence_length.

    LLaDA's random-length pretraining (ML-GSAI/LLaDA, GUIDELINES.md), decided per sample.
    """
    lengths = np.full(len(positions), sequence_length, dtype=np.int64)
    if probability <= 0.0:
        return lengths
    for i, position in enumerate(positions):
        chance, share = randomness.uniform(seed, "random_length", int(position), 2)
        if chance < probability:
            lengths[i] = 1 + int(share * sequence_length)
    return lengths


def keyed_words(seed: int, positions: IntArray, sequence_length: int) -> NDArray[np.uint64]:
    """One 64-bit word per token [B, T], keyed by (seed, position); token i's word ignores T."""
    return np.stack([randomness.uint64(seed, "mask", int(position), sequence_length) for position in positions])


def exact_count_masks(
    schedule: Schedule, times: FloatArray, lengths: IntArray, words: NDArray[np.uint64]
) -> tuple[BoolArray, FloatArray]:
    """Hide exactly k of the l tokens of each sample -> (masks [B, T], weight of each hidden token [B]).

    k = ceil(rate(t) * l) has probability q_k = rate^-1(k/l) - rate^-1((k-1)/l); each of the k tokens then weighs
    1 / (q_k * k), which makes the sum over a sample an unbiased estimate of its negative evidence bound in
    nats. For the linear schedule q_k = 1/l and the weight is l/k (the estimator of MegaDLMs and of LLaDA's
    likelihood evaluation). Conditioning on k removes the variance of independent Bernoulli draws.
    """
    counts = np.clip(np.ceil(schedule.rate(times) * lengths), 1, lengths).astype(np.int64)
    probability = schedule.inverse(counts / lengths) - schedule.inverse((counts - 1) / lengths)
    there = np.arange(words.shape[1]) < lengths[:, None]
    # The k smallest words of the tokens that are there; ties between 64-bit words go to the lower index.
    order = np.argsort(np.where(there, words, np.uint64(2**64 - 1)), axis=1, kind="stable")
    masks = np.zeros(words.shape, dtype=np.bool_)
    np.put_along_axis(masks, order, np.arange(words.shape[1]) < counts[:, None], axis=1)
    return masks & there, 1.0 / (probability * counts)


def bernoulli_masks(
    schedule: Schedule, times: FloatArray, lengths: IntArray, words: NDArray[np.uint64]
) -> tuple[BoolArray, FloatArray]:
    """Hide each token by itself with probability rate(t) -> (masks [B, T], weight of a hidden token [B]).

    The weight is rate'(t) / rate(t): LLaDA's 1/p for the linear schedule. A sample may have no hidden token.
    """
    rates = schedule.rate(times)
    there = np.arange(words.shape[1]) < lengths[:, None]
    masks = (randomness.to_unit_interval(words) < rates[:, None]) & there
    return masks, schedule.derivative(times) / np.maximum(rates, np.finfo(np.float64).tiny)


MASKINGS = {"exact": exact_count_masks, "bernoulli": bernoulli_masks}
