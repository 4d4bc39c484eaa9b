"""The layout of flash-linear-attention's `RWKV7ForCausalLM`: a folder with config.json and safetensors.

Beside other names it keeps the low-rank maps as `nn.Linear` weights, hence transposed, and some vectors without
BlinkDL's leading dimensions of one. Nothing here needs fla to be installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dlm_dist.models.conversion import (
    Weights,
    check_tensors,
    expected_shapes,
    fill_unused,
    read_safetensors,
    read_tensor_file,
    read_their_config,
    require_causal_rwkv7,
    staged,
    write_safetensors,
)
from dlm_dist.models.rwkv7 import RWKV7Config

MODEL_TYPE = "rwkv7"
# Layer 0's v0, v1, v2 have no place in fla. Kept beside its weights, a file comes back as it was.
UNUSED_FILE = "unused_by_fla.safetensors"

_TOP = {"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}
_NORMS = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"}
_PROJECTIONS = {
    "receptance.weight": "r_proj.weight",
    "key.weight": "k_proj.weight",
    "value.weight": "v_proj.weight",
    "output.weight": "o_proj.weight",
    "ln_x.weight": "g_norm.weight",
    "ln_x.bias": "g_norm.bias",
}
_LORA_PARTS = {"0": "lora.2.bias", "1": "lora.0.weight", "2": "lora.2.weight"}

# fla's fields that change what is computed: its default, and the one value that our model can represent.
_FIXED: dict[str, tuple[Any, Any]] = {
    "hidden_act": ("sqrelu", "sqrelu"),
    "norm_first": (True, True),
    "norm_bias": (True, True),
    "norm_eps": (1e-5, 1e-5),
    "attn": (None, None),
    "tie_word_embeddings": (False, False),
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "decay_low_rank_dim",
    "a_low_rank_dim",
    "v_low_rank_dim",
    "gate_low_rank_dim",
)
# fla scales the group norm's eps with the head: 64 * 1e-5 is BlinkDL's.
_HEAD_SIZE = 64
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def fla_name(name: str) -> str | None:
    """fla's name of BlinkDL's tensor `name`; None for those of layer 0 that fla does not have."""
    if name in _TOP:
        return _TOP[name]
    if name.startswith("ln_out."):
        return name.replace("ln_out", "model.norm")
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(.+)", name)
    assert match, name
    layer, part, rest = match.groups()
    if part in _NORMS:
        return f"model.layers.{layer}.{_NORMS[part]}.{rest}"
    if part == "ffn":
        return f"model.layers.{layer}.ffn.{rest}"
    if rest in _PROJECTIONS:
        rest = _PROJECTIONS[rest]
    elif lora := re.fullmatch(r"([wavg])([012])", rest):
        if layer == "0" and lora[1] == "v":
            return None
        rest = f"{lora[1]}_lora.{_LORA_PARTS[lora[2]]}"
    return f"model.layers.{layer}.attn.{rest}"


def _is_transposed(name: str) -> bool:
    return re.search(r"\.att\.[wavg][12]$", name) is not None


def _fla_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """fla's shape of BlinkDL's tensor: only att.x_* keep their leading dimensions of one."""
    if _is_transposed(name):
        return shape[::-1]
    return shape[2:] if len(shape) == 3 and ".att.x_" not in name else shape


def looks_like_fla(tensors: Mapping[str, Any]) -> bool:
    """Whether tensors carry fla's names of an RWKV-7."""
    return any(re.fullmatch(r"model\.layers\.\d+\.attn\.x_[rx]", name) for name in tensors)


def our_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fla's tensors under our names in our shapes; what has none of fla's names is left as it is.

    Nothing is demanded of them: this is for looking at them, not for a model.
    """
    split = _split_old_mixes(tensors)
    layers = {int(match[1]) for name in split if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    config = RWKV7Config(vocab_size=1, hidden_size=_HEAD_SIZE, num_hidden_layers=max(layers, default=0) + 1)
    shapes = expected_shapes(config)
    names = {other: name for name in shapes if (other := fla_name(name)) is not None}
    ours: dict[str, Tensor] = {}
    for other, tensor in split.items():
        name = names.get(other, other)
        if name != other and _is_transposed(name) and tensor.dim() == 2:
            tensor = tensor.T
        elif name != other and len(shapes[name]) == 3 and tensor.dim() == 1:
            tensor = tensor.view(1, 1, -1)
        ours[name] = tensor
    return ours


def read_fla(folder: Path) -> Weights[RWKV7Config]:
    """The weights in a folder written by fla's `save_pretrained` (one file or several), in the dtypes they have there.

    Raises ValueError naming a field of config.json that our model cannot represent, or a tensor that is missing,
    misshapen or unknown with its shape and the one expected.
    """
    fields = read_their_config(folder, "fla's", MODEL_TYPE)
    config = _our_config(fields, folder / "config.json")
    theirs = _split_old_mixes(read_safetensors(folder))
    shapes = expected_shapes(config)
    names = {name: other for name in shapes if (other := fla_name(name)) is not None}
    check_tensors(theirs, {other: _fla_shape(name, shapes[name]) for name, other in names.items()}, folder)
    tensors = {
        name: theirs[other].T.contiguous() if _is_transposed(name) else theirs[other].view(shapes[name])
        for name, other in names.items()
    }
    if (folder / UNUSED_FILE).is_file():
        tensors |= read_tensor_file(folder / UNUSED_FILE)
    whole, notes = fill_unused(config, tensors)
    check_tensors(whole, shapes, folder)
    return Weights(config, {name: whole[name] for name in shapes}, notes)


def write_fla(weights: Weights[RWKV7Config], destination: Path) -> None:
    """Write the folder `destination`, which fla's `from_pretrained` opens.

    Raises ValueError where it exists or fla's model cannot compute the same.
    """
    require_causal_rwkv7(weights.config)
    config = weights.config
    if config.head_size != _HEAD_SIZE:
        raise ValueError(
            f"head_size is {config.head_size}: fla's norm of the heads equals RWKV-7's at head_size {_HEAD_SIZE} only."
        )
    tensors, unused = {}, {}
    for name, tensor in weights.tensors.items():
        other = fla_name(name)
        if other is None:
            unused[name] = tensor.contiguous()
        else:
            shape = _fla_shape(name, tuple(tensor.shape))
            tensors[other] = tensor.T if _is_transposed(name) else tensor.reshape(shape)
    with staged(destination) as folder:
        folder.mkdir(parents=True)
        write_safetensors(tensors, folder)
        save_file(unused, folder / UNUSED_FILE, metadata={"format": "pt"})
        text = json.dumps(_their_config(weights), indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _their_config(weights: Weights[RWKV7Config]) -> dict[str, Any]:
    config = weights.config
    ranks = config.lora_ranks
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "head_dim": config.head_size,
        "num_heads": config.hidden_size // config.head_size,
        "value_dim": [config.hidden_size] * config.num_hidden_layers,
        "decay_low_rank_dim": ranks.w,
        "a_low_rank_dim": ranks.a,
        "v_low_rank_dim": ranks.v,
        "gate_low_rank_dim": ranks.g,
        "hidden_ratio": 4,
        "intermediate_size": 4 * config.hidden_size,
        **{name: value for name, (_, value) in _FIXED.items()},
        # Not fused, fla normalises keys with BlinkDL's eps.
        "fuse_norm": False,
        "dtype": str(weights.dtype).removeprefix("torch."),
        **{name: getattr(config, name, None) for name in _TOKEN_IDS},
    }


def _our_config(fields: Mapping[str, Any], file: Path) -> RWKV7Config:
    """Our configuration of what fla's fields say. Raises ValueError naming a field that cannot be represented."""

    def require(field: str, value: Any, expected: Any) -> None:
        if value != expected:
            raise ValueError(f"{file}: {field} is {value!r}, and only {expected!r} can be converted.")

    for field in _SIZES:
        if not isinstance(fields.get(field), int) or fields[field] < 1:
            raise ValueError(f"{file}: {field} is {fields.get(field)!r}, expected a whole number above 0.")
    width = fields["hidden_size"]
    for field, (default, expected) in _FIXED.items():
        require(field, fields.get(field, default), expected)
    if fields.get("head_dim", _HEAD_SIZE) is None:
        require("num_heads", fields.get("num_heads"), width // _HEAD_SIZE)
    else:
        require("head_dim", fields.get("head_dim", _HEAD_SIZE), _HEAD_SIZE)
    if fields.get("intermediate_size") is None:
        require("hidden_ratio", fields.get("hidden_ratio") or 4, 4)
    else:
        require("intermediate_size", fields["intermediate_size"], 4 * width)
    values = fields.get("value_dim")
    for value in values if isinstance(values, list) else [width if values is None else values]:
        require("value_dim", value, width)
    sizes = {field: fields[field] for field in _SIZES} | {"head_size": _HEAD_SIZE, "direction": "causal"}
    if width % _HEAD_SIZE:
        raise ValueError(f"{file}: hidden_size is {width}, expected a multiple of head_dim = {_HEAD_SIZE}.")
    ids = {name: fields[name] for name in _TOKEN_IDS if fields.get(name) is not None}
    return RWKV7Config(**sizes, **ids)


def _split_old_mixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Early versions of fla kept the six token-shift weights of a layer as one tensor x_x [6, C]."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".attn.x_x") and tensor.dim() == 2 and tensor.shape[0] == 6:
            for kind, row in zip("rwkvag", tensor, strict=True):
                split[f"{name[:-1]}{kind}"] = row.view(1, 1, -1)
        else:
            split[name] = tensor
    return split
