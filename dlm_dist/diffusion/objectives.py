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
    "protected_tokens": ("eos",),
}

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "mdlm": MaskedDiffusion,
    "dllm": partial(MaskedDiffusion, name="dllm", masking="bernoulli", times="independent", normalization="maskable"),
    "soft_ce": partial(MaskedDiffusion, name="soft_ce", weighting="inverse_rate", label_smoothing=0.1),
    "iid_t": partial(MaskedDiffusion, name="iid_t", **_NANO_LLADA),
    "wsd": partial(MaskedDiffusion, name="wsd", schedule="cosine_squared", block_lengths=((0, 32),), **_NANO_LLADA),
    "block": BlockDiffusion,
    "ar": Autoregressive,
    "card": CausalDiffusion,
}
"""Makers by the name in objective.name, with the defaults of each."""
