"""Figures of a step that are measured every `logging.every` steps, or need more than the step itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from dlm_dist.diffusion.time_buckets import TIME_BUCKETS, bucket_name
from dlm_dist.training.progress import Progress
from dlm_dist.training.rank_times import RankTimes
from dlm_dist.training.update_figures import UpdateMeter

_NOT_MEASURED = {"grad_norm_by_role": None, "update_ratio_by_role": None, "loss_by_time": None, "epochs": None}


@dataclass
class Pace:
    """How long the rest of a run will take, from its last steps with all that lies between them."""

    max_steps: int
    _ends: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=51))

    def seconds_left(self, step: int) -> float | None:
        """After `step` steps, the last of which has just ended; None where it is the first of this start."""
        if self._ends and self._ends[-1][0] >= step:
            self._ends.clear()  # a rollback
        self._ends.append((step, time.perf_counter()))
        (first, started), (last, ended) = self._ends[0], self._ends[-1]
        return (ended - started) / (last - first) * (self.max_steps - step) if last > first else None


@dataclass(frozen=True)
class StepFigures:
    """What the loop asks for beside the numbers of a step that it has anyway."""

    every: int
    """Steps between two that are measured."""
    updates: UpdateMeter
    ranks: RankTimes
    pace: Pace
    epochs: Callable[[int], Mapping[str, float]]
    """data_pos -> how often each source has been read, by its name."""

    def begin(self, step: int) -> None:
        """Before the step that follows `step` steps."""
        self.updates.begin(self._is_due(step + 1))

    def measured(self, progress: Progress, norm: float | None, group: dist.ProcessGroup | None) -> dict[str, Any]:
        """The figures of the step behind `progress`, null where none are due. Collective: every rank must call.

        `norm`: of its gradient before clipping; None where it updated nothing.
        """
        if not self._is_due(progress.step):
            return _NOT_MEASURED
        return {
            **_NOT_MEASURED,
            **(self.updates.end(norm, group) if norm is not None else {}),
            "loss_by_time": take_by_time(progress),
            "epochs": self.epochs(progress.data_pos),
        }

    def _is_due(self, step: int) -> bool:
        return step % self.every == 0


def add_by_time(progress: Progress, nats: Sequence[float], tokens: Sequence[int]) -> None:
    """Add a step's weighted losses and tokens by bucket of time to those that `take_by_time` has not taken yet."""
    if not progress.nats_by_time:
        progress.nats_by_time, progress.tokens_by_time = [0.0] * TIME_BUCKETS, [0] * TIME_BUCKETS
    for bucket in range(TIME_BUCKETS):
        progress.nats_by_time[bucket] += nats[bucket]
        progress.tokens_by_time[bucket] += tokens[bucket]


def take_by_time(progress: Progress) -> dict[str, float | None] | None:
    """Nats per token by bucket since the last call, None in a bucket without a token; None where nothing was added."""
    found = {
        bucket_name(bucket): nats / tokens if tokens else None
        for bucket, (nats, tokens) in enumerate(zip(progress.nats_by_time, progress.tokens_by_time, strict=True))
    }
    progress.nats_by_time, progress.tokens_by_time = [], []
    return found or None
