"""What a rank writes into a checkpoint, held still in host memory while training goes on.

Layout: docs/checkpoint-format.md. Every rank takes its own shards of masters and optimizer states as they lie in
memory, so a resume on the same layout puts the same bytes back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from dlm_dist.training import zero_state
from dlm_dist.training.checkpoint_files import TRAINER_STATE
from dlm_dist.training.safetensors_files import model_index, plan_model_files, safetensors_buffers, state_files
from dlm_dist.training.weight_average import WeightAverage


@dataclass
class Snapshot:
    """What this rank will write: relative path -> host tensors or bytes."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def contents(self) -> dict[str, list[memoryview]]:
        """Relative path -> the buffers whose bytes, one after another, are the file."""
        contents = {name: safetensors_buffers(tensors) for name, tensors in self.tensors.items()}
        return contents | {name: [memoryview(content)] for name, content in self.files.items()}


class HostBuffers:
    """Host memory that states are copied to, used again by every save: new memory costs more than the copy.

    Pinned where the tensors come from a CUDA device. As much as this rank's part of a checkpoint.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor`, valid until the next one of the same `key`; complete after a synchronize on CUDA."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)


@torch.no_grad()
def take_snapshot(
    engine: Any,
    step: int,
    trainer_state: Mapping[str, Any],
    tokenizer_files: Mapping[str, bytes],
    buffers: HostBuffers | None = None,
    average: WeightAverage | None = None,
) -> Snapshot:
    """What this rank writes of the state as it is now, with the `average` if there is one. Collective.

    With `buffers` everything is copied there, so training may go on before it is written. Without, tensors that are
    in host memory already are referred to as they are: nothing may change until they are written.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    snapshot = Snapshot(step)
    _add_shards(snapshot, engine, rank, buffers, average)
    _add_model(snapshot, engine, rank, world, buffers)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if rank == 0:
        state = json.dumps(dict(trainer_state), indent=2, sort_keys=True)
        snapshot.files[TRAINER_STATE] = state.encode()
        for name, content in tokenizer_files.items():
            snapshot.files[f"tokenizer/{name}"] = content
    return snapshot


def _add_shards(
    snapshot: Snapshot, engine: Any, rank: int, buffers: HostBuffers | None, average: WeightAverage | None
) -> None:
    """Masters, their average and optimizer states; a replicated shard is written by one rank."""
    tensors: dict[str, torch.Tensor] = {}
    index = []
    for shard in zero_state.own_shards(engine):
        state = zero_state.optimizer_state(engine, shard)
        numbers = {name: value for name, value in state.items() if not torch.is_tensor(value)}
        names = [name for name in state if name not in numbers]
        weights = {"master": shard.flat} | ({"ema": average.of(shard)} if average is not None else {})
        for name, tensor in [*weights.items(), *((name, state[name]) for name in names)]:
            tensors[f"{shard.key}/{name}"] = _on_host(f"{shard.key}/{name}", tensor, buffers)
        pieces = [[p.name, p.start, p.offset, p.numel] for p in shard.pieces]
        entry = {"key": shard.key, "pieces": pieces, "tensors": names, "numbers": numbers}
        index.append(entry | {"ema": average is not None})
    snapshot.tensors |= state_files(rank, tensors)
    snapshot.files[f"tensors/rank-{rank:05d}.json"] = json.dumps(index).encode()


def _add_model(snapshot: Snapshot, engine: Any, rank: int, world: int, buffers: HostBuffers | None) -> None:
    """The weights as the forward uses them, in the layout of `save_pretrained`, files dealt out to the ranks."""
    import deepspeed

    model = engine.module
    parameters = list(model.named_parameters())
    plan = plan_model_files([(name, _full_bytes(p)) for name, p in parameters])
    file_of = {name: file for file, names in plan.items() for name in names}
    writer = {file: number % world for number, file in enumerate(plan)}
    for name, parameter in parameters:
        file = file_of[name]
        gathered = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=gathered):
            if writer[file] == rank:
                weight = parameter.detach()
                # What was gathered is gone behind this block.
                kept = weight.clone() if gathered and buffers is None and not weight.is_cuda else weight
                snapshot.tensors.setdefault(f"model/{file}", {})[name] = _on_host(f"model/{name}", kept, buffers)
    if rank == 0:
        # A resumed model was loaded in fp32 and cast by the engine: its config must say what the file holds.
        model.config.dtype = parameters[0][1].dtype
        # Nor may it name the place that a resumed model was loaded from: the file would not be the uninterrupted run's.
        model.config.name_or_path = ""
        snapshot.files["model/config.json"] = model.config.to_json_string(use_diff=False).encode()
        if len(plan) > 1:
            total = sum(_full_bytes(p) for _, p in parameters)
            snapshot.files["model/model.safetensors.index.json"] = model_index(plan, total)


def _full_bytes(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def _on_host(key: str, tensor: torch.Tensor, buffers: HostBuffers | None) -> torch.Tensor:
    return buffers.copy(key, tensor) if buffers is not None else tensor.detach().cpu()
