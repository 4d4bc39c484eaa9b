"""Masked diffusion over one stream: some tokens are hidden, and predicted from those that are not.

With its defaults this is LLaDA's and MDLM's objective with a lower variance. Everything else here is an option that
people train with; `not_a_bound` says which of them make the loss something else than a bound on the likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

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
from dlm_dist.diffusion.block_diffusion import BlockLengths
from dlm_dist.diffusion.corruption import (
    annealed_attention,
    hide_counted,
    hide_independently,
    hide_span,
    keyed_uniform,
    keyed_words,
    random_ids,
    random_lengths,
    stratified_times,
)
from dlm_dist.diffusion.schedules import Schedule, make_schedule
from dlm_dist.diffusion.weighting import SAMPLE_WEIGHTINGS, TOKEN_WEIGHTINGS, Level, cart_weights, recency_weights
from dlm_dist.settings import ConfigError

A = TypeVar("A", bound=np.generic)

_CHOICES = {
    "masking": ("exact", "bernoulli"),
    "times": ("stratified", "independent"),
    "weighting": (*SAMPLE_WEIGHTINGS, *TOKEN_WEIGHTINGS),
    "noise_type": ("mask", "random_replace"),
    "normalization": ("tokens", "maskable", "scored"),
}


@dataclass(frozen=True)
class _Samples:
    """The S samples of a batch of rows: `draws_per_row` successive ones of each row."""

    tokens: IntArray
    """[S, T]"""
    there: BoolArray
    """[S, T] not cut off."""
    eligible: BoolArray
    """[S, T] what may be hidden and scored: there, not protected, and in the chosen block where only one is."""
    maskable: IntArray
    """[S] tokens of the whole row that may be hidden."""
    blank: BoolArray
    """[S, T] what is neither shown nor scored: what was cut off, and what follows the chosen block."""
    blocks: IntArray
    """[S] blocks of which one was chosen, 1 where there are none."""
    positions: IntArray
    """[S] of the rows."""


@dataclass(frozen=True)
class MaskedDiffusion:
    """Masked diffusion (LLaDA, MDLM): hidden tokens are predicted from the visible ones, weighted to a bound.

    With the defaults the mean over samples of sum(weight * cross entropy) / tokens is an unbiased estimate of the
    negative evidence lower bound in nats per token, for both maskings and every schedule. The fields are the keys of
    the section `objective` of the configuration, where they are described, and two of `data`.

    Raises ValueError for values that make no objective.
    """

    seed: int
    vocabulary: Vocabulary
    schedule: str = "linear"
    schedule_parameters: Mapping[str, object] = field(default_factory=dict)
    masking: str = "exact"
    times: str = "stratified"
    t_min: float = 0.0
    t_max: float = 1.0
    min_masking_rate: float = 0.0
    weighting: str = "elbo"
    cart_p: float = 0.1
    soft_tail_p: float = 0.5
    soft_tail_beta: float = 1.0
    reweight_cap: float | None = None
    normalization: str = "tokens"
    noise_type: str = "mask"
    mask_contiguous_region_prob: float = 0.0
    two_segment_prob: float = 0.0
    one_block_length: int | None = None
    block_lengths: tuple[tuple[int, int], ...] | None = None
    protected_tokens: tuple[str, ...] = ()
    draws_per_row: int = 1
    complementary_prob: float = 0.0
    token_to_token_rate: float = 0.0
    token_to_token_weight: float = 1.0
    shift: bool = False
    attention_annealing: int = 0
    label_smoothing: float = 0.0
    confidence_weight: float = 0.0
    random_length_prob: float = 0.0
    random_length_group: int = 1
    isolate_documents: bool = False
    name: str = "mdlm"

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} is {getattr(self, key)!r}: expected one of {', '.join(choices)}.")
        if not 0.0 <= self.t_min < self.t_max <= 1.0:
            raise ValueError(f"t_min is {self.t_min} and t_max is {self.t_max}: expected 0 <= t_min < t_max <= 1.")
        if self.one_block_length is not None and self.one_block_length < 1:
            raise ValueError(f"one_block_length is {self.one_block_length}: expected at least 1.")
        if self.one_block_length is not None and self.block_lengths is not None:
            raise ValueError("one_block_length and block_lengths are both given: expected one of them.")
        assert self._blocks is None or self._blocks.phases
        if self.complementary_prob and self.draws_per_row != 2:
            raise ValueError(f"draws_per_row is {self.draws_per_row}: complementary masks need 2.")
        if self.shift and self.isolate_documents:
            raise ValueError("shift is true: with isolated documents the output before a document does not see it.")
        if self.vocabulary.size is None and (self.noise_type == "random_replace" or self.token_to_token_rate):
            raise ValueError("Random replacement needs to know how many ids the vocabulary has.")
        if self.vocabulary.mask_id in self._protected_ids:
            raise ValueError(f"protected_tokens holds {self.vocabulary.mask_id}, the mask token: take it out.")
        assert self._schedule.name

    @cached_property
    def _schedule(self) -> Schedule:
        return make_schedule(self.schedule, **self.schedule_parameters)

    @cached_property
    def _blocks(self) -> BlockLengths | None:
        """The lengths of blocks of which one is noised; None: the row is one."""
        if self.one_block_length is not None:
            return BlockLengths(((0, self.one_block_length),))
        return None if self.block_lengths is None else BlockLengths(tuple(self.block_lengths))

    @cached_property
    def _protected_ids(self) -> list[int]:
        return [self.vocabulary.id_of(token) for token in self.protected_tokens]

    @property
    def has_times(self) -> bool:
        return True

    @property
    def is_bound(self) -> bool:
        """Whether the mean loss is an unbiased estimate of a bound on the negative log-likelihood."""
        return not self.not_a_bound()

    def not_a_bound(self) -> list[str]:
        """The settings for which the loss is no bound, as `key=value`; empty where it is one."""
        found = [
            key
            for key, bound in (
                ("t_min", self.t_min == 0.0),
                ("t_max", self.t_max == 1.0),
                ("min_masking_rate", self.min_masking_rate == 0.0),
                ("weighting", self._weighs_to_a_bound()),
                ("reweight_cap", self.reweight_cap is None),
                ("normalization", self.normalization != "scored"),
                ("noise_type", self.noise_type == "mask"),
                ("mask_contiguous_region_prob", self.mask_contiguous_region_prob == 0.0),
                # Each part's loss telescopes in its own order only: two copies in two parts cost less than one.
                ("two_segment_prob", self.two_segment_prob == 0.0),
                ("protected_tokens", not self.protected_tokens),
                ("token_to_token_rate", self.token_to_token_rate == 0.0),
                ("label_smoothing", self.label_smoothing == 0.0),
                ("confidence_weight", self.confidence_weight == 0.0),
            )
            if not bound
        ]
        return [f"{key}={getattr(self, key)}" for key in found]

    def _weighs_to_a_bound(self) -> bool:
        if self.weighting == "inverse_rate" and self._schedule.name == "linear":
            # Counted masks never hide everything as a complement, for which only `elbo` makes up.
            return self.masking == "bernoulli" or self.complementary_prob == 0.0
        return self.weighting == "elbo"

    def head_settings(self) -> dict[str, float]:
        """Label smoothing and LLaDA 2's confidence term, where they are on."""
        settings = {"label_smoothing": self.label_smoothing, "confidence_weight": self.confidence_weight}
        return {key: value for key, value in settings.items() if value}

    def corrupt(self, rows: RowsLike) -> NoisyBatch:
        """Corrupt rows [B, T] into B * draws_per_row samples.

        Raises ConfigError where a row holds the mask token.
        """
        samples, lengths = self._samples(rows)
        hidden, weights, times = self._hide(samples, rows.document_ids)
        inputs = np.where(hidden | samples.blank, self.vocabulary.mask_id, samples.tokens)
        if self.noise_type == "random_replace":
            inputs = np.where(hidden, self._random_ids(samples, "replace"), inputs)
        if self.token_to_token_rate:
            changed = self._changed(samples, hidden)
            inputs = np.where(changed, self._random_ids(samples, "token_to_token_id"), inputs)
            weights = np.where(changed, self.token_to_token_weight, weights)
        repeat = self.draws_per_row
        document_ids = visible_documents(
            rows.document_ids.repeat(repeat, axis=0), samples.there, self.isolate_documents
        )
        text_bytes = text_bytes_of(
            rows.text_bytes.repeat(repeat), samples.tokens, samples.there, self.vocabulary.token_bytes
        )
        counted = {
            "tokens": None,
            "maskable": samples.maskable,
            "scored": (weights > 0).sum(axis=1),
        }
        batch = NoisyBatch(
            inputs=inputs,
            targets=samples.tokens,
            weights=weights.astype(np.float32),
            document_ids=document_ids,
            times=times,
            lengths=lengths,
            positions=samples.positions,
            text_bytes=text_bytes,
            counted=counted[self.normalization],
            annealing=annealed_attention(self.seed, samples.positions, self.attention_annealing),
        )
        return _behind(batch, rows.before.repeat(repeat)) if self.shift else batch

    def _samples(self, rows: RowsLike) -> tuple[_Samples, IntArray]:
        """The samples of `rows`, and how many of their tokens are there [S]."""
        tokens = rows.tokens.astype(np.int64)
        masked = (tokens == self.vocabulary.mask_id).any(axis=1)
        if masked.any():
            raise ConfigError(
                [
                    f"the row at position {rows.positions[masked][0]} holds the mask token's id "
                    f"{self.vocabulary.mask_id} as text: use a tokenizer whose mask token occurs in none"
                ],
                "the data",
            )
        lengths = random_lengths(
            self.seed, rows.positions, tokens.shape[1], self.random_length_prob, self.random_length_group
        )
        there = np.arange(tokens.shape[1]) < lengths[:, None]
        repeat = self.draws_per_row
        tokens, there = tokens.repeat(repeat, axis=0), there.repeat(repeat, axis=0)
        lengths, positions = lengths.repeat(repeat), rows.positions.repeat(repeat)
        eligible = there & ~np.isin(tokens, self._protected_ids) if self.protected_tokens else there
        maskable = eligible.sum(axis=1)
        blank, blocks = ~there, np.ones_like(lengths)
        if self._blocks is not None:
            size = self._blocks.at(positions, tokens.shape[1])
            blocks = -(-lengths // size)
            # A complement hides the rest of the same block.
            chosen = keyed_uniform(self.seed, "block", positions)
            first = ((chosen * blocks).astype(np.int64) * size)[:, None]
            behind = first + size[:, None]
            place = np.arange(tokens.shape[1])
            eligible = eligible & (place >= first) & (place < behind)
            blank = blank | (place >= behind)
        return _Samples(tokens, there, eligible, maskable, blank, blocks, positions), lengths

    def _hide(self, samples: _Samples, document_ids: NDArray[np.int32]) -> tuple[BoolArray, FloatArray, FloatArray]:
        """What is hidden [S, T], what each token weighs [S, T], and the times [S]."""
        eligible, positions = samples.eligible, samples.positions
        if self.two_segment_prob:
            # A sample has two parts, or its first one is all of it.
            split = self._uniform("two_segment_split", positions) * samples.there.sum(axis=1)
            two = self._uniform("two_segment", positions) < self.two_segment_prob
            late = two[:, None] & (np.arange(eligible.shape[1]) >= split[:, None])
            first, level = self._hide_part(samples, eligible & ~late, self.seed)
            second, late_level = self._hide_part(
                samples, eligible & late, randomness.derive_seed(self.seed, "second_segment")
            )
            hidden = first | second
            weights = np.where(late, self._sample_weights(late_level), self._sample_weights(level))
        else:
            hidden, level = self._hide_part(samples, eligible, self.seed)
            weights = self._sample_weights(level)
        isolated = document_ids.repeat(self.draws_per_row, axis=0) if self.isolate_documents else np.zeros_like(hidden)
        documents = np.where(samples.there, isolated, -1).astype(np.int32)
        if self.weighting == "cart":
            weights = cart_weights(hidden, documents, self.cart_p)
        if self.weighting == "soft_tail":
            weights = recency_weights(hidden, self.soft_tail_p, self.soft_tail_beta, documents)
        if self.reweight_cap is not None:
            weights = np.minimum(weights, self.reweight_cap)
        # One block stands for all of its row's.
        return hidden, np.where(hidden, weights * samples.blocks[:, None], 0.0), level.times

    def _hide_part(self, samples: _Samples, eligible: BoolArray, time_seed: int) -> tuple[BoolArray, Level]:
        """What of `eligible` [S, T] is hidden [S, T], and the level of that."""
        exact, sizes = self.masking == "exact", eligible.sum(axis=1)
        times = self._times(samples.positions, time_seed)
        level = Level.at(self._schedule, times, sizes, exact, self.min_masking_rate)
        words = self._per_draw(
            lambda purpose, at: keyed_words(self.seed, at, eligible.shape[1], purpose), "mask", samples.positions
        )
        if level.counts is not None:
            hidden = hide_counted(eligible, level.counts, words)
        else:
            hidden = hide_independently(eligible, level.rates, words)
        if self.mask_contiguous_region_prob:
            counts = level.counts
            if counts is None:
                counts = np.clip(np.rint(level.rates * sizes).astype(np.int64), np.minimum(1, sizes), sizes)
            span = hide_span(eligible, counts, self._uniform("span_place", samples.positions))
            chosen = self._uniform("span", samples.positions) < self.mask_contiguous_region_prob
            hidden = np.where(chosen[:, None], span, hidden)
        if self.complementary_prob:
            chosen = keyed_uniform(self.seed, "complement", samples.positions) < self.complementary_prob
            chosen[0::2] = False
            first = np.arange(len(hidden)) // 2 * 2
            hidden = np.where(chosen[:, None], eligible & ~hidden[first], hidden)
            level = level.where(chosen, level.of(first).complement())
        return hidden, level

    def _times(self, positions: IntArray, seed: int) -> FloatArray:
        """Times [S] in [t_min, t_max]; the draws of a row are spread over it evenly."""
        if self.times == "stratified":
            draw = np.arange(len(positions)) % self.draws_per_row
            unit = (stratified_times(seed, positions) + draw / self.draws_per_row) % 1.0
        else:
            unit = self._per_draw(lambda purpose, at: keyed_uniform(seed, purpose, at), "independent_time", positions)
        return self.t_min + (self.t_max - self.t_min) * unit

    def _sample_weights(self, level: Level) -> FloatArray:
        """[S, 1]; for the weightings by token, which follow later, anything."""
        name = self.weighting if self.weighting in SAMPLE_WEIGHTINGS else "none"
        return SAMPLE_WEIGHTINGS[name](level, self.complementary_prob)[:, None]

    def _changed(self, samples: _Samples, hidden: BoolArray) -> BoolArray:
        """Visible tokens that are replaced and to be put right [S, T] (LLaDA 2.1's token-to-token training)."""
        words = self._per_draw(
            lambda purpose, at: keyed_words(self.seed, at, hidden.shape[1], purpose),
            "token_to_token",
            samples.positions,
        )
        rates = np.full(len(hidden), self.token_to_token_rate)
        return hide_independently(samples.eligible & ~hidden, rates, words)

    def _random_ids(self, samples: _Samples, purpose: str) -> IntArray:
        size, length = self.vocabulary.size, samples.tokens.shape[1]
        assert size is not None
        return self._per_draw(
            lambda name, at: random_ids(self.seed, at, length, name, size, self.vocabulary.mask_id),
            purpose,
            samples.positions,
        )

    def _uniform(self, purpose: str, positions: IntArray) -> FloatArray:
        return self._per_draw(lambda name, at: keyed_uniform(self.seed, name, at), purpose, positions)

    def _per_draw(self, draw: Callable[[str, IntArray], NDArray[A]], purpose: str, positions: IntArray) -> NDArray[A]:
        """`draw` of the successive draws of each row [S, ...], each with a purpose of its own."""
        repeat = self.draws_per_row
        parts = [draw(purpose if d == 0 else f"{purpose}_{d}", positions[d::repeat]) for d in range(repeat)]
        return np.stack(parts, axis=1).reshape(len(positions), *parts[0].shape[1:])


def _behind(batch: NoisyBatch, before: IntArray) -> NoisyBatch:
    """The batch read behind the token before each row [S], each token predicted at the place in front of it.

    All T tokens stay visible to all outputs, so there is one place more than tokens.
    """

    def last(array: NDArray[A], value: int) -> NDArray[A]:
        return np.concatenate([array, np.full((len(array), 1), value, dtype=array.dtype)], axis=1)

    documents = batch.document_ids
    if documents is not None:
        documents = np.concatenate([np.zeros((len(documents), 1), dtype=documents.dtype), documents], axis=1)
    return replace(
        batch,
        inputs=np.concatenate([before[:, None].astype(np.int64), batch.inputs], axis=1),
        targets=last(batch.targets, 0),
        weights=last(batch.weights, 0),
        document_ids=documents,
    )
