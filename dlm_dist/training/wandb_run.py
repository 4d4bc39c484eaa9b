"""Weights & Biases: one wandb run over all starts of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import wandb

from dlm_dist.training.scalars import scalars


class WandbRun:
    """A sink of a wandb run made with `settings` (arguments of wandb.init).

    wandb takes no step twice, and an offline run, of which every start writes a file of its own, would show both. So
    what an earlier start has handed over is not handed over again: steps up to `logged` and evaluations up to
    `evaluated`, where the settings name the id of a run to go on with. After a rollback likewise: the curves keep
    what was learned first. `every`: steps between records.
    """

    def __init__(self, settings: Mapping[str, Any], every: int, logged: int, evaluated: int) -> None:
        self._run = wandb.init(**settings)
        self._every = every
        self._logged, self._evaluated = (-1, -1) if settings.get("id") is None else (logged, evaluated)

    @property
    def id(self) -> str:
        """For a resume to continue this run."""
        return self._run.id

    def step(self, record: Mapping[str, Any]) -> None:
        """The numbers of one optimizer step."""
        step = record["step"]
        if step % self._every == 0 and step > self._logged:
            self._logged = step
            self._run.log(scalars(record), step=step)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """The numbers of an evaluation, by time too."""
        if record["step"] > self._evaluated:
            self._evaluated = record["step"]
            numbers = {f"validation/{name}": value for name, value in scalars(record).items()}
            self._run.log(numbers, step=record["step"])

    def sample(self, record: Mapping[str, Any]) -> None:
        """Texts are in samples.jsonl."""

    def rolled_back(self, step: int, to_step: int, why: str) -> None:
        """Steps that are there already are not logged again."""

    def close(self, finished: bool) -> None:
        """End the run; one that is not `finished` is marked as failed."""
        self._run.finish(exit_code=0 if finished else 1)
