"""Starting a model from the weights of another one, with a report of what fitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from dlm_dist.models.qwen3 import Qwen3DiffusionConfig
from dlm_dist.models.rwkv7 import RANK_FIELDS, RWKV7Config

_ROWS_ARE_TOKENS = ("embedding", "head")


# 98 % of the forward scan: about the causal model, and the backward scan has a gradient.
NEARLY_FORWARD = 4.0


def fitting_sizes(given: PreTrainedConfig, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What the keys of `sizes` leave open (None) and a start from the model `given`, of the same backbone, decides.

    Raises ValueError where `sizes` names another head size: the same matrices would be another model.
    """
    if isinstance(given, RWKV7Config) and sizes["backbone"] == "rwkv7":
        decided = _fitting_rwkv7(given, sizes)
    elif isinstance(given, Qwen3DiffusionConfig) and sizes["backbone"] == "qwen3":
        decided = _fitting_qwen3(given, sizes)
    else:
        decided = {}
    return {name: value for name, value in decided.items() if sizes.get(name) is None}


def _fitting_rwkv7(given: RWKV7Config, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Its head size, and the ranks of its low-rank maps for a model of the same width that names no rule.

    From causal weights a bidirectional model's gate starts nearly forward, from bidirectional ones as theirs did.
    """
    decided: dict[str, Any] = {}
    if given.hidden_size == sizes["hidden_size"]:
        _refuse_other_heads("head_size", sizes, given.head_size)
        decided["head_size"] = given.head_size
        if sizes.get("low_rank_rule") is None:
            decided |= {name: getattr(given, name) for name in RANK_FIELDS}
    if sizes["direction"] == "bidirectional":
        decided["direction_gate_init"] = NEARLY_FORWARD if given.direction == "causal" else given.direction_gate_init
    return decided


def _fitting_qwen3(given: Qwen3DiffusionConfig, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What no shape shows, and for a model of the same width the other sizes too."""
    rope: Mapping[str, Any] = given.rope_parameters or {}
    decided: dict[str, Any] = {"rope_theta": rope["rope_theta"], "rms_norm_eps": given.rms_norm_eps}
    if given.hidden_size == sizes["hidden_size"]:
        _refuse_other_heads("head_dim", sizes, given.head_dim)
        names = ("head_dim", "num_key_value_heads", "intermediate_size", "tie_word_embeddings")
        decided |= {name: getattr(given, name) for name in names}
    if given.layer_patterns is not None and given.direction == sizes["direction"]:
        decided["layer_patterns"] = given.layer_patterns
    return decided


def _refuse_other_heads(key: str, sizes: Mapping[str, Any], given: int) -> None:
    if sizes.get(key) not in (None, given):
        raise ValueError(
            f"model.{key} is {sizes[key]}, but the given weights have heads of {given}: "
            "their matrices would fit and mean something else; leave the key out"
        )


@torch.no_grad()
def initialize_from(model: Any, source: str, revision: str | None = None) -> dict[str, list[str]]:
    """Copy what fits from the model at `source` (a checkpoint, a model folder, a hub id with `revision`) into `model`.

    A parameter of the same name and shape is copied ("matched"; a backward scan that the source does not have takes
    the weights of its forward one); an embedding or head with another number of
    rows is copied as far as both reach ("resized"); anything else keeps its fresh values ("skipped", or "unused"
    if only the source has it). Returns the names under these four keys. ValueError when nothing fits at all.
    """
    from dlm_dist import models

    # Copies of the parameters under every name: a tied head appears once in `model`, maybe twice in the source.
    given = models.load(source, dtype=torch.float32, revision=revision).state_dict()
    roles = model.parameter_roles()
    report: dict[str, list[str]] = {"matched": [], "resized": [], "skipped": [], "unused": []}
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        value = given.get(name, given.get(name.replace(".backward_mix.", ".")))
        if value is not None and value.shape == parameter.shape:
            parameter.copy_(value)
            report["matched"].append(name)
        elif value is not None and roles[name] in _ROWS_ARE_TOKENS and value.shape[1:] == parameter.shape[1:]:
            rows = min(len(value), len(parameter))
            parameter[:rows].copy_(value[:rows])
            report["resized"].append(name)
        else:
            report["skipped"].append(name)
    report["unused"] = [name for name in given if name not in own and name not in model.state_dict()]
    if not report["matched"] and not report["resized"]:
        raise ValueError(
            f"model.init_from {source}: none of its {len(given)} tensors fits this model "
            f"(first of ours: {next(iter(own))}); check model.backbone and the sizes"
        )
    return report
