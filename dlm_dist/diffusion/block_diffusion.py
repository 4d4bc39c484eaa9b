"""Block diffusion: each block is denoised with the clean blocks before it in sight (BD3-LM, LLaDA 2).

A row is cut into blocks; every block has a time and a hidden set of its own, and is a masked-diffusion sample of its
own length given its clean past. The sum over blocks of their bounds is a bound on the row's negative log-likelihood;
blocks of one token are always hidden and give it exactly (Arriola et al., "Block Diffusion: Interpolating Between
Autoregressive and Diffusion Language Models", 2025). The block length may follow a schedule in tokens (LLaDA 2.0's
warm-up, stable and decay phases).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dlm_dist import randomness
from dlm_dist.diffusion.base import (
    BoolArray,
    FloatArray,
    IntArray,
    NoisyBatch,
    RowsLike,
    Vocabulary,
    text_bytes_of,
    visible_documents,
)
from dlm_dist.diffusion.corruption import (
    hide_counted,
    hide_independently,
    keyed_words,
    random_lengths,
    stratified_times,
)
from dlm_dist.diffusion.schedules import Schedule, make_schedule
from dlm_dist.diffusion.weighting import Level, elbo


@dataclass(frozen=True)
class BlockLengths:
    """The block length as a function of the tokens that come before a sample in the data order.

    `phases` are (tokens, length) pairs: each length applies to that many tokens, the last one to all that follow. The
    length 0 stands for the whole row, which is masked diffusion. Raises ValueError for pairs that make no schedule.
    """

    phases: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.phases or any(tokens < 0 or length < 0 for tokens, length in self.phases):
            raise ValueError(f"block_lengths is {list(self.phases)}: expected pairs [tokens, length] of 0 or more.")

    def check(self, sequence_length: int) -> None:
        """Raises ValueError where a length does not divide the rows."""
        for _, length in self.phases:
            if length and sequence_length % length:
                raise ValueError(f"The block length {length} does not divide rows of {sequence_length} tokens.")

    def at(self, positions: IntArray, sequence_length: int) -> IntArray:
        """The block length of each sample [B]: a function of its position, so the same for any batch and resume."""
        ends = list(itertools.accumulate(tokens for tokens, _ in self.phases[:-1]))
        lengths = [length or sequence_length for _, length in self.phases]
        phase = [bisect.bisect_right(ends, int(position) * sequence_length) for position in positions]
        return np.array([lengths[number] for number in phase], dtype=np.int64)


class ClipRange(NamedTuple):
    """From sample `position` on the times of blocks of `block_length` are drawn from [t_min, t_max]."""

    position: int
    block_length: int
    t_min: float
    t_max: float


@dataclass(frozen=True)
class BlockDiffusion:
    """Noisy blocks beside their clean row. Each block has a time; times are stratified over the blocks of the data.

    block_lengths: the phases of `BlockLengths`. t_min, t_max: times are drawn from this range only (BD3-LM's clipped
    schedules: less variance, and no bound). clip_search: that range is chosen anew during training, and `clip_ranges`
    are the choices so far, by rising position; for a sample the last one up to it holds of those for blocks of its
    length. Raises ValueError for values that make no objective.
    """

    seed: int
    vocabulary: Vocabulary
    block_lengths: tuple[tuple[int, int], ...] = ((0, 32),)
    schedule: str = "linear"
    schedule_parameters: Mapping[str, object] = field(default_factory=dict)
    masking: str = "exact"
    t_min: float = 0.0
    t_max: float = 1.0
    clip_search: bool = False
    clip_ranges: tuple[ClipRange, ...] = ()
    confidence_weight: float = 0.0
    random_length_prob: float = 0.0
    random_length_group: int = 1
    isolate_documents: bool = False
    name: str = "block"

    def __post_init__(self) -> None:
        if self.masking not in ("exact", "bernoulli"):
            raise ValueError(f"masking is {self.masking!r}: expected one of exact, bernoulli.")
        if not 0.0 <= self.t_min < self.t_max <= 1.0:
            raise ValueError(f"t_min is {self.t_min} and t_max is {self.t_max}: expected 0 <= t_min < t_max <= 1.")
        assert self._schedule.name
        assert self._lengths.phases

    @cached_property
    def _lengths(self) -> BlockLengths:
        return BlockLengths(tuple(self.block_lengths))

    @cached_property
    def _schedule(self) -> Schedule:
        return make_schedule(self.schedule, **self.schedule_parameters)

    @property
    def has_times(self) -> bool:
        return True

    @property
    def is_bound(self) -> bool:
        """Whether the mean loss is an unbiased estimate of a bound on the negative log-likelihood."""
        return not self.not_a_bound()

    def not_a_bound(self) -> list[str]:
        """The settings for which the loss is no bound, as `key=value`; empty where it is one."""
        whole = {"t_min": 0.0, "t_max": 1.0, "clip_search": False, "confidence_weight": 0.0}
        return [f"{key}={getattr(self, key)}" for key, value in whole.items() if getattr(self, key) != value]

    def head_settings(self) -> dict[str, float]:
        """LLaDA 2's confidence term, where it is on."""
        return {"confidence_weight": self.confidence_weight} if self.confidence_weight else {}

    def corrupt(self, rows: RowsLike) -> NoisyBatch:
        """Corrupt rows [B, T]. Raises ValueError where a block length does not divide T."""
        tokens = rows.tokens.astype(np.int64)
        batch, length = tokens.shape
        self._lengths.check(length)
        sizes = self._lengths.at(rows.positions, length)
        lengths = random_lengths(self.seed, rows.positions, length, self.random_length_prob, self.random_length_group)
        words = keyed_words(self.seed, rows.positions, length)
        hidden, weights = np.zeros((batch, length), np.bool_), np.zeros((batch, length))
        times, block_times = np.zeros(batch), np.zeros((batch, length))
        for size in np.unique(sizes):
            of_size = np.flatnonzero(sizes == size)
            found = self._blocks(rows.positions[of_size], lengths[of_size], words[of_size], int(size))
            hidden[of_size], weights[of_size] = found[:2]
            times[of_size], block_times[of_size] = found[2].mean(axis=1), found[2].repeat(size, axis=1)
        there = np.arange(length) < lengths[:, None]
        one_block = bool((sizes == length).all())
        return NoisyBatch(
            inputs=np.where(hidden | ~there, self.vocabulary.mask_id, tokens),
            targets=tokens,
            weights=weights.astype(np.float32),
            document_ids=visible_documents(rows.document_ids, there, self.isolate_documents),
            times=times,
            lengths=lengths,
            positions=rows.positions,
            text_bytes=text_bytes_of(rows.text_bytes, tokens, there, self.vocabulary.token_bytes),
            # Where every row is one block nothing clean lies before it: half of the work is left out.
            clean=None if one_block else tokens,
            block_ids=None if one_block else (np.arange(length) // sizes[:, None]).astype(np.int32),
            block_times=None if one_block else block_times,
        )

    def time_ranges(self, positions: IntArray, block_length: int) -> tuple[FloatArray, FloatArray]:
        """Smallest and largest time [B] of the samples at `positions` [B], in blocks of `block_length`."""
        choices = [chosen for chosen in self.clip_ranges if chosen.block_length == block_length]
        ranges = np.array([(self.t_min, self.t_max), *((chosen.t_min, chosen.t_max) for chosen in choices)])
        number = np.searchsorted([chosen.position for chosen in choices], positions, side="right")
        return ranges[number, 0], ranges[number, 1]

    def _blocks(
        self, positions: IntArray, lengths: IntArray, words: NDArray[np.uint64], size: int
    ) -> tuple[BoolArray, FloatArray, FloatArray]:
        """What is hidden [B, T] of rows in blocks of `size`, its weights [B, T], each block's time [B, T / size]."""
        count = words.shape[1] // size
        # Keyed by the length too: under another one, block j of a row is another piece of the data.
        seed = randomness.derive_seed(self.seed, "block", str(size))
        numbers = positions[:, None] * count + np.arange(count)
        low, high = (bounds.repeat(count) for bounds in self.time_ranges(positions, size))
        times = low + (high - low) * stratified_times(seed, numbers.reshape(-1))
        inside = np.clip(lengths[:, None] - size * np.arange(count), 0, size).reshape(-1)
        eligible = np.arange(size) < inside[:, None]
        level = Level.at(self._schedule, times, inside, self.masking == "exact")
        blocks = words.reshape(-1, size)
        if level.counts is not None:
            hidden = hide_counted(eligible, level.counts, blocks)
        else:
            hidden = hide_independently(eligible, level.rates, blocks)
        weights = np.where(hidden, elbo(level, 0.0)[:, None], 0.0)
        shape = (len(positions), count * size)
        return hidden.reshape(shape), weights.reshape(shape), times.reshape(-1, count)
