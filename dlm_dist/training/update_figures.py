"""What an update does to the parameters of each role: gradient norms, and how far the weights move.

Measured where every ZeRO stage does the same thing: around the optimizer's own `step`, which is handed this rank's
fp32 masters and their gradients, already summed over ranks and clipped, in groups that hold one role each. So nothing
here depends on a wrapper, and nothing is gathered but three numbers per role.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from dlm_dist.training import zero_state
from dlm_dist.training.zero_speed import sum_of_squares

SAMPLED_FROM = 1 << 20
"""Elements of one role on one rank from which on not every one is compared with what it was before the step."""
STRIDE = 61
"""Then every 61st is: an odd number, so that every column of a matrix takes part."""


class UpdateMeter:
    """Reads the updates between `begin` and `end`. It keeps a copy of the masters, or of every 61st of more than
    2**20 of a role, while the optimizer steps."""

    def __init__(self, engine: Any) -> None:
        optimizer = zero_state.base_optimizer(engine)
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        self._roles = [group["name"] for group in engine.optimizer.param_groups]
        self._sharded = not all(shard.replicated for shard in zero_state.shards(engine))
        self._active = False
        # By the id of a master: a step of the optimizer may be one group of several.
        self._squares: dict[int, torch.Tensor] = {}
        self._role_of: dict[int, str] = {}
        self._copies: dict[int, tuple[int, torch.Tensor]] = {}

    def begin(self) -> None:
        """Measure the update that comes next."""
        self._active = True
        self._squares.clear()

    def end(self, total_norm: float, group: dist.ProcessGroup | None) -> dict[str, dict[str, float | None]]:
        """The figures of the update since `begin`, each by role. Collective: every rank must call.

        `grad_norm_by_role`: L2 norms before clipping, whose squares sum to that of `total_norm`, the norm before
        clipping of all roles. `update_ratio_by_role`: the norm of the change of the fp32 masters over the norm of what
        they were; None where that is 0.
        """
        self._active = False
        sums = torch.zeros(len(self._roles), 3, dtype=torch.float64)
        for key, squares in zip(self._squares, torch.stack(list(self._squares.values())).cpu(), strict=True):
            sums[self._roles.index(self._role_of[key])] += squares
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

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._active:
            return
        for group in optimizer.param_groups:
            members = [master for master in group["params"] if master.grad is not None]
            stride = STRIDE if sum(master.numel() for master in members) > SAMPLED_FROM else 1
            for master in members:
                self._role_of[id(master)] = group["name"]
                self._squares[id(master)] = sum_of_squares(master.grad.reshape(-1))
                self._copies[id(master)] = stride, master.reshape(-1)[::stride].clone()

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for master in group["params"]:
                if id(master) not in self._copies:
                    continue
                stride, before = self._copies.pop(id(master))
                share = master.numel() / before.numel()
                moved = sum_of_squares(master.reshape(-1)[::stride] - before) * share
                self._squares[id(master)] = torch.stack(
                    [self._squares[id(master)], moved, sum_of_squares(before) * share]
                )
