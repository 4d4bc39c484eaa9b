"""flash-linear-attention's own RWKV-7 with our weights: the peer that the GPU benchmark measures us against.

Sizes and low-rank dimensions are ours, its fused norms and fused linear cross entropy are on, its L2Wrap (on by
default) is off, because our side has none in this comparison. Imports fla, and so needs Triton.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dlm_dist.models.conversion_fla import fla_name
from dlm_dist.models.rwkv7_layers import LoraRanks, TimeMix


def build_peer(model: Any, device: torch.device, dtype: torch.dtype, fused: bool = True) -> nn.Module:
    """fla's `RWKV7ForCausalLM` in `dtype` with the weights of `model`, a causal `RWKV7ForDiffusion`.

    `fused` False leaves out the fused norms and loss.
    """
    from fla.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM

    config, ranks = model.config, model.config.lora_ranks
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # it warns of itself at every layer, and of the fused loss
        theirs = RWKV7ForCausalLM(
            RWKV7Config(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                head_dim=config.head_size,
                **_rank_arguments(ranks),
                fuse_norm=fused,
                fuse_cross_entropy=False,
                fuse_linear_cross_entropy=fused,
                use_l2warp=False,
                use_cache=False,
            )
        )
    theirs = theirs.to_empty(device=device).to(dtype)
    _copy_weights(theirs, model.state_dict(), "", "")
    return theirs


def build_peer_layer(mix: TimeMix, layer: int, num_layers: int, fused: bool = True) -> nn.Module:
    """fla's `RWKV7Attention` with the weights of `mix`, which is layer `layer` of `num_layers`."""
    from fla.layers import RWKV7Attention

    ranks = LoraRanks(w=mix.w1.shape[1], a=mix.a1.shape[1], v=mix.v1.shape[1], g=mix.g1.shape[1])
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        theirs = RWKV7Attention(
            mode="chunk",
            hidden_size=mix.receptance.weight.shape[1],
            head_dim=mix.head_size,
            **_rank_arguments(ranks),
            layer_idx=layer,
            num_hidden_layers=num_layers,
            fuse_norm=fused,
        )
    theirs = theirs.to_empty(device=mix.x_r.device).to(mix.x_r.dtype)
    _copy_weights(theirs, mix.state_dict(), f"blocks.{layer}.att.", f"model.layers.{layer}.attn.")
    return theirs


def _rank_arguments(ranks: LoraRanks) -> dict[str, int]:
    return {
        "decay_low_rank_dim": ranks.w,
        "a_low_rank_dim": ranks.a,
        "v_low_rank_dim": ranks.v,
        "gate_low_rank_dim": ranks.g,
    }


@torch.no_grad()
def _copy_weights(theirs: nn.Module, ours: Mapping[str, Tensor], our_prefix: str, their_prefix: str) -> None:
    """Every parameter of `theirs` from `ours`; the prefixes lead from a part's names to those of the whole model."""
    assert not list(theirs.buffers()), "a buffer of fla's model would stay unset"
    unset = dict(theirs.named_parameters())
    for name, weight in ours.items():
        other = fla_name(our_prefix + name)
        if other is not None:
            parameter = unset.pop(other.removeprefix(their_prefix))
            transposed = re.search(r"_lora\.lora\.\d\.weight$", other) is not None
            parameter.copy_((weight.T if transposed else weight).reshape(parameter.shape))
    assert not unset, f"parameters that ours has not: {', '.join(unset)}"
