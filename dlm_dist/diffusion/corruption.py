"""The draws of the forward process, as pure functions of (seed, global sample position).

Every draw here (time, hidden set, truncation length, replaced tokens) is keyed by the sample's position in the
data order, so the noise of a sample is the same on any number of ranks, in any batch split, and after any resume.
Host side and numpy only: it runs in the loader's threads, so the denominators of a step are known before its
first forward.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dlm_dist import randomness
from dlm_dist.diffusion.base import BoolArray, FloatArray, IntArray

TIME_WINDOW_BITS = 16
"""Times are stratified over aligned windows of 2**16 positions."""


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
    levels = np.arange(bits, dtype=np.uint64).reshape(-1, *[1] * index.ndim)
    digits = (index >> levels) & np.uint64(1)
    reversed_index = np.bitwise_or.reduce(digits << levels[::-1], axis=0)
    fraction = _nested_scramble(key + 2, window, reversed_index)
    jitter = randomness.to_unit_interval(randomness.hash_uint64(key + 3, positions))
    return (fraction.astype(np.float64) + jitter) * 2.0**-bits


def _nested_scramble(key: int, window: NDArray[np.uint64], values: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Flip each of the 16 bits of `values` by a hash of the bits above it: a bijection that keeps aligned blocks."""
    values = values.astype(np.uint64)
    levels = np.arange(TIME_WINDOW_BITS, dtype=np.uint64).reshape(-1, *[1] * values.ndim)
    one = np.uint64(1)
    # A leading one tells the levels apart, so that equal prefixes of different length hash differently.
    prefixes = (values >> (levels + one)) | (one << (np.uint64(TIME_WINDOW_BITS) - levels))
    flips = randomness.hash_uint64(key, window ^ prefixes)
    return np.bitwise_or.reduce((((values >> levels) ^ flips) & one) << levels, axis=0)


def keyed_uniform(seed: int, purpose: str, positions: IntArray) -> FloatArray:
    """One number in [0, 1) for each position [B]."""
    return randomness.to_unit_interval(randomness.hash_uint64(randomness.derive_seed(seed, purpose), positions))


def keyed_words(seed: int, positions: IntArray, length: int, purpose: str = "mask") -> NDArray[np.uint64]:
    """One 64-bit word per token [B, length], keyed by (seed, purpose, position); token i's ignores the length."""
    return np.stack([randomness.uint64(seed, purpose, int(position), length) for position in positions])


def random_lengths(
    seed: int, positions: IntArray, sequence_length: int, probability: float, group: int = 1
) -> IntArray:
    """Tokens kept of each sample [B]: all, or with `probability` a length uniform on 1..sequence_length.

    LLaDA's random-length pretraining (ML-GSAI/LLaDA, GUIDELINES.md), decided once for every aligned group of `group`
    positions: 1 is per sample, LLaDA cuts a whole micro-batch.
    """
    lengths = np.full(len(positions), sequence_length, dtype=np.int64)
    if probability <= 0.0:
        return lengths
    for i, position in enumerate(positions):
        chance, share = randomness.uniform(seed, "random_length", int(position) // group, 2)
        if chance < probability:
            lengths[i] = 1 + int(share * sequence_length)
    return lengths


def annealed_attention(seed: int, positions: IntArray, budget: int) -> IntArray | None:
    """What of the tokens behind each other those of a sample see, [B, 3]: two 32-bit keys and a threshold.

    DiffuLLaMA's attention annealing (Gong et al., "Scaling Diffusion Language Models via Adaptation from Autoregressive
    Models", 2024): the mask is causal or drawn, each later token being seen with a probability that grows from 0 at
    position 0 to 1 at position `budget`. The model hashes keys and places to a word below 2**32 and compares it with
    the threshold. None where all samples lie behind the budget: nothing is masked any more.
    """
    if (positions >= budget).all():
        return None
    keys = randomness.hash_uint64(randomness.derive_seed(seed, "attention_annealing"), positions)
    thresholds = [(min(int(position), budget) << 32) // budget for position in positions]
    halves = (keys & np.uint64(2**32 - 1)), keys >> np.uint64(32)
    return np.stack([*(half.astype(np.int64) for half in halves), np.array(thresholds, dtype=np.int64)], axis=1)


def random_ids(seed: int, positions: IntArray, length: int, purpose: str, vocab_size: int, mask_id: int) -> IntArray:
    """Ids drawn uniformly from all but the mask token [B, length]."""
    words = keyed_words(seed, positions, length, purpose)
    below_mask = mask_id < vocab_size
    ids = (words % np.uint64(vocab_size - below_mask)).astype(np.int64)
    return ids + (below_mask & (ids >= mask_id))


def hide_counted(eligible: BoolArray, counts: IntArray, words: NDArray[np.uint64]) -> BoolArray:
    """Hide `counts` [B] of the `eligible` [B, T] tokens of each sample: those with the smallest words."""
    # Ties between 64-bit words go to the lower index.
    order = np.argsort(np.where(eligible, words, np.uint64(2**64 - 1)), axis=1, kind="stable")
    masks = np.zeros(words.shape, dtype=np.bool_)
    np.put_along_axis(masks, order, np.arange(words.shape[1]) < counts[:, None], axis=1)
    return masks & eligible


def hide_independently(eligible: BoolArray, rates: FloatArray, words: NDArray[np.uint64]) -> BoolArray:
    """Hide each of the `eligible` [B, T] tokens by itself with probability `rates` [B]."""
    return (randomness.to_unit_interval(words) < rates[:, None]) & eligible


def hide_span(eligible: BoolArray, counts: IntArray, places: FloatArray) -> BoolArray:
    """Hide `counts` [B] successive `eligible` [B, T] tokens; `places` [B] in [0, 1) is where the span lies."""
    sizes = eligible.sum(axis=1)
    first = (places * (sizes - counts + 1)).astype(np.int64)[:, None]
    rank = np.cumsum(eligible, axis=1) - 1
    return eligible & (rank >= first) & (rank < first + counts[:, None])
