"""What a backbone returns when it is asked for logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class DenoiserOutput(ModelOutput):
    """`logits` [B, T, V] in the dtype of the model."""

    logits: torch.FloatTensor | None = None
