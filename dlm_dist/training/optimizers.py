"""Optimizers and parameter groups: a parameter's role decides its LR scale, weight decay and optimizer bits.

ZeRO 1-3 hand the optimizer one flat tensor per parameter group, which silently defeats bitsandbytes' own rules
for small tensors and overrides; the bits therefore live in the group (`optim_bits`), and `get_config` reads
them there, which is right in every stage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dlm_dist.training.lion import Lion


@dataclass(frozen=True)
class RoleRule:
    """How parameters of a role are trained; `decays`: weight decay applies, `eight_bit`: 8-bit states may be used."""

    lr_scale: float = 1.0
    decays: bool = False
    eight_bit: bool = False


# BlinkDL's groups (RWKV-LM, RWKV-v7/train_temp): the decay base learns twice as fast, only large matrices decay.
# Embedding and head see rare, tiny gradients, so their second moments stay in 32 bits.
ROLE_RULES: Mapping[str, RoleRule] = {
    "matrix": RoleRule(decays=True, eight_bit=True),
    "embedding": RoleRule(decays=True),
    "head": RoleRule(decays=True),
    "lora": RoleRule(),
    "vector": RoleRule(),
    "decay_base": RoleRule(lr_scale=2.0),
}


def parameter_groups(
    model: nn.Module, roles: Mapping[str, str], lr: float, weight_decay: float, eight_bit: bool
) -> list[dict[str, Any]]:
    """One optimizer group per role that occurs, in a fixed order, parameters in model order.

    Every trainable parameter must have a role: ValueError names those that have none.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name in parameters if roles.get(name) not in ROLE_RULES]
    if missing:
        raise ValueError(f"parameters without a known role: {', '.join(missing[:5])} ({len(missing)} in all)")
    groups = []
    for role, rule in ROLE_RULES.items():
        members = [p for name, p in parameters.items() if roles[name] == role]
        if members:
            groups.append(
                {
                    "params": members,
                    "name": role,
                    "lr": lr * rule.lr_scale,
                    "lr_scale": rule.lr_scale,
                    "weight_decay": weight_decay if rule.decays else 0.0,
                    "optim_bits": 8 if eight_bit and rule.eight_bit else 32,
                }
            )
    return groups


def group_table(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each group of `parameter_groups` is, for the start of the log and the run's manifest.

    `names` are those of its parameters, where `*` stands for any layer; `lr` is the peak learning rate.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        {
            "role": group["name"],
            "names": list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", names[id(p)]) for p in group["params"])),
            "tensors": len(group["params"]),
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in group["params"]),
            "lr": group["lr"],
            "lr_scale": group["lr_scale"],
            "weight_decay": group["weight_decay"],
            "optimizer_bits": group["optim_bits"],
        }
        for group in groups
    ]


class FiniteGuard:
    """Mixin before an optimizer class that steps on plain fp32 gradients (DeepSpeed stage 0 without bf16).

    DeepSpeed itself neither checks nor records the gradient norm in that mode and would write NaN into the
    weights. `step` measures the norm over all (already reduced) gradients, skips the update when it is not finite, and
    clips otherwise. The engine reads `overflow` and `_global_grad_norm` afterwards.
    """

    overflow = False
    clip_norm = 0.0
    """Clip the global norm to this; 0 does not clip. Set by the engine builder."""
    _global_grad_norm: torch.Tensor | None = None
    param_groups: list[dict[str, Any]]

    def step(self, closure: None = None) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        if self.clip_norm > 0 and norm > self.clip_norm:
            torch._foreach_mul_(gradients, self.clip_norm / norm)
        super().step(closure)  # type: ignore[misc]


class GroupBits:
    """Mixin before a bitsandbytes optimizer: 8 or 32 bits as the parameter group says, never by tensor size."""

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config = super().get_config(gindex, pindex, group)  # type: ignore[misc]
        return {**config, "optim_bits": group["optim_bits"], "min_8bit_size": 0}


def build_optimizer(
    name: str, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, guard: bool
) -> torch.optim.Optimizer:
    """The optimizer called `name` over `groups`; `guard` puts FiniteGuard before it.

    Lion's update has no eps.
    """
    base, options = _OPTIMIZERS[name](lr, betas, eps)
    optimizer_class = type(f"Guarded{base.__name__}", (FiniteGuard, base), {}) if guard else base
    return optimizer_class(groups, **options)


def _adamw(lr: float, betas: tuple[float, float], eps: float) -> tuple[type, dict[str, Any]]:
    return torch.optim.AdamW, {"lr": lr, "betas": betas, "eps": eps, "fused": True}


def _adamw8bit(lr: float, betas: tuple[float, float], eps: float) -> tuple[type, dict[str, Any]]:
    import bitsandbytes

    return type("AdamW8bit", (GroupBits, bitsandbytes.optim.AdamW8bit), {}), {
        "lr": lr,
        "betas": betas,
        "eps": eps,
    }


def _lion8bit(lr: float, betas: tuple[float, float], eps: float) -> tuple[type, dict[str, Any]]:
    import bitsandbytes

    return type("Lion8bit", (GroupBits, bitsandbytes.optim.Lion8bit), {}), {"lr": lr, "betas": betas}


def _lion(lr: float, betas: tuple[float, float], eps: float) -> tuple[type, dict[str, Any]]:
    return Lion, {"lr": lr, "betas": betas}


_OPTIMIZERS: dict[str, Callable[[float, tuple[float, float], float], tuple[type, dict[str, Any]]]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "lion": _lion,
    "lion8bit": _lion8bit,
}

IN_32_BITS: Mapping[str, str] = {"adamw8bit": "adamw", "lion8bit": "lion"}
"""The same update rule with the same hyper-parameters, without bitsandbytes."""


def eight_bit_problem(name: str, device: torch.device) -> str | None:
    """Why the optimizer `name` of IN_32_BITS cannot run on `device`: it takes one step there; None where it can.

    What a broken installation raises at its first use is up to it, so any exception counts.
    """
    parameter = nn.Parameter(torch.zeros(4, 256, device=device))
    groups = [{"params": [parameter], "optim_bits": 8, "weight_decay": 0.0}]
    try:
        optimizer = build_optimizer(name, groups, 0.125, (0.9, 0.99), 1e-8, guard=False)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state, moved = optimizer.state[parameter]["state1"].dtype, parameter.detach().mean().item()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if state != torch.uint8 or abs(moved + 0.125) > 0.0125:
        return f"one step moved a value by {moved:.4f} instead of -0.125, with {state} states"
    return None
