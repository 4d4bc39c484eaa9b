"""Joining the process group, on the device that the user asked for.

Does not import deepspeed at its top: deepspeed reads DS_ACCELERATOR once, when it is first imported.
"""

from __future__ import annotations

import logging
import os
import sysconfig
import warnings

import torch
import torch.distributed as dist

from dlm_dist.config import ConfigError


def start_distributed(device: str, cpu_threads: int | None = None) -> torch.device:
    """Join the process group and choose this rank's device. Collective: every rank must call.

    Must run before anything imports deepspeed: it reads DS_ACCELERATOR at import. `device` is auto, cpu, cuda or mps.
    On a CPU it computes with `cpu_threads` threads, None: its share of the cores. (OMP_NUM_THREADS says nothing here:
    launchers set it to 1.) Without a launcher this is a world of one. Raises ConfigError where there is no such device,
    or the ranks do not find each other.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["train.device is cuda, but torch sees no CUDA device: use train.device=cpu"])
    if device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(["train.device is mps, but torch sees no MPS device: use train.device=cpu"])
    if device == "mps" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(["train.device is mps, which runs as one process only: start one rank"])
    os.environ["DS_ACCELERATOR"] = device
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    _find_own_programs()
    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cpu":
        torch.set_num_threads(cpu_threads or threads_per_rank())
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    import deepspeed

    if device == "cpu":
        _leave_out_shared_memory_op()
    _quiet_libraries()
    backend = "nccl" if device == "cuda" else "gloo"
    if "MASTER_PORT" in os.environ:
        try:
            deepspeed.init_distributed(dist_backend=backend, verbose=False)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            advice = (
                "if another run uses the port, choose another (deepspeed --master_port N, torchrun --master-port N)"
            )
            raise ConfigError([f"{error}: {advice}"], f"the ranks cannot meet at {place}") from error
    else:
        _join_world_of_one(backend)
    return torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)


def threads_per_rank() -> int:
    """This rank's share of the cores of its machine; torchrun and deepspeed say how many ranks it has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return max(1, cores // local_world)


def _find_own_programs() -> None:
    """Put the environment's scripts on PATH where it is not activated: DeepSpeed starts ninja by name."""
    scripts = sysconfig.get_path("scripts")
    path = os.environ.get("PATH", os.defpath)
    if scripts not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, path])


def _leave_out_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling an all-reduce for tensor-parallel inference, which training never calls.

    DeepSpeed 0.19 compiles it on CPU in init_distributed: that takes a minute, fails without g++, ninja and
    Python.h, and a kill meanwhile leaves a lock file for which every later start waits for ever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _join_world_of_one(backend: str) -> None:
    """A process group without a port to collide on."""
    import deepspeed

    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _quiet_libraries() -> None:
    """Leave the console to the run: libraries report warnings of ours, not their progress or each other's changes."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its only message on a CPU is about a 4-bit kernel that is never used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*is deprecated", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
