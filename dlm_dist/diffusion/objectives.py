"""Training objectives: what is hidden, what is asked, and how it weighs. Rows in, NoisyBatch out.

An objective is `corrupt(rows) -> NoisyBatch` and nothing else; the loop, the loss head and the metrics do not
know which one runs. Adding one is one class and one line in OBJECTIVES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dlm_dist.diffusion.base import (
    IntArray,
    NoisyBatch,
    Objective,
    RowsLike,
    Vocabulary,
    text_bytes_of,
    visible_documents,
)
from dlm_dist.diffusion.corruption import random_lengths
from dlm_dist.diffusion.masked import MaskedDiffusion

__all__ = [
    "OBJECTIVES",
    "Autoregressive",
    "MaskedDiffusion",
    "NoisyBatch",
    "Objective",
    "RowsLike",
    "Vocabulary",
    "visible_documents",
]


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

    def head_settings(self) -> dict[str, float]:
        return {}

    def corrupt(self, rows: RowsLike) -> NoisyBatch:
        tokens = rows.tokens.astype(np.int64)
        lengths = random_lengths(
            self.seed, rows.positions, tokens.shape[1], self.random_length_prob, self.random_length_group
        )
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
            text_bytes=text_bytes_of(rows.text_bytes, tokens, there, self.vocabulary.token_bytes),
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


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "mdlm": MaskedDiffusion,
    "dllm": partial(MaskedDiffusion, name="dllm", masking="bernoulli", times="independent", normalization="maskable"),
    "soft_ce": partial(MaskedDiffusion, name="soft_ce", weighting="inverse_rate", label_smoothing=0.1),
    "ar": Autoregressive,
}
"""Makers by the name in objective.name, with the defaults of each."""
