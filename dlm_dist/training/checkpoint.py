"""checkpoints/step-N over all ranks: taken, written aside, published; loaded only if it verifies.

Layout and protocol are specified in docs/checkpoint-format.md. Every rank writes its own shards of masters and
optimizer states as they lie in memory, so a resume on the same layout puts the same bytes back. Nothing is
pickled. What concerns the files alone is in checkpoint_files.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from dlm_dist.training import zero_state
from dlm_dist.training.checkpoint_files import (
    TRAINER_STATE,
    CheckpointError,
    file_sha256,
    fsync_folder_and_parents,
    list_checkpoints,
    load_trainer_state,
    publish,
    read_manifest,
    retain,
    step_of,
    verify,
    write_chunks,
)

__all__ = [
    "CheckpointError",
    "Snapshot",
    "file_sha256",
    "find_resumable",
    "list_checkpoints",
    "load_shards",
    "load_trainer_state",
    "on_rank_0",
    "plan_model_files",
    "retain",
    "save",
    "step_of",
    "take_snapshot",
    "verify",
    "verify_together",
    "write_safetensors",
]

MODEL_FILE_BYTES = 2 * 2**30
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


@dataclass
class Snapshot:
    """Host copies of what this rank will write: relative path -> tensors or bytes."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


# --- taking a snapshot -----------------------------------------------------------------------------------------


@torch.no_grad()
def take_snapshot(
    engine: Any, step: int, trainer_state: Mapping[str, Any], tokenizer_files: Mapping[str, bytes]
) -> Snapshot:
    """Copy everything this rank will write to host memory. Collective: every rank must call."""
    rank, world = dist.get_rank(), dist.get_world_size()
    snapshot = Snapshot(step)
    _add_shards(snapshot, engine, rank, world)
    _add_model(snapshot, engine, rank, world)
    if rank == 0:
        state = json.dumps(dict(trainer_state), indent=2, sort_keys=True)
        snapshot.files[TRAINER_STATE] = state.encode()
        for name, content in tokenizer_files.items():
            snapshot.files[f"tokenizer/{name}"] = content
    return snapshot


def _add_shards(snapshot: Snapshot, engine: Any, rank: int, world: int) -> None:
    """Masters and optimizer states; a replicated shard is written by one rank."""
    tensors: dict[str, torch.Tensor] = {}
    index = []
    for number, shard in enumerate(zero_state.shards(engine)):
        if shard.replicated and number % world != rank:
            continue
        tensors[f"{shard.key}/master"] = _to_host(shard.flat)
        state = zero_state.optimizer_state(engine, shard)
        numbers = {name: value for name, value in state.items() if not torch.is_tensor(value)}
        names = [name for name in state if name not in numbers]
        tensors |= {f"{shard.key}/{name}": _to_host(state[name]) for name in names}
        pieces = [[p.name, p.start, p.offset, p.numel] for p in shard.pieces]
        index.append({"key": shard.key, "pieces": pieces, "tensors": names, "numbers": numbers})
    snapshot.tensors[f"tensors/rank-{rank:05d}.safetensors"] = tensors
    snapshot.files[f"tensors/rank-{rank:05d}.json"] = json.dumps(index).encode()


def _add_model(snapshot: Snapshot, engine: Any, rank: int, world: int) -> None:
    """The weights as the forward uses them, in the layout of `save_pretrained`, files dealt out to the ranks."""
    import deepspeed

    model = engine.module
    parameters = list(model.named_parameters())
    plan = plan_model_files([(name, _full_bytes(p)) for name, p in parameters])
    file_of = {name: file for file, names in plan.items() for name in names}
    writer = {file: number % world for number, file in enumerate(plan)}
    for name, parameter in parameters:
        file = file_of[name]
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if writer[file] == rank:
                snapshot.tensors.setdefault(f"model/{file}", {})[name] = _to_host(parameter.detach())
    if rank == 0:
        # A resumed model was loaded in fp32 and cast by the engine: its config must say what the file holds.
        model.config.dtype = parameters[0][1].dtype
        snapshot.files["model/config.json"] = model.config.to_json_string(use_diff=False).encode()
        if len(plan) > 1:
            total = sum(_full_bytes(p) for _, p in parameters)
            index = {"metadata": {"total_size": total}, "weight_map": file_of}
            snapshot.files["model/model.safetensors.index.json"] = json.dumps(index, indent=2).encode()


def plan_model_files(sizes: Iterable[tuple[str, int]]) -> dict[str, list[str]]:
    """Deal parameters (name, bytes) in order into files of at most MODEL_FILE_BYTES -> file name -> names."""
    bins: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if bins[-1] and filled + size > MODEL_FILE_BYTES:
            bins.append([])
            filled = 0
        bins[-1].append(name)
        filled += size
    if len(bins) == 1:
        return {"model.safetensors": bins[0]}
    return {f"model-{i + 1:05d}-of-{len(bins):05d}.safetensors": names for i, names in enumerate(bins)}


def _full_bytes(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


# --- writing ---------------------------------------------------------------------------------------------------


def save(snapshot: Snapshot, folder: Path) -> Path:
    """Write and publish a snapshot as folder/step-N. Collective: every rank must call.

    Nothing named step-N exists before all files are on disk and the manifest is complete. If any rank fails to
    write, all ranks raise and earlier checkpoints stay untouched.
    """
    final = folder / f"step-{snapshot.step}"
    staging = folder / f".step-{snapshot.step}.writing"
    what = f"checkpoint step-{snapshot.step} could not be written"
    on_rank_0(lambda: _make_staging(staging), what)
    written, problem = _write_files(snapshot, staging)
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (written, problem))
    problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(reports) if text]
    if problems:
        if dist.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"{what}: {'; '.join(problems)}")
    files = {name: entry for part, _ in reports for name, entry in part.items()}
    on_rank_0(lambda: publish(files, staging, final), what)
    return final


def _make_staging(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    fsync_folder_and_parents(staging.parent, levels=2)


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


def _write_files(snapshot: Snapshot, staging: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Write this rank's files -> ({relative path: {size, sha256}}, what went wrong or None)."""
    written: dict[str, dict[str, Any]] = {}
    try:
        for name, tensors in snapshot.tensors.items():
            written[name] = write_safetensors(staging / name, tensors)
        for name, content in snapshot.files.items():
            written[name] = write_chunks(staging / name, [content])
    except OSError as error:
        return {}, str(error)
    return written, None


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write host tensors in the safetensors format, hashing on the way -> {size, sha256}; durable on return."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    payloads = (t.contiguous().reshape(-1).view(torch.uint8).numpy().data for t in tensors.values() if t.numel())
    return write_chunks(path, [len(text).to_bytes(8, "little"), text], payloads)


# --- finding -------------------------------------------------------------------------------------------------


def verify_together(path: Path) -> list[str]:
    """`verify` with the files dealt out to the ranks; the same answer everywhere. Collective."""
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, verify(path, (dist.get_rank(), dist.get_world_size())))
    return [problem for report in reports for problem in report]


def find_resumable(folder: Path, wanted: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from -> (path or None, what was passed over and why). Collective.

    `wanted` is "auto" (the newest that verifies; None if there is no checkpoint at all) or the path of one,
    which must verify. Rank 0's view of the folder is the one that counts. Raises CheckpointError.
    """
    if wanted != "auto":
        path = Path(wanted)
        problems = verify_together(path)
        if problems:
            raise CheckpointError(f"cannot resume from {path}: {problems[0]}")
        return path, []
    candidates: list[Any] = [list_checkpoints(folder)]
    dist.broadcast_object_list(candidates, src=0)
    passed_over: list[str] = []
    for path in reversed(candidates[0]):
        problems = verify_together(path)
        if not problems:
            return path, passed_over
        passed_over.append(f"{path} does not verify: {problems[0]}")
    if passed_over:
        raise CheckpointError(
            f"no checkpoint in {folder} verifies ({'; '.join(passed_over)}); "
            "move them away to start from step 0, or name one with --resume"
        )
    return None, []


# --- loading ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_shards(engine: Any, path: Path) -> None:
    """Put masters and optimizer states of a verified checkpoint back where they were.

    The engine's module must already hold the weights of `path`/model. Raises CheckpointError when the layout
    (world size, ZeRO stage, precision, parameter roles) is another one.
    """
    entries: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name in read_manifest(path):
        if name.startswith("tensors/") and name.endswith(".json"):
            for entry in json.loads((path / name).read_bytes()):
                entries[entry["key"]] = ((path / name).with_suffix(".safetensors"), entry)
    mine = zero_state.shards(engine)
    for shard in mine:
        saved = entries.get(shard.key)
        pieces = [[p.name, p.start, p.offset, p.numel] for p in shard.pieces]
        if saved is None or saved[1]["pieces"] != pieces:
            raise CheckpointError(
                f"{path} was written with another layout of ranks, ZeRO stage, precision or parameter groups "
                f"(shard {shard.key} does not match); resume with the topology in its {TRAINER_STATE}"
            )
    for shard in mine:
        file, entry = entries[shard.key]
        with safe_open(file, framework="pt") as tensors:
            shard.flat.copy_(tensors.get_tensor(f"{shard.key}/master"))
            state = {name: tensors.get_tensor(f"{shard.key}/{name}") for name in entry["tensors"]}
        state |= entry["numbers"]
        if state:
            zero_state.set_optimizer_state(engine, shard, state)
