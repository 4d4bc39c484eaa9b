"""A run from its configuration: sources, model, engine, resume, and the trainer that runs it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

import torch
import torch.distributed as dist

from data_pipeline.loader import ReadAhead, SampleStream
from dlm_dist.config import BatchPlan, ConfigError, RunConfig, resolve_batch
from dlm_dist.diffusion.mask_noise import WithMaskNoise
from dlm_dist.training import checkpoint
from dlm_dist.training.batches import RankStep, prepare_step
from dlm_dist.training.callbacks import Callbacks, SideInputs
from dlm_dist.training.checkpoint_writer import CheckpointWriter
from dlm_dist.training.engine import build_engine
from dlm_dist.training.fallbacks import attention_kernel, with_optimizer_that_runs, wkv7_backend
from dlm_dist.training.flops import measured_peak_flops
from dlm_dist.training.guards import Guards
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
from dlm_dist.training.step_figures import Pace, StepFigures
from dlm_dist.training.stop_requests import StopRequest
from dlm_dist.training.switches import Switches
from dlm_dist.training.update_figures import UpdateMeter
from dlm_dist.training.watchdog import Watchdog
from dlm_dist.training.weight_average import WeightAverage


def train(config: RunConfig, device: torch.device, resume: str | None, command: Sequence[str]) -> None:
    """Run `config` to its end. Collective: every rank must call, after start_distributed.

    `resume`: None for a fresh run (refused where run.dir already holds one), "auto", or the path of a checkpoint.
    Raises ConfigError, DataError, CheckpointError or TrainingStoppedError with a sentence for the user.
    """
    with ExitStack() as owned:
        _train(config, device, resume, command, owned)


def _train(
    config: RunConfig, device: torch.device, resume: str | None, command: Sequence[str], owned: ExitStack
) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    plan = resolve_batch(config.train, world)
    sources = open_sources(config)
    objective = make_objective(config, sources[0])
    side = SideInputs.open(config, sources[0])
    lease = owned.enter_context(own_run_dir(config.run.dir))
    resumed, notes = find_resume(config.run.dir, resume)
    checkpoint_path = resumed.path if resumed is not None else None
    config = resolve_sizes(config, sources[0], checkpoint_path)
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
    notes += profile_notes(config.logging.profile, progress.step, world, device)
    backend, wkv7_fallbacks = wkv7_backend(config, device)
    attention, attention_fallbacks = attention_kernel(config, device)
    # Only now: the self-test of the kernels uses operations that have no deterministic form on CUDA.
    torch.use_deterministic_algorithms(config.train.deterministic)
    # Small numbers of the host go over gloo, so that they never wait for the device.
    host_group = dist.new_group(backend="gloo") if device.type == "cuda" else None
    start = starting_model(config, plan, sources[0].mask_id, checkpoint_path, host_group)
    engine, groups = build_engine(start.model, config, plan, start.unrounded)
    conversion = None
    if resumed is not None:
        loaded = checkpoint.load_shards(engine, resumed.path)
        found = conversion_notes(resumed, topology(config), loaded)
        if found:
            conversion = {"from": resumed.state["topology"], "to": topology(config), **asdict(loaded)}
            notes += found
        if progress.step >= max_steps:
            notes.append(f"nothing left to do: {resumed.path.name} is at or behind the last step, {max_steps}")
    average = WeightAverage(engine, config.train.ema_half_life) if config.train.ema_half_life is not None else None
    if resumed is not None:
        notes += average_notes(resumed, config.train.ema_half_life)
        if average is not None:
            average.load(resumed.path)
    record = StartRecord(
        command=list(command),
        world_size=world,
        plan=plan,
        parameter_groups=groups,
        max_steps=max_steps,
        gemm_peak_flops=_total_peak(config, device),
        resumed_from=resumed.path if resumed is not None else None,
        conversion=conversion,
        wkv7_backend=asdict(backend) if backend is not None else None,
        attention=asdict(attention) if attention is not None else None,
        init_from=start.init_from,
        fallbacks=[*fallbacks, *wkv7_fallbacks, *attention_fallbacks],
        notes=[*notes, *leave_other_branches(config.run.dir, resumed)],
    )
    log = None
    if rank == 0:
        record.write(config)
        log = _open_log(config, progress, max_steps, resumed)
        log.console.line(record.headline(config))
    pin = device.type == "cuda"

    def prepare(data_pos: int) -> RankStep:
        positions = stream.positions(data_pos, plan.size_at(data_pos))
        return prepare_step(stream.read, with_choices(objective, progress), positions, plan, rank, world, pin)

    read_ahead = ReadAhead(
        prepare,
        plan.size_at,
        config.data.read_ahead_steps,
        config.data.loader_threads,
    )
    tell = log.console.line if log is not None else None
    kept = config.checkpoint.keep_last, config.checkpoint.keep_every
    guard = lease.require if lease is not None else None
    writer = CheckpointWriter(config.run.dir / "checkpoints", *kept, host_group, tell, guard)
    bare = objective.objective if isinstance(objective, WithMaskNoise) else objective
    callbacks = Callbacks(config, engine, device, sources[0], bare, side, stream, identity, writer, log, average)
    guards = config.guards
    stop = StopRequest(config.train.max_hours, Switches(config.run.dir) if rank == 0 else None)
    clock = PhaseClock(device)
    hang_seconds = 60.0 * guards.hang_minutes if guards.hang_minutes is not None else None
    watchdog = Watchdog(config.run.dir / "heartbeats", rank, clock, lambda: progress.step, hang_seconds)
    window = ProfileWindow(
        config.logging.profile, config.run.dir / "profile", rank, device, clock, lambda: progress.step, tell
    )
    trainer = Trainer(
        config=config,
        plan=plan,
        max_steps=max_steps,
        engine=engine,
        device=device,
        host_group=host_group,
        read_ahead=read_ahead,
        is_bound=objective.is_bound,
        head_settings=objective.head_settings(),
        peak_flops=record.gemm_peak_flops,
        log=log,
        evaluate=callbacks.evaluate if side.validation is not None else None,
        sample=callbacks.sample if config.train.sample_every is not None else None,
        save=callbacks.save,
        writer=writer,
        alarm=lambda: lease.lost if lease is not None else None,
        has_checkpoint=resumed is not None and is_of_run(resumed.path, config.run.dir),
        restore=callbacks.restore,
        guards=Guards(guards.loss_spike, guards.grad_norm_spike, guards.window),
        stop=stop,
        clock=clock,
        figures=StepFigures(
            config.logging.every,
            UpdateMeter(engine),
            RankTimes(_hosts(), tell),
            Pace(max_steps),
            lambda pos: dict(zip(source_names(config.data), stream.epochs(pos), strict=True)),
        ),
        average=average,
    )
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
