"""A run from its configuration: what it starts from, the engine, and the trainer that runs it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.loader import ReadAhead, SampleStream
from data_pipeline.source import Source
from dlm_dist.config import BatchPlan, ConfigError, RunConfig, resolve_batch
from dlm_dist.diffusion.mask_noise import WithMaskNoise
from dlm_dist.diffusion.objectives import Objective
from dlm_dist.training import checkpoint
from dlm_dist.training.batches import RankStep, prepare_step
from dlm_dist.training.callbacks import Callbacks, SideInputs
from dlm_dist.training.checkpoint_writer import CheckpointWriter
from dlm_dist.training.engine import build_engine
from dlm_dist.training.fallbacks import attention_kernel, with_optimizer_that_runs, wkv7_backend
from dlm_dist.training.flops import measured_peak_flops
from dlm_dist.training.guards import Guards
from dlm_dist.training.lease import Lease
from dlm_dist.training.loop import Trainer
from dlm_dist.training.metrics import MetricsLog
from dlm_dist.training.objective import make_objective, with_choices
from dlm_dist.training.phases import PhaseClock
from dlm_dist.training.profile_window import ProfileWindow, profile_notes
from dlm_dist.training.progress import Progress
from dlm_dist.training.rank_times import RankTimes
from dlm_dist.training.records import StartRecord
from dlm_dist.training.resume import (
    Resume,
    average_notes,
    conversion_notes,
    find_resume,
    inexact_notes,
    is_of_run,
    leave_other_branches,
    own_run_dir,
    require_same,
    run_identity,
    skip_list,
    topology,
)
from dlm_dist.training.sources import open_sources, source_names
from dlm_dist.training.starting_model import mask_notes, resolve_sizes, starting_model
from dlm_dist.training.step import Stepper
from dlm_dist.training.step_figures import Pace, StepFigures
from dlm_dist.training.stop_requests import StopRequest
from dlm_dist.training.switches import Switches
from dlm_dist.training.update_figures import UpdateMeter
from dlm_dist.training.watchdog import Watchdog
from dlm_dist.training.weight_average import WeightAverage


@dataclass(frozen=True)
class Start:
    """Where a run starts from: everything that is opened, chosen and checked before the model is built."""

    config: RunConfig
    """With the sizes and the optimizer that the run has."""
    plan: BatchPlan
    device: torch.device
    sources: list[Source]
    objective: Objective
    side: SideInputs
    lease: Lease | None
    """Rank 0's."""
    resumed: Resume | None
    identity: dict[str, Any]
    stream: SampleStream
    progress: Progress
    max_steps: int
    fallbacks: list[str]
    notes: list[str]


def train(config: RunConfig, device: torch.device, resume: str | None, command: Sequence[str]) -> None:
    """Run `config` to its end. Collective: every rank must call, after start_distributed.

    `resume`: None for a fresh run (refused where run.dir already holds one), "auto", or the path of a checkpoint.
    Raises ConfigError, DataError, CheckpointError or TrainingStoppedError with a sentence for the user.
    """
    with ExitStack() as owned:
        _train(_open(config, device, resume, owned), command)


def _open(config: RunConfig, device: torch.device, resume: str | None, owned: ExitStack) -> Start:
    """Open the data and the run's folder, and decide where to go on. Collective. Raises as `train`."""
    plan = resolve_batch(config.train, dist.get_world_size())
    sources = open_sources(config)
    objective = make_objective(config, sources[0])
    side = SideInputs.open(config, sources[0])
    lease = owned.enter_context(own_run_dir(config.run.dir))
    resumed, notes = find_resume(config.run.dir, resume)
    config = resolve_sizes(config, sources[0], resumed.path if resumed is not None else None)
    config, fallbacks = with_optimizer_that_runs(config, device)
    notes += [note for source in [*sources, side.validation] if source for note in source.notes]
    if not objective.is_bound:
        notes.append(f"the loss is no bound on the likelihood: {', '.join(objective.not_a_bound())}")
    identity = run_identity(config, sources, side.validation)
    if resumed is not None:
        notes += require_same(resumed, identity, config.train.change_batch_size, fallbacks)
        notes += inexact_notes(resumed, topology(config))
    else:
        notes += mask_notes(config, sources[0])
    weights = [entry.weight for entry in config.data.train]
    skip = skip_list(config.data.skip, resumed)
    stream = SampleStream(sources, weights, config.run.seed, skip, config.data.max_samples, config.data.order)
    progress = Progress() if resumed is None else Progress.from_state(resumed.state)
    max_steps = _total_steps(config, plan, stream, progress)
    if resumed is not None and progress.step >= max_steps:
        notes.append(f"nothing left to do: {resumed.path.name} is at or behind the last step, {max_steps}")
    notes += profile_notes(config.logging.profile, progress.step, dist.get_world_size(), device)
    return Start(
        config=config,
        plan=plan,
        device=device,
        sources=sources,
        objective=objective,
        side=side,
        lease=lease,
        resumed=resumed,
        identity=identity,
        stream=stream,
        progress=progress,
        max_steps=max_steps,
        fallbacks=fallbacks,
        notes=notes,
    )


def _train(start: Start, command: Sequence[str]) -> None:
    """Build what `start` asks for, tell of it, and train. Collective."""
    config, device, progress, rank = start.config, start.device, start.progress, dist.get_rank()
    # Small numbers of the host go over gloo, so that they never wait for the device.
    host_group = dist.new_group(backend="gloo") if device.type == "cuda" else None
    engine, average, record = _build(start, command, host_group)
    log = None
    if rank == 0:
        record.write(config)
        log = _open_log(config, progress, start.max_steps, start.resumed)
        log.console.line(record.headline(config))
    tell = log.console.line if log is not None else None
    read_ahead = _read_ahead(start)
    kept = config.checkpoint.keep_last, config.checkpoint.keep_every
    guard = start.lease.require if start.lease is not None else None
    writer = CheckpointWriter(config.run.dir / "checkpoints", *kept, host_group, tell, guard)
    stop = StopRequest(config.train.max_hours, Switches(config.run.dir) if rank == 0 else None)
    clock = PhaseClock(device)
    guards = config.guards
    stepper = Stepper(
        config=config,
        plan=start.plan,
        max_steps=start.max_steps,
        engine=engine,
        device=device,
        host_group=host_group,
        read_ahead=read_ahead,
        is_bound=start.objective.is_bound,
        head_settings=start.objective.head_settings(),
        peak_flops=record.gemm_peak_flops,
        log=log,
        writer=writer,
        alarm=lambda: start.lease.lost if start.lease is not None else None,
        guards=Guards(guards.loss_spike, guards.grad_norm_spike, guards.window),
        stop=stop,
        clock=clock,
        figures=StepFigures(
            config.logging.every,
            UpdateMeter(engine),
            RankTimes(_hosts(), tell),
            Pace(start.max_steps),
            lambda pos: dict(zip(source_names(config.data), start.stream.epochs(pos), strict=True)),
        ),
        average=average,
    )
    resumed = start.resumed
    has_checkpoint = resumed is not None and is_of_run(resumed.path, config.run.dir)
    trainer = Trainer(stepper, _callbacks(start, engine, writer, log, average), has_checkpoint)
    hang_seconds = 60.0 * guards.hang_minutes if guards.hang_minutes is not None else None
    watchdog = Watchdog(config.run.dir / "heartbeats", rank, clock, lambda: progress.step, hang_seconds)
    folder = config.run.dir / "profile"
    window = ProfileWindow(config.logging.profile, folder, rank, device, clock, lambda: progress.step, tell)
    finished = False
    try:
        with stop, watchdog, window:
            trainer.run(progress)
        finished = True
    finally:
        read_ahead.close()
        writer.close()
        if log is not None:
            log.close(finished)


def _build(
    start: Start, command: Sequence[str], host_group: dist.ProcessGroup | None
) -> tuple[Any, WeightAverage | None, StartRecord]:
    """The engine and the average of its weights as the checkpoint has them, and what is recorded. Collective."""
    config, plan, resumed, notes = start.config, start.plan, start.resumed, list(start.notes)
    backend, wkv7_fallbacks = wkv7_backend(config, start.device)
    attention, attention_fallbacks = attention_kernel(config, start.device)
    # Only now: the self-test of the kernels uses operations that have no deterministic form on CUDA.
    torch.use_deterministic_algorithms(config.train.deterministic)
    path = resumed.path if resumed is not None else None
    model = starting_model(config, plan, start.sources[0].mask_id, path, host_group)
    engine, groups = build_engine(model.model, config, plan, model.unrounded)
    half_life = config.train.ema_half_life
    average = WeightAverage(engine, half_life) if half_life is not None else None
    conversion = None
    if resumed is not None:
        loaded = checkpoint.load_shards(engine, resumed.path)
        if found := conversion_notes(resumed, topology(config), loaded):
            conversion = {"from": resumed.state["topology"], "to": topology(config), **asdict(loaded)}
            notes += found
        notes += average_notes(resumed, half_life)
        if average is not None:
            average.load(resumed.path)
    record = StartRecord(
        command=list(command),
        world_size=dist.get_world_size(),
        plan=plan,
        parameter_groups=groups,
        max_steps=start.max_steps,
        gemm_peak_flops=_total_peak(config, start.device),
        resumed_from=path,
        conversion=conversion,
        wkv7_backend=asdict(backend) if backend is not None else None,
        attention=asdict(attention) if attention is not None else None,
        init_from=model.init_from,
        fallbacks=[*start.fallbacks, *wkv7_fallbacks, *attention_fallbacks],
        notes=[*notes, *leave_other_branches(config.run.dir, resumed)],
    )
    return engine, average, record


def _read_ahead(start: Start) -> ReadAhead[RankStep]:
    """This rank's part of step after step, by the position of its first sample."""
    rank, world, pin = dist.get_rank(), dist.get_world_size(), start.device.type == "cuda"

    def prepare(data_pos: int) -> RankStep:
        positions = start.stream.positions(data_pos, start.plan.size_at(data_pos))
        objective = with_choices(start.objective, start.progress)
        return prepare_step(start.stream.read, objective, positions, start.plan, rank, world, pin)

    data = start.config.data
    return ReadAhead(prepare, start.plan.size_at, data.read_ahead_steps, data.loader_threads)


def _callbacks(
    start: Start, engine: Any, writer: CheckpointWriter, log: MetricsLog | None, average: WeightAverage | None
) -> Callbacks:
    objective = start.objective
    return Callbacks(
        config=start.config,
        plan=start.plan,
        engine=engine,
        device=start.device,
        source=start.sources[0],
        objective=objective.objective if isinstance(objective, WithMaskNoise) else objective,
        side=start.side,
        stream=start.stream,
        identity=start.identity,
        writer=writer,
        log=log,
        average=average,
    )


def _total_steps(config: RunConfig, plan: BatchPlan, stream: SampleStream, progress: Progress) -> int:
    """Optimizer steps of the whole run; ConfigError where train.max_epochs makes none, or fewer than the warm-up.

    The steps behind `progress` may have been of other sizes (train.change_batch_size).
    """
    settings = config.train
    if settings.max_steps is not None:
        return settings.max_steps
    assert settings.max_epochs is not None
    samples = int(settings.max_epochs * stream.epoch_length)
    steps = progress.step + plan.steps_between(progress.data_pos, samples)
    least = max(1, config.optimizer.warmup_steps)
    if steps < least:
        raise ConfigError(
            [
                f"train.max_epochs is {settings.max_epochs}: with {stream.epoch_length} rows and batches of "
                f"{settings.global_batch_size} that is {steps} steps, expected at least {least} "
                "(one, and optimizer.warmup_steps)"
            ]
        )
    return steps


def _hosts() -> list[str]:
    """The machine of every rank. Collective."""
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, platform.node())
    return hosts


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
    logging = config.logging
    return MetricsLog(config.run.dir, progress.step, max_steps, logging.every, settings, logging.tensorboard)


def _total_peak(config: RunConfig, device: torch.device) -> float:
    """Measured GEMM rate of all ranks at once (FLOP/s). Collective."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    dist.barrier()
    rate = torch.tensor(measured_peak_flops(device, dtype), dtype=torch.float32, device=device)
    dist.all_reduce(rate)
    return rate.item()
