"""The training loop: one step after another; between them checkpoints, evaluations, rollbacks and the end."""

from __future__ import annotations

from dataclasses import dataclass

from dlm_dist.training.callbacks import Callbacks
from dlm_dist.training.errors import StoppedEarlyError, TrainingStoppedError
from dlm_dist.training.progress import Progress
from dlm_dist.training.step import Stepper, Verdict


@dataclass(frozen=True)
class Trainer:
    """A run. What comes between two steps holds collectives: every rank does it."""

    stepper: Stepper
    between: Callbacks
    has_checkpoint: bool
    """Whether the run's folder holds the checkpoint that this start goes on from."""

    def run(self, progress: Progress) -> None:
        """Train from `progress` to the last step. Collective: every rank must call.

        Raises TrainingStoppedError where the guards give up, StoppedEarlyError where the run was asked to end,
        CheckpointError where a checkpoint could not be written.
        """
        stepper = self.stepper
        stepper.seek(progress)
        if stepper.guards.grad_norm_spike is not None and not self.has_checkpoint:
            self.between.save(progress)  # a rollback needs somewhere to go
        # Also at the start: a kill may have come between the checkpoint of this step and its evaluation.
        self._look(progress)
        while progress.step < stepper.max_steps:
            verdict, spike = stepper.step(progress)
            if spike is not None:
                self._roll_back(progress, spike)
                continue
            self._give_up_after_many_skips(progress)
            # Saved first: nothing that goes wrong while evaluating costs the steps before it.
            self._save_if_due(progress, verdict)
            if verdict.stop_wanted and progress.step < stepper.max_steps:
                raise StoppedEarlyError(
                    f"stopped behind step {progress.step} of {stepper.max_steps}, which is saved: "
                    f"{stepper.who_says(stepper.stop.reason)}; go on with --resume auto"
                )
            self._look(progress)

    def _save_if_due(self, progress: Progress, verdict: Verdict) -> None:
        finished = progress.step == self.stepper.max_steps
        # Whoever asked for it, or ends with it, waits until it is there.
        awaited = finished or verdict.stop_wanted or verdict.save_wanted
        with self.stepper.clock.during("save"):
            if awaited or _is_due(self.stepper.config.checkpoint.every, progress.step):
                self.between.save(progress)
            if awaited:
                self.stepper.writer.finish()
        if verdict.save_wanted:
            self.stepper.stop.saved()

    def _look(self, progress: Progress) -> None:
        """The evaluation and the sample that are due: the first and the last step are always evaluated."""
        settings, step = self.stepper.config.train, progress.step
        with self.stepper.clock.during("evaluation"):
            if self.between.evaluates and (step in (0, self.stepper.max_steps) or _is_due(settings.eval_every, step)):
                before = progress.clip_ranges
                self.between.evaluate(progress)
                if progress.clip_ranges != before:
                    # What was read ahead has times from the old range.
                    self.stepper.seek(progress)
            if step > 0 and _is_due(settings.sample_every, step):
                self.between.sample(progress)

    def _give_up_after_many_skips(self, progress: Progress) -> None:
        if progress.skips_in_a_row >= self.stepper.config.guards.max_consecutive_skips:
            self.stepper.writer.finish()
            raise TrainingStoppedError(
                f"{progress.skips_in_a_row} steps in a row were skipped: loss or gradient was not finite, or a spike. "
                f"The last was at data_pos {progress.data_pos}: resume from a checkpoint with a lower optimizer.lr, "
                "or leave these positions out with data.skip"
            )

    def _roll_back(self, progress: Progress, spike: str) -> None:
        """Go back to the newest checkpoint, and on from there without the step that has just ended. Collective."""
        condemned = progress.condemned | {progress.step: f"{spike}: left out after a rollback"}
        rollbacks = progress.rollbacks + 1
        saved = self.between.restore()
        if rollbacks - saved.rollbacks > self.stepper.config.guards.max_rollbacks:
            raise TrainingStoppedError(
                f"{rollbacks - saved.rollbacks} rollbacks to step {saved.step} without reaching the next checkpoint, "
                f"the last since {spike} in step {progress.step}: resume from an earlier checkpoint with a lower "
                "optimizer.lr, or raise guards.grad_norm_spike"
            )
        if self.stepper.log is not None:
            self.stepper.log.rolled_back(progress.step, saved.step, spike)
        vars(progress).update(vars(saved))
        progress.condemned = {step: why for step, why in condemned.items() if step > progress.step}
        progress.rollbacks = rollbacks
        self.stepper.seek(progress)
        self._look(progress)


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
