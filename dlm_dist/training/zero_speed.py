"""Work that DeepSpeed's wrappers do twice, done once.

Gradients are as large as the model, so each pass over them shows in the time of a step. What is left out here
decides nothing: a scan for NaN and infinity before a norm that any of them makes NaN or infinite (and the
wrapper skips the step then), a copy of every gradient to fp64 where blocks of fp32 sums do, an all-reduce in a
world of one. Like `zero_state`, this module depends on DeepSpeed's series; benchmarks/train_step.py says what it is
worth.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

_NORM_BLOCK = 1 << 16

STAGE_2_SETTINGS = {
    # The alternative all-reduces the same bytes and copies them four times more, and divides in bf16 before it sums.
    "reduce_scatter": False,
    # Elements. Gradients larger than the bucket are reduced where they lie instead of being copied into it; the
    # default, 5e8, copies all of them and takes 1 GB.
    "reduce_bucket_size": 1 << 22,
}


def leave_out_repeated_work(engine: Any) -> None:
    """Slim the optimizer wrapper of bf16 stage 0 and of stage 2 (fp32: 1 and 2); others stay as they are."""
    wrapper = engine.optimizer
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        wrapper.overflow_checker.check = _nothing_found
        if dist.get_world_size() == 1:
            engine.enable_backward_allreduce = False
    elif isinstance(wrapper, DeepSpeedZeroOptimizer):
        wrapper.check_overflow = _left_to_the_norm
        # With offload it keeps the norm of each parameter's gradient as that leaves the device.
        if wrapper.gradient_accumulation_dtype != wrapper.dtype and not wrapper.cpu_offload:
            wrapper.scaled_global_norm = MethodType(_norm_of_flat_gradients, wrapper)


def _nothing_found() -> bool:
    return False


def _left_to_the_norm(partition_gradients: bool = True) -> None:
    """Stands for a scan that sets `overflow`; the wrapper's `step` sets it from the norm too."""


def _norm_of_flat_gradients(wrapper: DeepSpeedZeroOptimizer, norm_type: int = 2) -> torch.Tensor:
    """Global L2 norm of the flat fp32 gradients of all ranks, 0-d fp32; inf or nan if a gradient is. Collective."""
    assert norm_type == 2
    flats = [wrapper.averaged_gradients[index].flat_partition for index in range(len(wrapper.bit16_groups))]
    square = torch.stack([sum_of_squares(flat) for flat in flats]).sum()
    dist.all_reduce(square, group=wrapper.dp_process_group)
    return square.sqrt().float()


def sum_of_squares(flat: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of `flat` [n] fp32, 0-d: blocks are summed in fp32, the blocks in fp64 (on MPS in fp32).

    One fp32 sum over tens of millions of elements is off by some 1e-3; this by 1e-6 at most, at the same speed.
    """
    wide = torch.float32 if flat.device.type == "mps" else torch.float64
    whole = flat.numel() // _NORM_BLOCK * _NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_BLOCK), dim=1)
    return torch.cat([blocks, torch.linalg.vector_norm(flat[whole:]).view(1)]).to(wide).square().sum()
