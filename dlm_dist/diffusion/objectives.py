"""Training objectives: what is hidden, what is asked, and how it weighs. Rows in, NoisyBatch out.

An objective is `corrupt(rows) -> NoisyBatch` and nothing else; the loop, the loss head and the metrics do not
know which one runs. Adding one is one class and one line in OBJECTIVES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dlm_dist.diffusion.corruption import (
    MASKINGS,
    IntArray,
    NoisyBatch,
    keyed_words,
    random_lengths,
    stratified_times,
)
from dlm_dist.diffusion.schedules import SCHEDULES


class RowsLike(Protocol):
    """What an objective reads of a batch (data_pipeline.rows.Rows)."""

    @property
    def tokens(self) -> NDArray[np.integer]: ...  # [B, T]

    @property
    def document_ids(self) -> NDArray[np.int32]: ...  # [B, T]

    @property
    def positions(self) -> IntArray: ...  # [B]

    @property
    def text_bytes(self) -> IntArray: ...  # [B]

    @property
    def before(self) -> IntArray: ...  # [B]


@dataclass(frozen=True)
class Vocabulary:
    """The ids that an objective needs to know. `token_bytes` [V]: bytes of text per id, None if unknown."""

    mask_id: int
    eos_id: int
    token_bytes: IntArray | None = None


class Objective(Protocol):
    """An objective's name, whether its loss is a bound on the negative log-likelihood, and its corruption."""

    @property
    def name(self) -> str: ...

    @property
    def is_bound(self) -> bool: ...

    def corrupt(self, rows: RowsLike) -> NoisyBatch:
        """Corrupt a batch of clean rows; a pure function of the rows and their positions."""
        ...


@dataclass(frozen=True)
class MaskedDiffusion:
    """Masked diffusion (LLaDA, MDLM): hidden tokens are predicted from the visible ones, weighted to a bound.

    The mean over samples of sum(weight * cross entropy) / tokens is an unbiased estimate of the negative
    evidence lower bound in nats per token, for both maskings and every schedule.
    """

    seed: int
    vocabulary: Vocabulary
    schedule: str = "linear"
    masking: str = "exact"
    random_length_prob: float = 0.0
    isolate_documents: bool = False
    name: str = "mdlm"
    is_bound: bool = True

    def corrupt(self, rows: RowsLike) -> NoisyBatch:
        tokens = rows.tokens.astype(np.int64)
        times = stratified_times(self.seed, rows.positions)
        lengths = random_lengths(self.seed, rows.positions, tokens.shape[1], self.random_length_prob)
        words = keyed_words(self.seed, rows.positions, tokens.shape[1])
        masks, weights = MASKINGS[self.masking](SCHEDULES[self.schedule], times, lengths, words)
        there = np.arange(tokens.shape[1]) < lengths[:, None]
        return NoisyBatch(
            inputs=np.where(masks | ~there, self.vocabulary.mask_id, tokens),
            targets=tokens,
            weights=np.where(masks, weights[:, None], 0.0).astype(np.float32),
            document_ids=visible_documents(rows, there, self.isolate_documents),
            times=times,
            lengths=lengths,
            positions=rows.positions,
            text_bytes=_text_bytes(rows, tokens, there, self.vocabulary.token_bytes),
        )


@dataclass(frozen=True)
class Autoregressive:
    """Causal language modelling: each token is predicted from all that precede it.

    The input is the row shifted right by one behind the token before it, so that all T tokens are scored. The mean
    of the cross entropies is the exact negative log-likelihood in nats per token. Nothing is drawn but lengths.
    """

    seed: int
    vocabulary: Vocabulary
    random_length_prob: float = 0.0
    isolate_documents: bool = False
    name: str = "ar"
    is_bound: bool = True

    def corrupt(self, rows: RowsLike) -> NoisyBatch:
        tokens = rows.tokens.astype(np.int64)
        lengths = random_lengths(self.seed, rows.positions, tokens.shape[1], self.random_length_prob)
        there = np.arange(tokens.shape[1]) < lengths[:, None]
        inputs = np.concatenate([rows.before[:, None].astype(np.int64), tokens[:, :-1]], axis=1)
        documents = None
        if self.isolate_documents:
            inputs, documents = _isolated_inputs(inputs, tokens, rows.document_ids, self.vocabulary.eos_id)
            documents = np.where(there, documents, np.int32(-1))
        # Without isolation a cut tail needs no mark: no scored token of a causal model sees what follows it.
        return NoisyBatch(
            inputs=inputs,
            targets=tokens,
            weights=there.astype(np.float32),
            document_ids=documents,
            times=np.zeros(len(tokens)),
            lengths=lengths,
            positions=rows.positions,
            text_bytes=_text_bytes(rows, tokens, there, self.vocabulary.token_bytes),
        )


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


def visible_documents(rows: RowsLike, there: NDArray[np.bool_], isolate_documents: bool) -> NDArray[np.int32] | None:
    """Document ids [B, T] for the model, -1 for the cut tails; None when every row is whole and one document."""
    if isolate_documents:
        return np.where(there, rows.document_ids, -1).astype(np.int32)
    return None if there.all() else np.where(there, 0, -1).astype(np.int32)


def _text_bytes(rows: RowsLike, tokens: IntArray, there: NDArray[np.bool_], token_bytes: IntArray | None) -> IntArray:
    """Bytes of text [B] of the tokens that are there: the row's own count if it is whole, else by id."""
    if there.all():
        return rows.text_bytes
    if token_bytes is None:
        return np.where(there.all(axis=1), rows.text_bytes, -1)
    return np.where(there, token_bytes[tokens], 0).sum(axis=1).astype(np.int64)


OBJECTIVES: dict[str, Callable[..., Objective]] = {"mdlm": MaskedDiffusion, "ar": Autoregressive}
