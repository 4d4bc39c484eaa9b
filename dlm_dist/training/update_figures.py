"""What an update does to the parameters of each role: gradient norms, and how far the weights move.

Measured where every ZeRO stage does the same thing: around the optimizer's own `step`, which is handed this rank's
fp32 masters and their gradients, already summed over ranks and clipped, in groups that hold one role each. So nothing
here depends on a wrapper, and nothing is gathered but three numbers per role.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dlm_dist.training import zero_state

SAMPLED_FROM = 1 << 18
"""Elements of one role on one rank from which on not every one is compared with what it was before the step."""
STRIDE = 61
"""Then every 61st is: an odd number, so that every column of a matrix takes part."""

_CHUNK = 1 << 18
"""Elements whose squares are summed in fp32; one such sum over all of a large shard would be off by some 1e-3."""


@dataclass(frozen=True)
class _Begun:
    """What the optimizer is about to step: parameters of one role, all of those on this rank or some."""

    role: str
    masters: Sequence[torch.Tensor]
    gradients: torch.Tensor
    """Sum of the squares of their gradients, 0-d."""
    stride: int
    before: torch.Tensor
    """Every stride-th element of the masters, [n]."""


class UpdateMeter:
    """Reads the updates between `begin` and `end`. It keeps a copy of the masters, or of every 61st of more than
    2**18 of a role, while the optimizer steps."""

    def __init__(self, engine: Any) -> None:
        optimizer = zero_state.base_optimizer(engine)
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        self._roles = [group["name"] for group in engine.optimizer.param_groups]
        self._sharded = not all(shard.replicated for shard in zero_state.shards(engine))
        self._active = False
        # By the id of a first master: DeepSpeed steps groups one by one, and torch may call hooks of a step twice.
        self._begun: dict[int, _Begun] = {}
        self._found: dict[int, tuple[str, torch.Tensor]] = {}

    def begin(self, wanted: bool = True) -> None:
        """Measure the update that comes next, if it is `wanted`; what was begun before and came to nothing is over."""
        self._active = wanted
        self._begun.clear()
        self._found.clear()

    def end(self, total_norm: float, group: dist.ProcessGroup | None) -> dict[str, dict[str, float | None]]:
        """The figures of the update since `begin`, each by role. Collective: every rank must call.

        `grad_norm_by_role`: L2 norms before clipping, whose squares sum to that of `total_norm`, the norm before
        clipping of all roles. `update_ratio_by_role`: the norm of the change of the fp32 masters over the norm of what
        they were; None where that is 0.
        """
        self._active = False
        sums = torch.zeros(len(self._roles), 3, dtype=torch.float64)
        found = list(self._found.values())
        if found:  # a rank may hold nothing but padding
            for (role, _), three in zip(found, torch.stack([squares for _, squares in found]).cpu(), strict=True):
                sums[self._roles.index(role)] += three
        if self._sharded:
            dist.all_reduce(sums, group=group)
        gradients, moves, masters = sums.T.tolist()
        unclipped = total_norm**2 / sum(gradients) if any(gradients) else 0.0
        return {
            "grad_norm_by_role": {
                role: math.sqrt(square * unclipped) for role, square in zip(self._roles, gradients, strict=True)
            },
            "update_ratio_by_role": {
                role: math.sqrt(move / master) if master else None
                for role, move, master in zip(self._roles, moves, masters, strict=True)
            },
        }

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._active:  # most steps are not measured and should pay nothing
            self._keep(optimizer)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._begun:
            self._compare()

    @torch.no_grad()
    def _keep(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            masters = [master for master in group["params"] if master.grad is not None]
            if masters:
                stride = STRIDE if sum(master.numel() for master in masters) > SAMPLED_FROM else 1
                gradients = _squares([master.grad for master in masters])
                before = _elements(masters, stride)
                self._begun[id(masters[0])] = _Begun(group["name"], masters, gradients, stride, before)

    @torch.no_grad()
    def _compare(self) -> None:
        for key, begun in self._begun.items():
            moved = _squares([_elements(begun.masters, begun.stride) - begun.before])
            share = sum(master.numel() for master in begun.masters) / begun.before.numel()
            sums = torch.stack([begun.gradients, moved * share, _squares([begun.before]) * share])
            self._found[key] = begun.role, sums
        self._begun.clear()


def _elements(masters: Sequence[torch.Tensor], stride: int) -> torch.Tensor:
    """Every stride-th element of each of the masters, copied to one tensor [n]."""
    return torch.cat([master.reshape(-1)[::stride] for master in masters])


def _squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all `tensors` (fp32), 0-d fp64 (on MPS fp32), in few kernels however many there are."""
    chunks = [chunk for tensor in tensors for chunk in tensor.reshape(-1).split(_CHUNK)]
    wide = torch.float32 if chunks[0].device.type == "mps" else torch.float64
    return torch.stack(torch._foreach_norm(chunks)).to(wide).square().sum()
