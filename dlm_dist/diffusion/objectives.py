"""Training objectives: what is hidden, what is asked, and how it weighs. Rows in, NoisyBatch out.

An objective is `corrupt(rows) -> NoisyBatch` and nothing else; the loop, the loss head and the metrics do not
know which one runs. Adding one is one class and one line in OBJECTIVES.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from dlm_dist.diffusion.base import NoisyBatch, Objective, RowsLike, Vocabulary, visible_documents
from dlm_dist.diffusion.block_diffusion import BlockDiffusion
from dlm_dist.diffusion.causal import Autoregressive, CausalDiffusion
from dlm_dist.diffusion.masked import MaskedDiffusion

__all__ = [
    "OBJECTIVES",
    "Autoregressive",
    "BlockDiffusion",
    "CausalDiffusion",
    "MaskedDiffusion",
    "NoisyBatch",
    "Objective",
    "RowsLike",
    "Vocabulary",
    "visible_documents",
]

_NANO_LLADA: dict[str, Any] = {
    "masking": "bernoulli",
    "times": "independent",
    "normalization": "maskable",
    "t_min": 1e-3,
    "t_max": 0.999,
}


def _nano_llada(**settings: Any) -> MaskedDiffusion:
    """Its beginnings and ends of text are never hidden; not every tokenizer has a beginning."""
    vocabulary: Vocabulary = settings["vocabulary"]
    return MaskedDiffusion(
        **{"protected_tokens": ("eos", "bos") if "bos" in vocabulary.named else ("eos",), **settings}
    )


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "mdlm": MaskedDiffusion,
    "dllm": partial(MaskedDiffusion, name="dllm", masking="bernoulli", times="independent", normalization="maskable"),
    "soft_ce": partial(MaskedDiffusion, name="soft_ce", weighting="inverse_rate", label_smoothing=0.1),
    "iid_t": partial(_nano_llada, name="iid_t", **_NANO_LLADA),
    "wsd": partial(_nano_llada, name="wsd", schedule="cosine_squared", block_lengths=((0, 32),), **_NANO_LLADA),
    "block": BlockDiffusion,
    "ar": Autoregressive,
    "card": CausalDiffusion,
}
"""Makers by the name in objective.name, with the defaults of each."""
