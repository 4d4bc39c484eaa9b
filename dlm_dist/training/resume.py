"""Which run a start belongs to: where to resume from, what may not have changed, and who owns the folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.order import SkipList
from data_pipeline.source import Source
from dlm_dist.config import ConfigError, RunConfig
from dlm_dist.training import checkpoint, checkpoint_files
from dlm_dist.training.lease import Lease, LeaseError

_BATCH_SIZE, _RAMP = "train.global_batch_size", "train.batch_size_ramp"


@dataclass(frozen=True)
class Resume:
    """A verified checkpoint to go on from."""

    path: Path
    state: dict[str, Any]


@contextmanager
def own_run_dir(run_dir: Path) -> Iterator[Lease | None]:
    """Make this the only run that trains in `run_dir` for as long as the block lasts -> the lease on rank 0, else None.

    Collective: every rank must enter. Raises ConfigError on every rank where another run owns the folder, or it
    cannot be written.
    """
    lease = None
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            lease = Lease(run_dir)
        except LeaseError as error:
            problem = [str(error)]
        except OSError as error:
            problem = [f"run.dir {run_dir} cannot be used: {error}"]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise ConfigError([problem[0]])
    try:
        yield lease
    finally:
        if lease is not None:
            lease.release()


def find_resume(run_dir: Path, wanted: str | None) -> tuple[Resume | None, list[str]]:
    """The checkpoint to go on from, and notes on what was passed over. Collective.

    `wanted`: None for a fresh run, refused where `run_dir` already holds one; "auto"; or a checkpoint of this very
    run: its path, or the path within `run_dir`. A checkpoint of another run is taken only into an empty `run_dir`.
    """
    folder = run_dir / "checkpoints"
    used = bool(checkpoint_files.list_checkpoints(folder)) or (run_dir / "metrics.jsonl").exists()
    if wanted not in (None, "auto") and not Path(wanted).exists() and (run_dir / wanted).exists():
        wanted = str(run_dir / wanted)
    # What rank 0 sees counts: a file system that lags must not send the ranks different ways.
    used, wanted = _from_rank_0((used, wanted))
    if wanted is None:
        if used:
            raise ConfigError([f"run.dir {run_dir} already holds a run: add --resume auto, or choose another folder"])
        return None, []
    path, passed_over = checkpoint.find_resumable(folder, wanted)
    if path is None:
        return None, []
    own, state = _from_rank_0((is_of_run(path, run_dir), checkpoint_files.load_trainer_state(path)))
    if used and not own:
        raise ConfigError(
            [
                f"{path} belongs to another run than run.dir {run_dir}, which is not empty: resume in its own folder, "
                "or start from its weights with model.init_from in a new one"
            ]
        )
    notes = [f"passed over: {problem}" for problem in passed_over]
    return Resume(path, state), notes


def is_of_run(path: Path, run_dir: Path) -> bool:
    """Whether the checkpoint `path` is one of the run in `run_dir`."""
    return path.resolve().parent == (run_dir / "checkpoints").resolve()


def _from_rank_0(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def leave_other_branches(run_dir: Path, resumed: Resume | None) -> list[str]:
    """Make room for the run's own checkpoints -> notes. Collective: every rank must call.

    Those ahead of the resumed one are set aside; what killed saves left is removed.
    """
    notes: list[Any] = [[]]

    def make_room() -> None:
        folder = run_dir / "checkpoints"
        if resumed is not None:
            moved = checkpoint_files.set_aside(folder, resumed.state["global_step"])
            notes[0] = [f"checkpoint ahead of {resumed.path.name} set aside as {path}" for path in moved]
        checkpoint_files.sweep(folder)

    checkpoint.on_rank_0(make_room, f"cannot start in {run_dir}")
    found: list[str] = _from_rank_0(notes[0])
    return found


def run_identity(config: RunConfig, sources: Sequence[Source], validation: Source | None) -> dict[str, Any]:
    """What must not change within a run: change any of it and the same steps would mean other training."""
    identity = _identity(config, sources)
    if config.objective.clip_search:
        # The held-out rows decide what is trained on.
        identity |= {f"train.{key}": getattr(config.train, key) for key in ("eval_every", "eval_rows", "eval_draws")}
        identity["data.validation"] = validation.fingerprint if validation is not None else None
    return identity


def _identity(config: RunConfig, sources: Sequence[Source]) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    # What decides nothing after the start, and how the same numbers are computed.
    free = ("init_from", "init_revision", "gradient_checkpointing", "wkv7_kernel", "attention_kernel")
    model = {key: value for key, value in tree["model"].items() if key not in free}
    # These strengths may be changed on the way, as the learning rate and the weight decay may.
    objective = {key: value for key, value in tree["objective"].items() if key not in ("l2wrap", "z_loss")}
    kept = ("random_length_prob", "random_length_group", "isolate_documents", "max_samples", "order")
    data = {key: tree["data"][key] for key in kept}
    # Named only where there is one: older checkpoints know nothing of it.
    ramp = {_RAMP: tree["train"]["batch_size_ramp"]} if config.train.batch_size_ramp else {}
    return {
        "run.seed": config.run.seed,
        **{f"model.{key}": value for key, value in model.items()},
        **{f"objective.{key}": value for key, value in objective.items()},
        **{f"data.{key}": value for key, value in data.items()},
        "data.train": [
            [source.fingerprint, entry.weight] for source, entry in zip(sources, config.data.train, strict=True)
        ],
        _BATCH_SIZE: config.train.global_batch_size,
        **ramp,
        "train.precision": config.train.precision,
        "optimizer.name": config.optimizer.name,
    }


def require_same(
    resumed: Resume, identity: Mapping[str, Any], change_batch_size: bool = False, fallbacks: Sequence[str] = ()
) -> list[str]:
    """Raises ConfigError that names every key in which the run differs from the checkpoint -> notes.

    With `change_batch_size` (the option of that name) the global batch size and its ramp may differ, and are noted.
    `fallbacks` that made a difference are told with it.
    """
    saved = resumed.state["identity"]
    differences = {
        key: f"{key} is {identity.get(key)!r}, the checkpoint was trained with {saved.get(key)!r}"
        for key in sorted({*identity, *saved})
        if identity.get(key) != saved.get(key)
    }
    advice = dict.fromkeys(differences, "set it back, or start a new run")
    notes = []
    for key in sorted(differences.keys() & {_BATCH_SIZE, _RAMP}):
        advice[key] = "set it back, or ask for the change with train.change_batch_size=true"
        if change_batch_size:
            step, position = resumed.state["global_step"], resumed.state["data_pos"]
            notes.append(f"{differences.pop(key)}: changed from step {step}, data_pos {position} on, as asked")
    if differences:
        raise ConfigError(
            [*(f"{difference}: {advice[key]}" for key, difference in differences.items()), *fallbacks],
            f"cannot resume from {resumed.path}",
        )
    return notes


def conversion_notes(resumed: Resume, topology: Mapping[str, Any], loaded: checkpoint.Loaded) -> list[str]:
    """What became of the tensors of a checkpoint that another layout wrote; nothing on the layout that wrote it."""
    if not loaded.converted_shards:
        return []
    before, here = (
        f"{place['world_size']} rank{'s' if place['world_size'] > 1 else ''} at ZeRO-{place['zero_stage']}"
        + (" with offload" if _offload(place) != "none" else "")
        for place in (resumed.state["topology"], topology)
    )
    eight_bit = ""
    if loaded.converted_blocks:
        eight_bit = (
            f"; {loaded.requantised_blocks} of {loaded.converted_blocks} blocks of 8-bit states were quantised again, "
            "the others kept their values to the bit"
        )
    return [
        f"elastic resume: {resumed.path.name} of {before} goes on with {here}; masters and 32-bit states kept their "
        f"bits{eight_bit}; later sums may differ in the last bits"
    ]


def average_notes(resumed: Resume, half_life: int | None) -> list[str]:
    """What becomes of the average of the weights where train.ema_half_life is not what it was."""
    before, name = resumed.state.get("ema_half_life"), resumed.path.name
    if before == half_life:
        return []
    if before is None:
        return [f"train.ema_half_life is {half_life} and {name} has no EMA: it starts from the weights of {name}"]
    if half_life is None:
        return [f"the EMA of {name} is dropped, since train.ema_half_life is null"]
    return [f"train.ema_half_life is {half_life}, and was {before} up to {name}: its EMA goes on"]


def inexact_notes(resumed: Resume, topology: Mapping[str, Any]) -> list[str]:
    """Why the resumed run may differ in the last bits from the uninterrupted one, if it may."""
    saved = resumed.state["topology"]
    notes = []
    if saved["torch_threads"] != topology["torch_threads"]:
        notes.append(f"{topology['torch_threads']} torch threads per rank, the checkpoint {saved['torch_threads']}")
    if _offload(saved) != _offload(topology):
        notes.append(f"zero.offload_optimizer is {_offload(topology)}, in the checkpoint {_offload(saved)}")
    return [f"{note}: sums may differ in the last bits" for note in notes]


def _offload(topology: Mapping[str, Any]) -> str:
    """zero.offload_optimizer of a topology; older checkpoints do not say that they had none."""
    return str(topology.get("offload_optimizer", "none"))


def topology(config: RunConfig) -> dict[str, Any]:
    """What decides the bits of a step besides the configuration."""
    return {
        "world_size": dist.get_world_size(),
        "zero_stage": config.zero.stage,
        "offload_optimizer": config.zero.offload_optimizer,
        "precision": config.train.precision,
        "torch_threads": torch.get_num_threads(),
    }


def skip_list(ranges: Sequence[tuple[int, int]], resumed: Resume | None) -> SkipList:
    """data.skip for this start: ranges already behind a checkpoint stay as they were; new ones must lie ahead."""
    if resumed is None:
        return SkipList(ranges)
    data_pos = resumed.state["data_pos"]
    saved = SkipList([(start, stop) for start, stop in resumed.state["skipped_ranges"]])
    reached = int(saved.positions(data_pos - 1, 1)[0]) + 1 if data_pos else 0
    passed = saved.passed(data_pos)
    late = [pair for pair in SkipList(ranges).ranges if pair[0] < reached and pair not in passed]
    if late:
        raise ConfigError(
            [
                f"data.skip names positions from {late[0][0]}, but {resumed.path} has already trained up to "
                f"{reached}: resume from an earlier checkpoint to leave them out"
            ]
        )
    return SkipList([*ranges, *passed])
