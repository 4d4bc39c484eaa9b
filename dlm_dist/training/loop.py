"""The training loop: read, corrupt, forward, backward, step, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.loader import ReadAhead
from dlm_dist.config import BatchPlan, RunConfig
from dlm_dist.diffusion.block_diffusion import ClipRange
from dlm_dist.diffusion.model_inputs import on_device
from dlm_dist.training.batches import RankStep, StepTotals, gather_totals
from dlm_dist.training.checkpoint_writer import CheckpointWriter
from dlm_dist.training.engine import gradient_norm, set_learning_rate
from dlm_dist.training.errors import TrainingStoppedError
from dlm_dist.training.lr_schedules import Course, lr_factor
from dlm_dist.training.metrics import MetricsLog, Stopwatch


@dataclass
class Progress:
    """Where the run stands: everything that changes from step to step besides the tensors."""

    step: int = 0
    """Completed optimizer steps, skipped ones included."""
    data_pos: int = 0
    """Samples of completed steps."""
    skipped_steps: int = 0
    """Steps whose update was left out because loss or gradient was not finite."""
    skips_in_a_row: int = 0
    clip_ranges: tuple[ClipRange, ...] = ()
    """What objective.clip_search has chosen so far."""


@dataclass(frozen=True)
class Trainer:
    """Everything a step needs. `log` is None on ranks other than 0.

    The callbacks run between steps on every rank, since they hold collectives: `evaluate(progress)` on held-out rows,
    which may add to its `clip_ranges`, `sample(step)` for a text, `save(progress)` for a checkpoint, which `writer` may
    still be writing afterwards.
    """

    config: RunConfig
    plan: BatchPlan
    max_steps: int
    engine: Any
    device: torch.device
    host_group: dist.ProcessGroup | None
    read_ahead: ReadAhead[RankStep]
    is_bound: bool
    head_settings: Mapping[str, float]
    """Further arguments of the model's training forward, from the objective."""
    peak_flops: float
    """FLOP/s of all ranks together, for MFU."""
    log: MetricsLog | None
    evaluate: Callable[[Progress], None] | None
    sample: Callable[[int], None] | None
    save: Callable[[Progress], None]
    writer: CheckpointWriter
    alarm: Callable[[], str | None]
    """Why this rank wants the run to end before its next step; None: it does not."""

    def run(self, progress: Progress) -> None:
        """Train from `progress` to the last step. Collective: every rank must call.

        Raises TrainingStoppedError after train.max_consecutive_skips skipped steps in a row, CheckpointError where a
        checkpoint could not be written.
        """
        settings, every = self.config.train, self.config.checkpoint.every
        self.seek(progress)
        # Also at the start: a kill may have come between the checkpoint of this step and its evaluation.
        self._look(progress)
        while progress.step < self.max_steps:
            self.step(progress)
            if progress.skips_in_a_row >= settings.max_consecutive_skips:
                self.writer.finish()
                raise TrainingStoppedError(
                    f"{progress.skips_in_a_row} steps in a row had a loss or gradient that is not finite, the last "
                    f"at data_pos {progress.data_pos}; resume from a checkpoint with a lower optimizer.lr, or "
                    "leave these positions out with data.skip"
                )
            # Saved first: nothing that goes wrong while evaluating costs the steps before it.
            if progress.step == self.max_steps or _due(every, progress.step):
                self.save(progress)
            if progress.step == self.max_steps:
                self.writer.finish()
            self._look(progress)

    def seek(self, progress: Progress) -> None:
        """Make `progress` the place from which the steps go on."""
        self.engine.train()
        self.read_ahead.seek(progress.data_pos)

    def _look(self, progress: Progress) -> None:
        """The evaluation and the sample that are due: the first and the last step are always evaluated."""
        settings, step = self.config.train, progress.step
        if self.evaluate is not None and (step in (0, self.max_steps) or _due(settings.eval_every, step)):
            before = progress.clip_ranges
            self.evaluate(progress)
            if progress.clip_ranges != before:
                # What was read ahead has times from the old range.
                self.read_ahead.seek(progress.data_pos)
        if self.sample is not None and step > 0 and _due(settings.sample_every, step):
            self.sample(step)

    def step(self, progress: Progress) -> None:
        """One optimizer step, recorded; moves `progress`. Collective: every rank must call."""
        started = time.perf_counter()
        with Stopwatch() as waited:
            batch = self.read_ahead.next()
        alarm = self.alarm()
        totals = gather_totals(batch, self.host_group, self.writer.ready(), alarm is not None)
        if totals.any_alarm:
            raise TrainingStoppedError(self._first_told(alarm))
        if totals.all_ready:
            self.writer.advance()
        lr = self._learning_rate(progress.step)
        set_learning_rate(self.engine, lr)
        loss = self._train_step(batch, totals)
        self._advance(progress)
        if self.log is not None:
            seconds = time.perf_counter() - started
            self.log.step(self._record(progress, totals, loss, lr, seconds, waited.seconds))

    def _first_told(self, alarm: str | None) -> str:
        """The alarm of the first rank that has one. Collective."""
        alarms: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(alarms, alarm, group=self.host_group)
        return next(text for text in alarms if text is not None)

    def _learning_rate(self, step: int) -> float:
        settings = self.config.optimizer
        course = Course(self.max_steps, settings.warmup_steps, settings.min_lr_ratio, settings.decay_steps)
        return settings.lr * lr_factor(settings.schedule, step, course)

    def _train_step(self, batch: RankStep, totals: StepTotals) -> float:
        """Forward and backward over the micro-batches, one update -> loss over all ranks. Collective.

        DeepSpeed averages gradients over ranks, so each micro-batch's sum is scaled by ranks / denominator: the
        gradient is then exactly that of the global sum over the global denominator. L2Wrap is a mean over the rows
        that enter the loss, whatever that denominator is.
        """
        scale = dist.get_world_size() / totals.denominator
        l2wrap = self.config.objective.l2wrap
        extra = dict(self.head_settings)
        if l2wrap:
            extra["l2wrap"] = l2wrap * totals.denominator / max(1, totals.supervised)
        total = torch.zeros((), device=self.device, dtype=torch.float32 if self.device.type == "mps" else torch.float64)
        for micro_batch in batch.micro_batches:
            loss_sum = self.engine(**on_device(micro_batch, self.device), **extra)
            self.engine.backward(loss_sum * scale, scale_wrt_gas=False)
            self.engine.step()
            total += loss_sum.detach()
        total = total.cpu()
        dist.all_reduce(total, group=self.host_group)
        return total.item() / totals.denominator

    def _advance(self, progress: Progress) -> None:
        applied = self.engine.was_step_applied()
        progress.step += 1
        progress.data_pos += self.plan.global_batch_size
        progress.skips_in_a_row = 0 if applied else progress.skips_in_a_row + 1
        progress.skipped_steps += not applied

    def _record(
        self, progress: Progress, totals: StepTotals, loss: float, lr: float, seconds: float, waited: float
    ) -> dict[str, Any]:
        """One line of metrics.jsonl (docs/resume.md)."""
        nats = loss * totals.denominator
        return {
            "step": progress.step,
            "loss": loss,
            "bound_nats_per_token": loss if self.is_bound else None,
            "bits_per_byte": nats / 0.6931471805599453 / totals.text_bytes
            if self.is_bound and totals.text_bytes
            else None,
            "grad_norm": gradient_norm(self.engine),
            "lr": lr,
            "tokens_per_second": totals.denominator / seconds,
            "mfu": self._flops(totals) / seconds / self.peak_flops,
            "data_pos": progress.data_pos,
            "skipped": progress.skips_in_a_row > 0,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "rows_sha256": totals.rows_sha256,
            "noise_sha256": totals.noise_sha256,
        }

    def _flops(self, totals: StepTotals) -> float:
        """Model FLOPs of a step: backward counts twice the forward, the head runs on scored rows only."""
        model, length = self.engine.module, self.config.data.sequence_length
        assert length is not None
        body = model.flops_per_token(length) * totals.read
        return 3.0 * (body + model.head_flops_per_row() * totals.supervised)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
