"""One optimizer step: read, corrupt, forward, backward, agree, update, record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.loader import ReadAhead
from dlm_dist.config import BatchPlan, RunConfig
from dlm_dist.diffusion.model_inputs import on_device
from dlm_dist.diffusion.time_buckets import TIME_BUCKETS, sum_by_bucket
from dlm_dist.training.batches import RankStep, StepTotals, gather_totals
from dlm_dist.training.checkpoint_writer import CheckpointWriter
from dlm_dist.training.engine import gradient_norm, set_learning_rate
from dlm_dist.training.errors import TrainingStoppedError
from dlm_dist.training.flops import step_flops
from dlm_dist.training.guards import Guards
from dlm_dist.training.lr_schedules import Course, lr_factor
from dlm_dist.training.memory import memory_figures, memory_in_use
from dlm_dist.training.metrics import MetricsLog
from dlm_dist.training.phases import PhaseClock
from dlm_dist.training.progress import Progress
from dlm_dist.training.step_figures import StepFigures, add_by_time
from dlm_dist.training.step_record import loss_figures, place_figures, speed_figures
from dlm_dist.training.stop_requests import StopRequest
from dlm_dist.training.weight_average import WeightAverage


@dataclass(frozen=True)
class Verdict:
    """What all ranks agreed on before the last backward pass of a step."""

    loss: float
    nats_by_time: list[float]
    """Weighted losses by bucket of diffusion time; zeros where the objective has no times."""
    rank_seconds: list[float]
    """What each rank needed by itself: to get its rows, and but for stage 3 to run its forward passes."""
    refused: str | None
    """Why the step must not update the weights."""
    stop_wanted: bool
    """Some rank was asked to end the run."""
    save_wanted: bool
    """A checkpoint was asked for."""


@dataclass(frozen=True)
class Stepper:
    """Everything a step needs. `log` is None on ranks other than 0."""

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
    writer: CheckpointWriter
    """May still be writing a checkpoint of an earlier step."""
    alarm: Callable[[], str | None]
    """Why this rank wants the run to end before its next step; None: it does not."""
    guards: Guards
    stop: StopRequest
    clock: PhaseClock
    figures: StepFigures
    average: WeightAverage | None = None

    def seek(self, progress: Progress) -> None:
        """Make `progress` the place from which the steps go on."""
        self.engine.train()
        self.read_ahead.seek(progress.data_pos)

    def step(self, progress: Progress) -> tuple[Verdict, str | None]:
        """One optimizer step, recorded; moves `progress` -> (what was agreed on, why the step must be taken back).

        Collective: every rank must call.
        """
        started = time.perf_counter()
        self.clock.enter("data")
        batch = self.read_ahead.next()
        self.clock.enter("other")
        alarm = self.alarm()
        with self.clock.during("wait"):
            memory = memory_in_use(self.device)
            totals = gather_totals(batch, self.host_group, self.writer.ready(), alarm is not None, memory)
        if totals.any_alarm:
            raise TrainingStoppedError(self.who_says(alarm))
        if totals.all_ready:
            with self.clock.during("save"):
                self.writer.advance()
        lr = self._learning_rate(progress.step)
        set_learning_rate(self.engine, lr)
        self.figures.begin(progress.step)
        verdict = self._train_step(batch, totals, progress)
        norm = gradient_norm(self.engine)
        reason, spike = self._judge(verdict, norm, progress)
        if batch.time_buckets is not None and verdict.refused is None:
            add_by_time(progress, verdict.nats_by_time, totals.tokens_by_time)
        before = progress.data_pos
        self._advance(progress, totals, reason)
        if self.average is not None and reason is None and spike is None:
            with self.clock.during("optimizer"):
                self.average.update(progress.data_pos, progress.data_pos - before)
        measured = self.figures.measured(progress, norm if reason is None else None, self.host_group)
        phases = self.clock.take()
        if self.log is not None:
            seconds = time.perf_counter() - started
            flops = step_flops(self.engine.module, self.config, totals, batch.span[0])
            record = {
                **loss_figures(verdict.loss, totals, self.is_bound),
                **place_figures(progress, batch.span, reason),
                **speed_figures(flops, totals, seconds, phases, self.peak_flops),
                **memory_figures(totals.memory),
                "grad_norm": norm,
                "lr": lr,
                **measured,
                **self.figures.ranks.step(verdict.rank_seconds, seconds),
                "seconds_left": self.figures.pace.seconds_left(progress.step),
            }
            self.log.step(record)
        return verdict, spike

    def _learning_rate(self, step: int) -> float:
        settings = self.config.optimizer
        course = Course(self.max_steps, settings.warmup_steps, settings.min_lr_ratio, settings.decay_steps)
        return settings.lr * lr_factor(settings.schedule, step, course)

    def _train_step(self, batch: RankStep, totals: StepTotals, progress: Progress) -> Verdict:
        """Forward and backward over the micro-batches, one update unless it is refused. Collective.

        DeepSpeed averages gradients over ranks, so each micro-batch's sum is scaled by ranks / denominator: the
        gradient is then exactly that of the global sum over the global denominator. L2Wrap and z-loss are means
        over the rows that enter the loss, whatever that denominator is.
        """
        scale = dist.get_world_size() / totals.denominator
        objective = self.config.objective
        extra: dict[str, Any] = dict(self.head_settings)
        for name, strength in (("l2wrap", objective.l2wrap), ("z_loss", objective.z_loss)):
            if strength:
                extra[name] = strength * totals.denominator / max(1, totals.supervised)
        by_time = batch.time_buckets
        if by_time is not None:
            extra["per_row"] = True
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        # The loss of this rank, and what of it belongs to each bucket of time: copied to the host together.
        sums = torch.zeros(1 + TIME_BUCKETS, device=self.device, dtype=wide)
        verdict = None
        for number, micro_batch in enumerate(batch.micro_batches, 1):
            self.clock.enter("forward")
            last = number == len(batch.micro_batches)
            # Said, not left to DeepSpeed's count: steps of a ramp differ in their number of micro-batches.
            self.engine.set_gradient_accumulation_boundary(last)
            inputs = on_device(micro_batch, self.device)
            if by_time is None:
                loss_sum = self.engine(**inputs, **extra)
            else:
                loss_sum, losses = self.engine(**inputs, **extra)
                buckets = by_time[number - 1].to(self.device, non_blocking=True)
                sums[1:] += sum_by_bucket(losses * inputs["weights"], buckets)
            sums[0] += loss_sum.detach()
            if last:
                verdict = self._agree(sums, totals, progress)
                if verdict.refused is not None:
                    # Every wrapper leaves out an update whose gradient is not finite, and cleans up behind it.
                    scale = math.nan
            self.clock.enter("backward")
            self.engine.backward(loss_sum * scale, scale_wrt_gas=False)
            self.clock.enter("optimizer")
            self.engine.step()
        self.clock.enter("other")
        assert verdict is not None
        return verdict

    def _agree(self, sums: torch.Tensor, totals: StepTotals, progress: Progress) -> Verdict:
        """The loss over all ranks, and what follows from it before the last backward. Collective.

        `sums` [1 + TIME_BUCKETS]: this rank's loss, and its parts by time.
        """
        mine = sums.cpu().double()  # waits for the device: the time until here is this rank's own
        spent = self.clock.so_far()
        seconds = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        # Under stage 3 a forward pass is as long as that of the slowest rank: its layers are gathered from all.
        own = ("data", "forward") if self.config.zero.stage < 3 else ("data",)
        seconds[dist.get_rank()] = sum(spent[name] for name in own)
        asked = torch.tensor([self.stop.reason is not None, self.stop.save_wanted], dtype=torch.float64)
        numbers = torch.cat([mine, asked, seconds])
        with self.clock.during("wait"):
            dist.all_reduce(numbers, group=self.host_group)
        total, *by_time = numbers[: len(mine)].tolist()
        stop, save, *rank_seconds = numbers[len(mine) :].tolist()
        loss = total / totals.denominator
        refused = self.guards.refuses_loss(loss, progress)
        return Verdict(loss, by_time, rank_seconds, refused, bool(stop), bool(save))

    def _judge(self, verdict: Verdict, norm: float, progress: Progress) -> tuple[str | None, str | None]:
        """-> (why the update was left out, why an update that was made must be taken back). Collective."""
        if verdict.refused is not None:
            assert not self.engine.was_step_applied(), "a refused step has updated the weights"
            return verdict.refused, None
        if not self.engine.was_step_applied():
            return "the gradient is not finite", None
        spike = self.guards.refuses_norm(norm, progress)
        if self.guards.grad_norm_spike is not None:
            # The norm is a sum over all ranks, but no wrapper promises the same bits on each of them.
            found = torch.tensor(float(spike is not None))
            dist.all_reduce(found, group=self.host_group)
            if found and spike is None:
                spike = f"the gradient norm, {norm:.4g}, is a spike on another rank"
        if spike is None:
            self.guards.remember(verdict.loss, norm, progress)
        return None, spike

    def _advance(self, progress: Progress, totals: StepTotals, skipped: str | None) -> None:
        progress.step += 1
        progress.data_pos += self.plan.size_at(progress.data_pos)
        progress.tokens_seen += totals.row_tokens
        progress.skips_in_a_row = 0 if skipped is None else progress.skips_in_a_row + 1
        progress.skipped_steps += skipped is not None

    def who_says(self, mine: str | None) -> str:
        """What the ranks have to say, and which of them says it. Collective."""
        said: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(said, mine, group=self.host_group)
        return ", ".join(f"{text} (rank {rank})" for rank, text in enumerate(said) if text is not None)
