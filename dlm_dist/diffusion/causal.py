"""Objectives of strictly causal models: the row is read shifted right by one, and every token is predicted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dlm_dist.diffusion.base import (
    BoolArray,
    FloatArray,
    IntArray,
    NoisyBatch,
    RowsLike,
    Vocabulary,
    text_bytes_of,
)
from dlm_dist.diffusion.corruption import hide_counted, keyed_words, random_lengths, stratified_times
from dlm_dist.diffusion.weighting import recency_weights


@dataclass(frozen=True)
class Autoregressive:
    """Causal language modelling: each token is predicted from all that precede it.

    The input is the row shifted right by one behind the token before it, so that all T tokens are scored. The mean
    of the cross entropies is the exact negative log-likelihood in nats per token. Nothing is drawn but lengths.
    """

    seed: int
    vocabulary: Vocabulary
    random_length_prob: float = 0.0
    random_length_group: int = 1
    isolate_documents: bool = False
    name: str = "ar"
    is_bound: bool = True
    has_times: bool = False

    def not_a_bound(self) -> list[str]:
        return []

    def head_settings(self) -> dict[str, float]:
        return {}

    def corrupt(self, rows: RowsLike) -> NoisyBatch:
        tokens = rows.tokens.astype(np.int64)
        lengths = random_lengths(
            self.seed, rows.positions, tokens.shape[1], self.random_length_prob, self.random_length_group
        )
        there = np.arange(tokens.shape[1]) < lengths[:, None]
        inputs, documents = _shifted(rows, there, self.isolate_documents, self.vocabulary.eos_id)
        return NoisyBatch(
            inputs=inputs,
            targets=tokens,
            weights=there.astype(np.float32),
            document_ids=documents,
            times=np.zeros(len(tokens)),
            lengths=lengths,
            positions=rows.positions,
            text_bytes=text_bytes_of(rows.text_bytes, tokens, there, self.vocabulary.token_bytes),
        )


@dataclass(frozen=True)
class CausalDiffusion:
    """CARD (arXiv 2601.22031): diffusion with a strictly causal model that is asked at every token.

    The row is read as in causal language modelling, with some of what is read hidden, near the end, so that the past of
    the hidden part is mostly clean; a token whose recent past is hidden weighs less. With nothing hidden this is causal
    language modelling, so the likelihood of such a model is exact.

    card_tail: of a row of L tokens, at time t, N = max(1, floor(t L)) of the last min(L, floor(card_tail N)) are
    hidden; 1 hides just the last N. soft_tail_p, soft_tail_beta: see `weighting.recency_weights`; weights are divided
    by their mean over the row. The loss is no bound. Raises ValueError for values that make no objective.
    """

    seed: int
    vocabulary: Vocabulary
    card_tail: float = 1.5
    soft_tail_p: float = 0.5
    soft_tail_beta: float = 1.0
    random_length_prob: float = 0.0
    random_length_group: int = 1
    isolate_documents: bool = False
    name: str = "card"
    is_bound: bool = False
    has_times: bool = True

    def __post_init__(self) -> None:
        if self.card_tail < 1.0:
            raise ValueError(f"card_tail is {self.card_tail}: expected at least 1, or the hidden tokens have no place.")
        if not 0.0 < self.soft_tail_p <= 1.0 or self.soft_tail_beta <= 0.0:
            raise ValueError(
                f"soft_tail_p is {self.soft_tail_p} and soft_tail_beta is {self.soft_tail_beta}: "
                "expected 0 < p <= 1, 0 < beta."
            )

    def not_a_bound(self) -> list[str]:
        return [f"name={self.name}"]

    def head_settings(self) -> dict[str, float]:
        return {}

    def corrupt(self, rows: RowsLike) -> NoisyBatch:
        """Corrupt rows [B, T]; every token that is there is scored."""
        tokens = rows.tokens.astype(np.int64)
        length = tokens.shape[1]
        lengths = random_lengths(self.seed, rows.positions, length, self.random_length_prob, self.random_length_group)
        there = np.arange(length) < lengths[:, None]
        times = stratified_times(self.seed, rows.positions)
        inputs, documents = _shifted(rows, there, self.isolate_documents, self.vocabulary.eos_id)
        hidden = self._hidden(rows.positions, times, lengths, length)
        sighted = documents if documents is not None else np.zeros(tokens.shape, dtype=np.int32)
        weights = np.where(there, recency_weights(hidden, self.soft_tail_p, self.soft_tail_beta, sighted), 0.0)
        weights *= (lengths / weights.sum(axis=1))[:, None]
        return NoisyBatch(
            inputs=np.where(_behind_one(hidden), self.vocabulary.mask_id, inputs),
            targets=tokens,
            weights=weights.astype(np.float32),
            document_ids=documents,
            times=times,
            lengths=lengths,
            positions=rows.positions,
            text_bytes=text_bytes_of(rows.text_bytes, tokens, there, self.vocabulary.token_bytes),
        )

    def _hidden(self, positions: IntArray, times: FloatArray, lengths: IntArray, width: int) -> BoolArray:
        """[B, T]: N of the last W of the tokens that are there."""
        counts = np.maximum(1, np.floor(lengths * times).astype(np.int64))
        windows = np.minimum(lengths, np.floor(self.card_tail * counts).astype(np.int64))
        place = np.arange(width)
        tail = (place < lengths[:, None]) & (place >= (lengths - windows)[:, None])
        return hide_counted(tail, counts, keyed_words(self.seed, positions, width))


def _behind_one(tokens: NDArray) -> NDArray:
    """What is true of each token [B, T], at the places where the shifted row holds them; False in front."""
    return np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1]], axis=1)


def _shifted(
    rows: RowsLike, there: BoolArray, isolate_documents: bool, eos_id: int
) -> tuple[IntArray, NDArray[np.int32] | None]:
    """The rows behind the token before each [B, T], and the documents in which they are read [B, T] or None."""
    tokens = rows.tokens.astype(np.int64)
    inputs = np.concatenate([rows.before[:, None].astype(np.int64), tokens[:, :-1]], axis=1)
    if not isolate_documents:
        # A cut tail needs no mark: no scored token of a causal model sees what follows it.
        return inputs, None
    inputs, documents = _isolated_inputs(inputs, tokens, rows.document_ids, eos_id)
    return inputs, np.where(there, documents, np.int32(-1))


def _isolated_inputs(
    inputs: IntArray, tokens: IntArray, token_documents: NDArray[np.int32], eos_id: int
) -> tuple[IntArray, NDArray[np.int32]]:
    """Shifted inputs [B, T] and the document that each is read in [B, T], so that documents do not see each other.

    A document is read from the end of text in front of its first token on, and predicts its own end of text: an
    end of text in the input begins a document. Hence it does not matter whether the source counts it as the last
    token of the document before (our packing) or as the first of the next (llm.c). Where a source's documents
    change without an end of text between them, one takes the place of the other document's last token.
    """
    changes = np.zeros(tokens.shape, dtype=np.bool_)
    changes[:, 1:] = (token_documents[:, 1:] != token_documents[:, :-1]) & (tokens[:, 1:] != eos_id)
    begins = changes | (inputs == eos_id)
    return np.where(changes, eos_id, inputs), np.cumsum(begins, axis=1, dtype=np.int32)
