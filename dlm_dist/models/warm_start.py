"""Starting a model from the weights of another one, with a report of what fitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_ROWS_ARE_TOKENS = ("embedding", "head")


# 98 % of the forward scan: about the causal model, and the backward scan has a gradient.
NEARLY_FORWARD = 4.0


def fitting_sizes(source: str, revision: str | None, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What `sizes` leaves open and a start from the RWKV-7 model at `source` decides; empty for other backbones.

    The ranks of its low-rank maps, for a model of the same width that names no rule: they then fit, whichever rule
    made them. From causal weights a bidirectional model's gate starts nearly forward.
    """
    from dlm_dist import models

    given = models.read_config(source, revision)
    if not hasattr(given, "lora_ranks"):
        return {}
    decided: dict[str, Any] = {}
    if "low_rank_rule" not in sizes and given.hidden_size == sizes["hidden_size"]:
        names = ("decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim")
        decided |= {name: getattr(given, name) for name in names}
    if (given.direction, sizes["direction"]) == ("causal", "bidirectional"):
        decided["direction_gate_init"] = NEARLY_FORWARD
    return {name: value for name, value in decided.items() if name not in sizes}


@torch.no_grad()
def initialize_from(model: Any, source: str, revision: str | None = None) -> dict[str, list[str]]:
    """Copy what fits from the model at `source` (a checkpoint, a model folder, a hub id with `revision`) into `model`.

    A parameter of the same name and shape is copied ("matched"); an embedding or head with another number of
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
        value = given.get(name)
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
