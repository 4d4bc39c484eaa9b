"""Where each DeepSpeed wrapper keeps its fp32 masters and optimizer states.

The only module that reaches into DeepSpeed's optimizer wrappers. Which wrapper runs depends on stage and
precision (DeepSpeed 0.19): fp32 stage 0 leaves our optimizer bare, bf16 stage 0 uses FP16_UnfusedOptimizer,
bf16 stage 1 with fp32 accumulation BF16_Optimizer, fp32 stage 1, stage 2 and stage 1 with offload
DeepSpeedZeroOptimizer, stage 3 DeepSpeedZeroOptimizer_Stage3. Each keeps its masters in other attributes, hence the
upper bound on DeepSpeed's version in setup.py; every wrapper has a test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from dlm_dist.training.pieces import Piece


@dataclass(frozen=True)
class Shard:
    """One tensor that the optimizer steps on this rank: fp32 masters of some pieces, and their states."""

    key: str
    """Unique over all ranks; equal keys on two ranks hold equal values (stage 0)."""
    master: torch.Tensor
    """The tensor that the optimizer's state is keyed by."""
    pieces: tuple[Piece, ...]
    replicated: bool
    """True where every rank holds this shard (stage 0)."""

    @property
    def flat(self) -> torch.Tensor:
        """The masters as a 1-D view [numel], without gradient history."""
        return self.master.detach().view(-1)


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Our optimizer, below whatever DeepSpeed wrapped around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def parameter_sizes(engine: Any) -> dict[str, int]:
    """Elements of every trained parameter."""
    named = engine.module.named_parameters()
    return {name: getattr(p, "ds_numel", p.numel()) for name, p in named if p.requires_grad}


def optimizer_bits(engine: Any, shard: Shard) -> int:
    """8 or 32: what the role of a shard's parameters has (optimizers.ROLE_RULES); a shard holds only one role."""
    role = engine.module.parameter_roles()[shard.pieces[0].name]
    return next(group["optim_bits"] for group in engine.optimizer.param_groups if group["name"] == role)


def shards(engine: Any) -> list[Shard]:
    """This rank's shards, in an order that is the same at every start with the same layout."""
    wrapper = engine.optimizer
    names = {id(p): name for name, p in engine.module.named_parameters()}
    rank = torch.distributed.get_rank()
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        return [
            Shard(f"rank{rank}.sub{index}", flat, tuple(_stage3_pieces(wrapper, index, names, rank)), False)
            for index, flat in enumerate(wrapper.fp32_partitioned_groups_flat)
        ]
    if isinstance(wrapper, BF16_Optimizer):
        partitions, groups = wrapper.fp32_groups_flat_partition, wrapper.bf16_groups
    elif isinstance(wrapper, DeepSpeedZeroOptimizer):
        partitions, groups = wrapper.single_partition_of_fp32_groups, wrapper.bit16_groups
    else:
        return [
            Shard(name, master, (Piece(name, 0, 0, master.numel()),), True)
            for name, master in _replicated_masters(engine, names)
        ]
    return [
        Shard(f"rank{rank}.group{index}", flat, tuple(_partition_pieces(groups[index], names)), False)
        for index, flat in enumerate(partitions)
    ]


def own_shards(engine: Any) -> list[Shard]:
    """The shards that are this rank's to write; one that all ranks hold belongs to one of them."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return [shard for number, shard in enumerate(shards(engine)) if not shard.replicated or number % world == rank]


def _stage3_pieces(
    wrapper: DeepSpeedZeroOptimizer_Stage3, index: int, names: Mapping[int, str], rank: int
) -> Iterable[Piece]:
    """Stage 3 cuts every parameter into equal parts; the last ones are padded."""
    for parameter in wrapper.fp16_groups[index]:
        _, offset, part = wrapper.grad_position[wrapper.get_param_id(parameter)]
        start = rank * part
        numel = min(part, parameter.ds_numel - start)
        if numel > 0:
            yield Piece(names[id(parameter)], start, offset, numel)


def _partition_pieces(group: Iterable[Any], names: Mapping[int, str]) -> Iterable[Piece]:
    """Stages 1 and 2 cut the flattened group; `_hp_mapping` is None where this rank has nothing of a parameter."""
    for parameter in group:
        mapping = parameter._hp_mapping
        if mapping is not None:
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Piece(names[id(parameter)], int(low.start), int(high.start), int(low.numel))


def _replicated_masters(engine: Any, names: Mapping[int, str]) -> Iterable[tuple[str, torch.Tensor]]:
    wrapper = engine.optimizer
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        for low_group, high_group in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for low, high in zip(low_group, high_group, strict=True):
                yield names[id(low)], high
    else:
        for group in wrapper.param_groups:
            for parameter in group["params"]:
                yield names[id(parameter)], parameter


class Part(NamedTuple):
    """A run of elements of a flattened parameter."""

    start: int
    values: torch.Tensor
    """[n] fp32, the elements from `start` on."""


@torch.no_grad()
def write_masters(engine: Any, values: Mapping[str, Part]) -> None:
    """Set the fp32 masters from `values`, which cover this rank's pieces; the low-precision weights stay as they are.

    DeepSpeed clones masters from weights it has already rounded to bf16; this puts the unrounded values in.
    """
    for shard in shards(engine):
        for piece in shard.pieces:
            first, whole = values[piece.name]
            source = whole[piece.start - first : piece.start - first + piece.numel]
            shard.flat[piece.offset : piece.offset + piece.numel].copy_(source)


def clear_optimizer_state(engine: Any) -> None:
    """Forget all optimizer states, as if no step had been made.

    Also undoes the step that bf16 stage 0 makes on zero gradients while it initialises: FP16_UnfusedOptimizer steps
    once to allocate its states, so the step count is one too high and weight decay has been applied. Build the
    optimizer with every lr = 0 (so the masters do not move), call this after `initialize`, then set the rates.
    """
    base_optimizer(engine).state.clear()


def forget_skipped_gradients(engine: Any) -> None:
    """Stages 1 and 2 with offload: a step that was skipped leaves nothing to the next one.

    DeepSpeed keeps the fp32 gradients that it has summed so far there (bf16 runs), so that one NaN would skip every
    step from then on.
    """
    wrapper = engine.optimizer
    if not isinstance(wrapper, DeepSpeedZeroOptimizer) or not wrapper.cpu_offload:
        return
    reset = wrapper.reset_cpu_buffers

    def reset_all() -> None:
        reset()
        wrapper.averaged_gradients.clear()

    wrapper.reset_cpu_buffers = reset_all


@torch.no_grad()
def optimizer_state(engine: Any, shard: Shard) -> dict[str, Any]:
    """The optimizer's state of one shard: tensors and numbers by name; empty before the first step."""
    return dict(base_optimizer(engine).state.get(shard.master, {}))


@torch.no_grad()
def set_optimizer_state(engine: Any, shard: Shard, state: Mapping[str, Any]) -> None:
    """Replace the optimizer's state of one shard by copies on the shard's device."""
    device = shard.master.device
    base_optimizer(engine).state[shard.master] = {
        name: value.to(device, copy=True) if torch.is_tensor(value) else value for name, value in state.items()
    }
