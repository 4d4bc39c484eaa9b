"""The layout of transformers' dense `Qwen3ForCausalLM`: a folder with config.json and safetensors.

Its tensors have our names, so only the configuration is translated: ours knows the mask token and the direction
beside Qwen3's own fields, and theirs says by `is_causal` what a token sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import Qwen3Config

from dlm_dist.models.conversion import (
    Weights,
    fitting_tensors,
    read_safetensors,
    read_their_config,
    staged,
    write_safetensors,
)
from dlm_dist.models.qwen3 import Qwen3DiffusionConfig

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"

# Fields that would change what is computed, and all that is accepted of them; None: the field is absent.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "architectures": (None, [ARCHITECTURE]),
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "use_sliding_window": (None, False),
    "is_causal": (None, True, False),
    "quantization_config": (None,),
    "auto_map": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "moe_intermediate_size": (None, 0),
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ROPE_FIELDS = {"rope_type", "type", "rope_theta"}
# What transformers derives, or writes about the file and not about the model.
_NOT_FIELDS = ("model_type", "architectures", "transformers_version", "use_cache", "is_causal")


def read_qwen3(folder: Path) -> Weights[Qwen3DiffusionConfig]:
    """The weights in a folder of transformers' Qwen3 (one file or several), in the dtypes they have there.

    The configuration has no mask token yet, and the direction causal unless config.json says `is_causal: false`.
    Raises ValueError naming a field of config.json that our model cannot represent, or a tensor that is missing,
    misshapen or unknown.
    """
    fields = read_their_config(folder, "a Qwen3 model", MODEL_TYPE, ": only dense Qwen3 models can be converted")
    config = _our_config(fields, folder / "config.json")
    return Weights(config, fitting_tensors(config, read_safetensors(folder), folder))


def write_qwen3(
    weights: Weights[Qwen3DiffusionConfig], destination: Path, add_files: Callable[[Path], None] | None = None
) -> None:
    """Write the folder `destination`, which `Qwen3ForCausalLM.from_pretrained` opens.

    A bidirectional model says so by `is_causal: false`, which versions of transformers before 5 do not know.
    `add_files` gets the path of the folder, to put more beside the weights. Raises ValueError where it exists or the
    weights are not those of Qwen3.
    """
    if not isinstance(weights.config, Qwen3DiffusionConfig):
        raise ValueError(f"this is a model of type {weights.config.model_type!r}, and the layout is one of Qwen3.")
    if weights.config.layer_patterns is not None:
        raise ValueError(
            f"this model has layer_patterns {weights.config.layer_patterns}, and that layout has no place for them: "
            "whoever read it would compute something else."
        )
    with staged(destination) as folder:
        folder.mkdir(parents=True)
        write_safetensors(weights.tensors, folder)
        if add_files is not None:
            add_files(folder)
        text = json.dumps(_their_config(weights), indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _our_config(fields: Mapping[str, Any], file: Path) -> Qwen3DiffusionConfig:
    """Our configuration of what their fields say. Raises ValueError naming a field that cannot be represented."""
    for field, accepted in _ACCEPTED.items():
        value = fields.get(field)
        if value not in accepted:
            only = " or ".join(repr(one) for one in accepted if one is not None) or "none"
            raise ValueError(f"{file}: {field} is {value!r}, and only {only} can be converted.")
    for field in _SIZES:
        if not isinstance(fields.get(field), int) or fields[field] < 1:
            raise ValueError(f"{file}: {field} is {fields.get(field)!r}, expected a whole number above 0.")
    layers = fields.get("layer_types")
    if layers is not None and set(layers) != {"full_attention"}:
        raise ValueError(f"{file}: layer_types holds {sorted(set(layers))}, and only full_attention can be converted.")
    for field in ("rope_scaling", "rope_parameters"):
        _require_plain_rope(fields.get(field), field, file)
    known = {name: value for name, value in fields.items() if name not in _NOT_FIELDS and value is not None}
    direction = "bidirectional" if fields.get("is_causal") is False else "causal"
    try:
        # Through their class: the default of a field that is absent is theirs and not ours.
        theirs = {name: value for name, value in Qwen3Config(**known).to_dict().items() if name not in _NOT_FIELDS}
        return Qwen3DiffusionConfig(**theirs, direction=direction)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: {error}") from error


def _require_plain_rope(rope: Any, field: str, file: Path) -> None:
    """Raise ValueError unless `rope` says no more than the base of the rotations."""
    if rope is None:
        return
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise ValueError(f"{file}: {field} is of type {kind!r}, and only plain rotary positions can be converted.")
    if unknown := sorted(set(rope) - _ROPE_FIELDS):
        raise ValueError(f"{file}: {field} has {', '.join(unknown)}, and only rope_theta can be converted.")


def _their_config(weights: Weights[Qwen3DiffusionConfig]) -> dict[str, Any]:
    """config.json in the form of the published models, which every version of transformers reads."""
    config = weights.config
    # Their fields with all values, and whatever else the configuration holds that is not transformers' default.
    fields = config.to_diff_dict() | {name: getattr(config, name) for name in Qwen3Config.__annotations__}
    for name in ("mask_token_id", "direction", "layer_patterns", "layer_types", "rope_parameters", "model_type"):
        fields.pop(name, None)
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    causal = config.direction == "causal"
    fields |= {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "dtype": str(weights.dtype).removeprefix("torch."),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "use_cache": causal,
    }
    return fields if causal else fields | {"is_causal": False}
