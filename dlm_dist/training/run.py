"""A run from its configuration: sources, model, engine, resume, and the callbacks of the loop."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.loader import ReadAhead, SampleStream
from data_pipeline.order import SkipList
from data_pipeline.shards import ShardedSource
from dlm_dist import models
from dlm_dist.config import BatchPlan, ConfigError, RunConfig, resolve_batch, to_yaml, updated
from dlm_dist.diffusion.objectives import OBJECTIVES, Vocabulary
from dlm_dist.evaluation.bound import evaluate_bound
from dlm_dist.kernels import wkv7
from dlm_dist.models.warm_start import initialize_from
from dlm_dist.training import checkpoint
from dlm_dist.training.batches import prepare_step
from dlm_dist.training.engine import build_engine
from dlm_dist.training.loop import Progress, Trainer
from dlm_dist.training.metrics import MetricsLog, measured_peak_flops

_PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "bitsandbytes",
    "flash-linear-attention",
    "triton",
    "numpy",
)
SAMPLE_TOKENS = 64
"""Length of the texts of train.sample_every."""


@dataclass(frozen=True)
class Resume:
    """A verified checkpoint to go on from."""

    path: Path
    state: dict[str, Any]


def train(config: RunConfig, device: torch.device, resume: str | None, command: Sequence[str]) -> None:
    """Run `config` to its end. Collective: every rank must call, after start_distributed.

    `resume`: None for a fresh run (refused where run.dir already holds one), "auto", or the path of a checkpoint.
    Raises ConfigError, CheckpointError or TrainingStoppedError with a sentence for the user.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    plan = resolve_batch(config.train, world)
    sources = open_sources(config)
    config = _resolve_sizes(config, sources[0])
    resumed, passed_over = _find_resume(config, resume)
    identity = run_identity(config, sources)
    if resumed is not None:
        _require_same(resumed, identity)
    stream = _sample_stream(config, sources, resumed)
    max_steps = config.train.max_steps or int(
        (config.train.max_epochs or 0) * stream.epoch_length // config.train.global_batch_size
    )
    backend = wkv7.select_backend(device, strict=config.strict) if config.model.backbone == "rwkv7" else None
    fallbacks = [text for text in (wkv7.fallback(device),) if text is not None]
    model, loading = _build_model(config, sources[0], resumed)
    engine, groups = build_engine(model, config, plan)
    progress = Progress()
    if resumed is not None:
        checkpoint.load_shards(engine, resumed.path)
        state = resumed.state
        progress = Progress(state["global_step"], state["data_pos"], state["skipped_steps"], state["skips_in_a_row"])
    host_group = dist.new_group(backend="gloo") if device.type == "cuda" else None
    peak = _total_peak(config, device)
    log = None
    if rank == 0:
        _record_start(config, command, resumed, passed_over, plan, world, groups, backend, fallbacks, loading, peak)
        log = _open_log(config, progress, max_steps, resumed)
        if passed_over:
            log.console.line("\n".join(f"passed over: {problem}" for problem in passed_over))
        if loading is not None:
            log.console.line(_loading_text(loading, str(config.model.init_from)))
        log.console.line(_headline(model, config, plan, world, groups, resumed))
    objective = OBJECTIVES[config.objective.name](
        seed=config.run.seed,
        vocabulary=Vocabulary(sources[0].mask_id, sources[0].token_bytes),
        schedule=config.objective.schedule,
        masking=config.objective.masking,
        random_length_prob=config.data.random_length_prob,
        isolate_documents=config.data.isolate_documents,
    )
    size, pin = config.train.global_batch_size, device.type == "cuda"
    read_ahead = ReadAhead(
        lambda pos: prepare_step(stream.read, objective, stream.positions(pos, size), plan, rank, world, pin),
        size,
        config.data.read_ahead_steps,
        config.data.loader_threads,
    )
    callbacks = Callbacks(config, engine, device, sources[0], stream, identity, log)
    trainer = Trainer(
        config=config,
        plan=plan,
        max_steps=max_steps,
        engine=engine,
        device=device,
        host_group=host_group,
        read_ahead=read_ahead,
        is_bound=objective.is_bound,
        peak_flops=peak,
        log=log,
        evaluate=callbacks.evaluate if config.data.validation is not None else None,
        sample=callbacks.sample if config.train.sample_every is not None else None,
        save=callbacks.save,
    )
    try:
        trainer.run(progress)
    finally:
        read_ahead.close()
        if log is not None:
            log.close()


# --- data and model --------------------------------------------------------------------------------------------


def open_sources(config: RunConfig) -> list[ShardedSource]:
    """The training data sets; ConfigError if they do not belong together or do not fit the configuration."""
    sources = [ShardedSource.open(entry.path) for entry in config.data.train]
    first = sources[0]
    mistakes = []
    for entry, source in zip(config.data.train, sources, strict=True):
        for name in ("sequence_length", "vocab_size", "mask_id", "eos_id"):
            if getattr(source, name) != getattr(first, name):
                mistakes.append(
                    f"data.train: {entry.path} has {name} {getattr(source, name)}, {config.data.train[0].path} has "
                    f"{getattr(first, name)}: build them with the same tokenizer and sequence length"
                )
    wanted = config.data.sequence_length
    if wanted is not None and wanted != first.sequence_length:
        mistakes.append(
            f"data.sequence_length is {wanted}, but {config.data.train[0].path} holds rows of "
            f"{first.sequence_length} tokens: leave the key out or build the data with --sequence-length {wanted}"
        )
    vocabulary = config.model.vocab_size
    if vocabulary is not None and vocabulary < max(first.vocab_size, first.mask_id + 1):
        mistakes.append(
            f"model.vocab_size is {vocabulary}, but the data needs ids up to "
            f"{max(first.vocab_size, first.mask_id + 1) - 1} (mask id {first.mask_id}): leave the key out"
        )
    if mistakes:
        raise ConfigError(mistakes)
    return sources


def _resolve_sizes(config: RunConfig, source: ShardedSource) -> RunConfig:
    """Fill in what the data decides."""
    values: dict[str, Any] = {"data.sequence_length": source.sequence_length}
    if config.model.vocab_size is None:
        values["model.vocab_size"] = source.load_tokenizer().padded_vocab_size
    return updated(config, values)


def _sample_stream(config: RunConfig, sources: list[ShardedSource], resumed: Resume | None) -> SampleStream:
    """The sample sequence. Ranges already behind a checkpoint stay as they were; new ones must lie ahead."""
    ranges = [tuple(pair) for pair in config.data.skip]
    if resumed is not None:
        data_pos = resumed.state["data_pos"]
        saved = SkipList([tuple(pair) for pair in resumed.state["skipped_ranges"]])
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
        ranges += passed
    weights = [entry.weight for entry in config.data.train]
    return SampleStream(sources, weights, config.run.seed, SkipList(ranges), config.data.max_samples)


def _build_model(config: RunConfig, source: ShardedSource, resumed: Resume | None) -> tuple[Any, dict[str, Any] | None]:
    """The model in fp32, and the report of model.init_from if it was used."""
    report = None
    try:
        if resumed is not None:
            model = models.load(resumed.path, dtype=torch.float32)
        else:
            sizes = config.model.sizes()
            model = models.build(config.model.backbone, seed=config.run.seed, mask_token_id=source.mask_id, **sizes)
            if config.model.init_from is not None:
                report = initialize_from(model, config.model.init_from)
    except ValueError as error:
        raise ConfigError([str(error)], "cannot make the model") from error
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, report


# --- resume ----------------------------------------------------------------------------------------------------


def _find_resume(config: RunConfig, resume: str | None) -> tuple[Resume | None, list[str]]:
    folder = config.run.dir / "checkpoints"
    if resume is None:
        if checkpoint.list_checkpoints(folder) or (config.run.dir / "metrics.jsonl").exists():
            raise ConfigError(
                [f"run.dir {config.run.dir} already holds a run: add --resume auto, or choose another folder"]
            )
        return None, []
    path, passed_over = checkpoint.find_resumable(folder, resume)
    if path is None:
        return None, passed_over
    return Resume(path, checkpoint.load_trainer_state(path)), passed_over


def run_identity(config: RunConfig, sources: Sequence[ShardedSource]) -> dict[str, Any]:
    """What must not change within a run: change any of it and the same steps would mean other training."""
    tree = config.model_dump(mode="json")
    model = {key: value for key, value in tree["model"].items() if key not in ("init_from", "gradient_checkpointing")}
    data = {key: tree["data"][key] for key in ("random_length_prob", "isolate_documents", "max_samples")}
    return {
        "run.seed": config.run.seed,
        **{f"model.{key}": value for key, value in model.items()},
        **{f"objective.{key}": value for key, value in tree["objective"].items()},
        **{f"data.{key}": value for key, value in data.items()},
        "data.train": [
            [source.fingerprint, entry.weight] for source, entry in zip(sources, config.data.train, strict=True)
        ],
        "train.global_batch_size": config.train.global_batch_size,
        "train.precision": config.train.precision,
        "optimizer.name": config.optimizer.name,
    }


def _require_same(resumed: Resume, identity: Mapping[str, Any]) -> None:
    saved = resumed.state["identity"]
    differences = [
        f"{key} is {identity.get(key)!r}, the checkpoint was trained with {saved.get(key)!r}"
        for key in sorted({*identity, *saved})
        if identity.get(key) != saved.get(key)
    ]
    if differences:
        raise ConfigError(
            [f"{difference}: set it back, or start a new run" for difference in differences],
            f"cannot resume from {resumed.path}",
        )


# --- callbacks of the loop -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Callbacks:
    """What happens between steps. Every method is collective: every rank must call."""

    config: RunConfig
    engine: Any
    device: torch.device
    source: ShardedSource
    stream: SampleStream
    identity: dict[str, Any]
    log: MetricsLog | None

    def evaluate(self, step: int) -> None:
        """Bound on the held-out rows."""
        settings = self.config.train
        assert self.config.data.validation is not None
        bound = evaluate_bound(
            self.engine.module,
            ShardedSource.open(self.config.data.validation),
            self.device,
            num_rows=settings.eval_rows,
            draws=settings.eval_draws,
            isolate_documents=self.config.data.isolate_documents,
        )
        if self.log is not None:
            self.log.evaluation(
                {
                    "step": step,
                    "bound_nats_per_token": bound.nats_per_token,
                    "standard_error": bound.standard_error,
                    "bits_per_byte": bound.bits_per_byte,
                    "rows": bound.rows,
                    "draws": bound.draws,
                }
            )

    def sample(self, step: int) -> None:
        """A text that continues train.sample_prompt; every rank runs it, since ZeRO-3 gathers weights."""
        from dlm_dist.generation.samplers import generate

        tokenizer = self.source.load_tokenizer()
        model = self.engine.module
        model.eval()
        ids = generate(
            model,
            tokenizer.encode(self.config.train.sample_prompt),
            SAMPLE_TOKENS,
            steps=SAMPLE_TOKENS // 2,
            seed=step,
        )
        model.train()
        if self.log is not None:
            self.log.sample(step, tokenizer.decode(ids))

    def save(self, progress: Progress) -> None:
        """A checkpoint, then retention."""
        folder = self.config.run.dir / "checkpoints"
        state = self._trainer_state(progress)
        tokenizer = self.source.folder / "tokenizer"
        tokenizer_files = {path.name: path.read_bytes() for path in sorted(tokenizer.iterdir())}
        snapshot = checkpoint.take_snapshot(self.engine, progress.step, state, tokenizer_files)
        path = checkpoint.save(snapshot, folder)
        if dist.get_rank() == 0:
            checkpoint.retain(folder, self.config.checkpoint.keep_last)
            if self.log is not None:
                self.log.console.line(f"step {progress.step}  saved {path}")

    def _trainer_state(self, progress: Progress) -> dict[str, Any]:
        size = self.config.train.global_batch_size
        return {
            "epoch": progress.data_pos // self.stream.epoch_length,
            "epoch_batch": progress.data_pos % self.stream.epoch_length // size,
            "global_step": progress.step,
            "data_pos": progress.data_pos,
            "skipped_steps": progress.skipped_steps,
            "skips_in_a_row": progress.skips_in_a_row,
            "skipped_ranges": [list(pair) for pair in self.stream.skip.ranges],
            "seed": self.config.run.seed,
            "fingerprints": [source.fingerprint for source in self.stream.sources],
            "topology": {
                "world_size": dist.get_world_size(),
                "zero_stage": self.config.zero.stage,
                "precision": self.config.train.precision,
            },
            "optimizer": self.config.optimizer.name,
            "identity": self.identity,
            "versions": versions(),
            "wandb_id": self.log.wandb_id if self.log is not None else None,
        }


# --- records of a start ----------------------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    """Versions of python and the packages that decide results; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit() -> str | None:
    """The commit of this code, "+changes" if the tree is not clean; None outside a git checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _record_start(
    config: RunConfig,
    command: Sequence[str],
    resumed: Resume | None,
    passed_over: list[str],
    plan: BatchPlan,
    world: int,
    groups: list[dict[str, Any]],
    backend: wkv7.Backend | None,
    fallbacks: Sequence[str],
    loading: Mapping[str, Any] | None,
    peak: float,
) -> None:
    """config.yaml as this start uses it, and one more entry of manifest.json."""
    folder = config.run.dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    manifest_path = folder / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {"starts": []}
    manifest["starts"].append(
        {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": list(command),
            "commit": git_commit(),
            "versions": versions(),
            "host": platform.node(),
            "resumed_from": str(resumed.path) if resumed is not None else None,
            "passed_over": passed_over,
            "topology": {
                "world_size": world,
                "zero_stage": config.zero.stage,
                "micro_batch_size": plan.micro_batch_size,
                "gradient_accumulation_steps": plan.gradient_accumulation_steps,
                "torch_threads": torch.get_num_threads(),
            },
            "parameter_groups": groups,
            "wkv7_backend": asdict(backend) if backend is not None else None,
            "fallbacks": fallbacks,
            "init_from": loading,
            "gemm_peak_flops": peak,
        }
    )
    temporary = manifest_path.with_suffix(".tmp")
    temporary.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    os.replace(temporary, manifest_path)


def _open_log(config: RunConfig, progress: Progress, max_steps: int, resumed: Resume | None) -> MetricsLog:
    settings = None
    if config.logging.wandb != "disabled":
        settings = {
            "project": config.logging.wandb_project,
            "mode": config.logging.wandb,
            "dir": str(config.run.dir),
            "config": config.model_dump(mode="json"),
            "id": resumed.state["wandb_id"] if resumed is not None else None,
            "resume": "allow" if resumed is not None else None,
        }
    return MetricsLog(config.run.dir, progress.step, max_steps, config.logging.every, settings)


def _headline(
    model: Any,
    config: RunConfig,
    plan: BatchPlan,
    world: int,
    groups: list[dict[str, Any]],
    resumed: Resume | None,
) -> str:
    total = sum(group["parameters"] for group in groups)
    lines = [
        f"{config.model.backbone} {config.model.direction}, {total:,} parameters, {config.train.precision}, "
        f"ZeRO-{config.zero.stage}, {config.optimizer.name}; {world} ranks x {plan.micro_batch_size} rows x "
        f"{plan.gradient_accumulation_steps} = {plan.global_batch_size} rows of {config.data.sequence_length} tokens",
    ]
    lines += [
        f"  {group['role']:<10} {group['tensors']:>5} tensors {group['parameters']:>14,} parameters  "
        f"lr x{group['lr_scale']:g}  decay {group['weight_decay']:g}  {group['optimizer_bits']}-bit states"
        for group in groups
    ]
    if resumed is not None:
        lines.append(f"resuming from {resumed.path}")
    return "\n".join(lines)


def _loading_text(report: Mapping[str, list[str]], source: str) -> str:
    lines = [f"weights from {source}: {len(report['matched'])} tensors matched"]
    for kind in ("resized", "skipped", "unused"):
        if report[kind]:
            lines.append(f"  {kind} ({len(report[kind])}): {', '.join(report[kind])}")
    return "\n".join(lines)


def _total_peak(config: RunConfig, device: torch.device) -> float:
    """Measured GEMM rate of all ranks at once (FLOP/s). Collective."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    dist.barrier()
    rate = torch.tensor(measured_peak_flops(device, dtype), dtype=torch.float32, device=device)
    dist.all_reduce(rate)
    return rate.item()
