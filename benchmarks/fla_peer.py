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

from dlm_dist.models.rwkv7_layers import LoraRanks, TimeMix

_MIX_NAMES = {
    "receptance.weight": "r_proj.weight",
    "key.weight": "k_proj.weight",
    "value.weight": "v_proj.weight",
    "output.weight": "o_proj.weight",
    "ln_x.weight": "g_norm.weight",
    "ln_x.bias": "g_norm.bias",
}
_LORA_PARTS = {"0": "lora.2.bias", "1": "lora.0.weight", "2": "lora.2.weight"}
_MODEL_NAMES = (
    (r"^emb\.", "model.embeddings."),
    (r"^head\.", "lm_head."),
    (r"^ln_out\.", "model.norm."),
    (r"^blocks\.", "model.layers."),
    (r"\.ln0\.", ".pre_norm."),
    (r"\.ln1\.", ".attn_norm."),
    (r"\.ln2\.", ".ffn_norm."),
)


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
    _copy_weights(theirs, {_model_name(name): weight for name, weight in model.state_dict().items()})
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
    _copy_weights(theirs, {_mix_name(name): weight for name, weight in mix.state_dict().items()})
    return theirs


def _rank_arguments(ranks: LoraRanks) -> dict[str, int]:
    return {
        "decay_low_rank_dim": ranks.w,
        "a_low_rank_dim": ranks.a,
        "v_low_rank_dim": ranks.v,
        "gate_low_rank_dim": ranks.g,
    }


def _mix_name(name: str) -> str:
    """fla's name of a parameter of a time mix."""
    lora = re.fullmatch(r"([wavg])([012])", name)
    return f"{lora[1]}_lora.{_LORA_PARTS[lora[2]]}" if lora else _MIX_NAMES.get(name, name)


def _model_name(name: str) -> str:
    """fla's name of a parameter of the model."""
    before, mix, rest = name.partition(".att.")
    if mix:
        name = f"{before}.attn.{_mix_name(rest)}"
    for pattern, replacement in _MODEL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


@torch.no_grad()
def _copy_weights(theirs: nn.Module, ours: Mapping[str, Tensor]) -> None:
    """Every parameter of `theirs` from `ours` by name; only layer 0's unused v0, v1, v2 may be left over."""
    assert not list(theirs.buffers()), "a buffer of fla's model would stay unset"
    parameters = dict(theirs.named_parameters())
    for name, parameter in parameters.items():
        weight = ours[name]
        transposed = re.search(r"_lora\.lora\.\d\.weight$", name) is not None
        parameter.copy_((weight.T if transposed else weight).reshape(parameter.shape))
    left_over = [name for name in ours if name not in parameters]
    assert all("v_lora" in name for name in left_over), left_over
