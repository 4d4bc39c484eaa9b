"""What a run computes with: the optimizer and kernels it asks for, or what stands in for them, said out loud.

Each function gives the fallbacks that it has taken, for the console and the record of the run; `strict` forbids them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from dlm_dist.config import ConfigError, RunConfig, updated
from dlm_dist.kernels import wkv7
from dlm_dist.models.attention import Choice, choose
from dlm_dist.models.qwen3 import Qwen3DiffusionConfig
from dlm_dist.training.optimizers import IN_32_BITS, eight_bit_problem


def with_optimizer_that_runs(config: RunConfig, device: torch.device) -> tuple[RunConfig, list[str]]:
    """The configuration, with the 32-bit form of an 8-bit optimizer that some rank cannot run, and that fallback.

    Collective. ConfigError under `strict`.
    """
    name = config.optimizer.name
    if name not in IN_32_BITS:
        return config, []
    if config.zero.offload_optimizer == "cpu":
        device = torch.device("cpu")
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, eight_bit_problem(name, device))
    found = [f"on rank {rank} {problem}" for rank, problem in enumerate(problems) if problem is not None]
    if not found:
        return config, []
    fallback = f"optimizer.name is {IN_32_BITS[name]} instead of {name}, which bitsandbytes cannot run: {found[0]}"
    if config.strict:
        raise ConfigError([f"{fallback}; strict is true: mend that, or set optimizer.name={IN_32_BITS[name]}"])
    return updated(config, {"optimizer.name": IN_32_BITS[name]}), [fallback]


def wkv7_backend(config: RunConfig, device: torch.device) -> tuple[wkv7.Backend | None, list[str]]:
    """What computes WKV-7 (None without RWKV-7) and the fallbacks taken.

    ConfigError where model.wkv7_kernel cannot run, and under `strict` for a fallback.
    """
    kernel, head_size = config.model.wkv7_kernel, config.model.head_size
    if config.model.backbone != "rwkv7":
        return None, []
    assert kernel is not None
    assert head_size is not None
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    try:
        wkv7.check_kernel(kernel, device, dtype, head_size)
    except ValueError as error:
        raise ConfigError([f"model.wkv7_kernel is {kernel}: {error}"]) from error
    if kernel == "pytorch":
        return wkv7.Backend("pytorch", None, str(device), wkv7.versions(), "model.wkv7_kernel is pytorch"), []
    if device.type == "cuda" and dtype == torch.float32:
        return wkv7.Backend("pytorch", None, str(device), wkv7.versions(), "the run is fp32, fla's kernel 16-bit"), []
    backend = wkv7.select_backend(device, head_size)
    fallback = wkv7.fallback(device, head_size)
    if fallback is not None and config.strict:
        raise ConfigError([f"{fallback}, and strict is true: mend that, or set strict=false"])
    return backend, [fallback] if fallback is not None else []


def attention_kernel(config: RunConfig, device: torch.device) -> tuple[Choice | None, list[str]]:
    """What computes masked attention (None without it) and the fallbacks taken.

    ConfigError where model.attention_kernel cannot run, and under `strict` for a fallback.
    """
    kernel = config.model.attention_kernel
    if kernel is None:
        return None, []
    head_dim = config.model.head_dim or Qwen3DiffusionConfig.head_dim
    try:
        choice = choose(kernel, device, head_dim, dropout=0.0)
    except ValueError as error:
        raise ConfigError([f"model.attention_kernel is {kernel}: {error}"]) from error
    if choice.kernel == "flex" and device.type == "cpu":
        raise ConfigError([f"model.attention_kernel is {kernel}: FlexAttention has no backward pass on a CPU"])
    if device.type != "cuda" or choice.kernel == "flex" or kernel == "sdpa":
        return choice, []
    fallback = f"masked attention runs on SDPA, with masks as tensors: {choice.reason}"
    if config.strict:
        raise ConfigError([f"{fallback}, and strict is true: mend that, or set model.attention_kernel=sdpa"])
    return choice, [fallback]
