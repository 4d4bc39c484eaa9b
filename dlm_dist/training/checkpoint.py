"""checkpoints/step-N over all ranks: found, agreed upon, loaded; only if it verifies.

Layout and protocol are specified in docs/checkpoint-format.md. Nothing is pickled. How it is written is in
checkpoint_writer.py, what concerns the files alone in checkpoint_files.py.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from dlm_dist.training import zero_state
from dlm_dist.training.checkpoint_files import (
    MANIFEST,
    CheckpointError,
    find_damage,
    list_candidates,
)
from dlm_dist.training.durable_files import file_sha256
from dlm_dist.training.elastic import SavedShards
from dlm_dist.training.weight_average import WeightAverage


def on_rank_0(action: Callable[[], None], what: str) -> None:
    """Run `action` on rank 0; if it fails with an OSError, CheckpointError "`what`: why" on every rank. Collective."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem = [f"{what}: {error}"]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise CheckpointError(problem[0])


# --- finding -------------------------------------------------------------------------------------------------


def verify_together(path: Path) -> list[str]:
    """`verify` on all ranks, which share the hashing; the same answer everywhere. Collective.

    Raises CheckpointError on every rank where one sees another checkpoint at `path` than rank 0, as on a network file
    system that lags: the ranks would load parts that do not belong together, or leave out a checkpoint that is whole.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    manifest = path / MANIFEST
    seen = _gathered(file_sha256(manifest) if manifest.is_file() else "none")
    _require_same_view(path, {other: "another manifest.json" for other in range(world) if seen[other] != seen[0]})
    reports = _gathered(find_damage(path, (rank, world)))
    problems = {name: problem for report in reports for name, problem in report.items()}
    if not problems:
        return []
    # Damaged for everyone, or not yet there for one of them?
    own = [find_damage(path, only=tuple(problems)) if rank == 0 else {}]
    dist.broadcast_object_list(own, src=0)
    _require_same_view(
        path,
        {
            other: problem
            for other, report in enumerate(reports)
            for name, problem in report.items()
            if name not in own[0]
        },
    )
    return list(problems.values())


def _require_same_view(path: Path, others: Mapping[int, str]) -> None:
    """CheckpointError where there are `others`: {rank: what it sees}, the same on every rank. Collective."""
    hosts = _gathered(platform.node())
    if others:
        rank, what = next(iter(others.items()))
        raise CheckpointError(
            f"rank {rank} on {hosts[rank]} does not see {path} as rank 0 on {hosts[0]} does ({what}): all ranks "
            "must share one file system; if they do, it lags: start again"
        )


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def find_resumable(folder: Path, wanted: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from -> (path or None, what was passed over and why). Collective.

    `wanted` is "auto" (the newest that verifies; None if there is no checkpoint at all) or the path of one,
    which must verify. Rank 0 says which ones there are, and all ranks must see them alike. Raises CheckpointError.
    """
    candidates: list[Any] = [list_candidates(folder) if wanted == "auto" else [Path(wanted)]]
    dist.broadcast_object_list(candidates, src=0)
    passed_over: list[str] = []
    for path in reversed(candidates[0]):
        problems = verify_together(path)
        if not problems:
            return path, passed_over
        if wanted != "auto":
            raise CheckpointError(f"cannot resume from {path}: {problems[0]}")
        passed_over.append(f"{path} does not verify: {problems[0]}")
    if passed_over:
        raise CheckpointError(
            f"no checkpoint in {folder} verifies ({'; '.join(passed_over)}); "
            "move them away to start from step 0, or name one with --resume"
        )
    return None, []


# --- loading ---------------------------------------------------------------------------------------------------


def put_back(engine: Any, path: Path, average: WeightAverage | None = None) -> None:
    """Make an engine that has trained on stand where the verified checkpoint `path` of its own layout was written.

    So does the `average` of its weights.

    Collective: every rank must call.
    """
    _put_back_weights(engine, path)
    zero_state.clear_optimizer_state(engine)
    load_shards(engine, path)
    if average is not None:
        average.load(path)


@torch.no_grad()
def _put_back_weights(engine: Any, path: Path) -> None:
    """The weights of model/; buffers are constants of the model. Collective."""
    import deepspeed

    model = engine.module
    index = path / "model" / "model.safetensors.index.json"
    file_of = json.loads(index.read_bytes())["weight_map"] if index.exists() else {}
    for name, parameter in model.named_parameters():
        partitioned = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned):
            if dist.get_rank() == 0 or not partitioned:
                with safe_open(path / "model" / file_of.get(name, "model.safetensors"), framework="pt") as tensors:
                    parameter.copy_(tensors.get_tensor(name))


@dataclass(frozen=True)
class Loaded:
    """How the shards of a checkpoint came back, summed over all ranks."""

    shards: int
    """Shards of all ranks."""
    converted_shards: int
    """Those put together from other shards; 0 on the layout that wrote the checkpoint."""
    converted_blocks: int
    """Blocks of 256 elements of 8-bit states in these."""
    requantised_blocks: int
    """Blocks whose elements came from under different scales, so that they were quantised again."""


@torch.no_grad()
def load_shards(engine: Any, path: Path) -> Loaded:
    """Put masters and optimizer states of a verified checkpoint into the engine's shards. Collective.

    A shard that was saved as it is here gets its bytes back; any other is converted (elastic.py). The engine's module
    must already hold the weights of `path`/model. Raises CheckpointError where the checkpoint does not fit the model
    and its optimizer.
    """
    saved = SavedShards(path, zero_state.parameter_sizes(engine))
    shards = zero_state.shards(engine)
    converted = 0
    for shard in shards:
        before = saved.by_key.get(shard.key)
        if before is not None and before.pieces == shard.pieces and saved.numel(before) == shard.flat.numel():
            shard.flat.copy_(saved.whole(before, "master").view(-1))
            state = {name: saved.whole(before, name) for name in before.tensors} | dict(before.numbers)
        else:
            runs = saved.runs(shard.pieces)
            saved.copy_weights(runs, "master", shard.flat)
            state = saved.state(runs, shard.master)
            converted += 1
        if state and shard.pieces:
            _require_bits(engine, shard, state, path)
        if state:
            zero_state.set_optimizer_state(engine, shard, state)
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, [len(shards), converted, saved.blocks.converted, saved.blocks.requantised])
    return Loaded(*(sum(column) for column in zip(*reports, strict=True)))


def _require_bits(engine: Any, shard: zero_state.Shard, state: Mapping[str, Any], path: Path) -> None:
    """8-bit states must come where the parameters' role has them, and only there."""
    saved = 8 if any(name.startswith("absmax") for name in state) else 32
    here = zero_state.optimizer_bits(engine, shard)
    if saved != here:
        raise CheckpointError(
            f"{path} holds {saved}-bit optimizer states of {shard.pieces[0].name}, which has {here}-bit states in this "
            "version: resume with the version that wrote it"
        )
