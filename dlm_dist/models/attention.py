"""What computes attention under a `Visibility`: PyTorch's SDPA, or FlexAttention where a mask would be large.

Where no mask is needed SDPA runs its fastest kernels. Where one is, FlexAttention on CUDA evaluates the rule tile by
tile and skips the tiles in which nobody sees anybody; SDPA needs it as a tensor [B, 1, Q, K]. A caller's additive bias
is such a tensor already. Both run through transformers' attention interface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dlm_dist.models.visibility import LayerPattern, Visibility

INTERFACE = "dlm_visibility"
"""The name under which transformers knows `attend`."""

KERNELS = ("auto", "sdpa", "flex")

# FlexAttention's kernels on CUDA take no smaller heads.
_SMALLEST_HEAD = 16


@dataclass(frozen=True)
class Choice:
    """What computes attention where a mask is needed: "sdpa" or "flex", and why."""

    kernel: str
    reason: str


def choose(wanted: str, device: torch.device, head_dim: int, dropout: float) -> Choice:
    """The kernel for masked attention on `device`. `wanted`: one of KERNELS.

    Raises ValueError where FlexAttention is asked for and cannot run.
    """
    if wanted == "sdpa":
        return Choice("sdpa", "asked for")
    obstacle = None
    if device.type not in ("cuda", "cpu"):
        obstacle = f"FlexAttention does not run on {device.type}"
    elif device.type == "cuda" and head_dim < _SMALLEST_HEAD:
        obstacle = f"heads of {head_dim} channels are too small for FlexAttention"
    elif dropout > 0.0:
        obstacle = "FlexAttention has no dropout"
    if wanted == "flex":
        if obstacle is not None:
            raise ValueError(f"the attention kernel flex was asked for, but {obstacle}.")
        return Choice("flex", "asked for")
    if obstacle is None and device.type == "cpu":
        obstacle = "FlexAttention has no backward pass on a CPU"
    return Choice("flex", "the device is CUDA") if obstacle is None else Choice("sdpa", obstacle)


@dataclass(frozen=True)
class LayerMasks:
    """What the layers of one forward are run with."""

    kernel: str
    """"sdpa" without any mask, "sdpa with a mask", or "flex"."""
    masks: tuple[Tensor | BlockMask | None, ...]
    """Per layer; None: SDPA without a mask."""
    causal: tuple[bool, ...]
    """Per layer: whether SDPA without a mask is to be causal."""


def layer_masks(
    visibility: Visibility, patterns: Sequence[LayerPattern], kernel: str, bias: Tensor | None = None
) -> LayerMasks:
    """The masks of layers with these `patterns`; `bias` [B or 1, 1, width, width] is added where a pair is left open.

    `kernel`: "sdpa" or "flex"; a bias is always a tensor for SDPA.
    """
    kinds = {pattern: visibility.in_layer(pattern) for pattern in dict.fromkeys(patterns)}
    flex = kernel == "flex" and bias is None
    made = {pattern: _mask(rule, flex, bias) for pattern, rule in kinds.items()}
    ran = "sdpa"
    if any(mask is not None for mask in made.values()):
        ran = "flex" if flex else "sdpa with a mask"
    return LayerMasks(
        ran, tuple(made[pattern] for pattern in patterns), tuple(kinds[pattern].causal for pattern in patterns)
    )


def _mask(rule: Visibility, flex: bool, bias: Tensor | None) -> Tensor | BlockMask | None:
    if bias is not None:
        return bias.masked_fill(~rule.dense(), -torch.inf)
    if rule.is_everything:
        return None
    return block_mask(rule) if flex else rule.dense()


def block_mask(rule: Visibility) -> BlockMask:
    """FlexAttention's BlockMask of the rule: which tiles are full, empty or mixed; on CUDA without a dense mask."""

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule.sees(row, query, key)

    # Without compilation it would make the dense mask first.
    create = compiled_create_block_mask() if rule.device.type == "cuda" else create_block_mask
    return create(mask_mod, rule.rows, None, rule.width, rule.width, device=str(rule.device))


@cache
def compiled_create_block_mask() -> Callable[..., BlockMask]:
    """torch's create_block_mask, compiled: every tile is looked at where it is summed up."""
    return torch.compile(create_block_mask)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface; `attention_mask` is LayerMasks, or what SDPA takes."""
    if not isinstance(attention_mask, LayerMasks):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    mask = attention_mask.masks[module.layer_idx]
    if isinstance(mask, BlockMask):
        return flex_attention_forward(module, query, key, value, mask, **kwargs)
    kwargs["is_causal"] = attention_mask.causal[module.layer_idx]
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register(INTERFACE, attend)
