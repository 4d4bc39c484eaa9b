"""One rank of test_figures: a few recorded steps over some wrappers, with a last rank that needs ten seconds more.

Started as `python -m tests.distributed.figures_worker RANK WORLD FOLDER WRAPPER...`, a wrapper being stage and
precision as "2-fp32". Rank 0 writes FOLDER/figures.pt: for each wrapper its records, what the console was told, and
how far the masters of each role moved in the first step.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dlm_dist.config import resolve_batch
from dlm_dist.diffusion.time_buckets import TIME_BUCKETS
from dlm_dist.training import phases, zero_state
from dlm_dist.training.batches import RankStep
from dlm_dist.training.distributed import start_distributed
from dlm_dist.training.engine import build_engine
from dlm_dist.training.progress import Progress
from dlm_dist.training.starting_model import whole_parts
from launcher.leaving import leave
from tests.distributed.guard_worker import Log, make_stepper
from tests.training.conftest import micro_batch, tiny_config, tiny_model

MICRO_BATCHES = 4
"""Of a step, over all ranks."""
STEPS = 4
LATE = 10.0
"""Seconds that the last rank's clock is put forward in each forward pass, or in each wait for data under ZeRO-3."""


def buckets_of(number: int) -> torch.Tensor:
    """The bucket of each of the 16 scored tokens of a micro-batch."""
    return ((torch.arange(16) * 7 + number) % (TIME_BUCKETS - 1)).to(torch.uint8)


class Steps:
    """What the loop reads: this rank's micro-batches, the same in every step."""

    def __init__(self, rank: int, world: int, late: SimpleNamespace, stage: int) -> None:
        share = MICRO_BATCHES // world
        self._numbers = range(rank * share, (rank + 1) * share)
        self._late, self._stage = late, stage

    def next(self) -> RankStep:
        if self._stage == 3:
            self._late.seconds += self._late.by
        buckets = [buckets_of(number) for number in self._numbers]
        count, size = len(buckets), 16 * len(buckets)
        by_time = sum(np.bincount(each.numpy(), minlength=TIME_BUCKETS) for each in buckets)
        return RankStep(
            [micro_batch(number) for number in self._numbers],
            np.array([size] * 3 + [0, size]),
            np.zeros((2, 2 * count, 32), dtype=np.uint8),
            (0, 2 * MICRO_BATCHES),
            np.asarray(by_time, dtype=np.int64),
            buckets,
        )


def masters(engine: Any) -> dict[str, list[torch.Tensor]]:
    """This rank's masters by role; of replicated ones its share."""
    roles = engine.module.parameter_roles()
    found: dict[str, list[torch.Tensor]] = {}
    for shard in zero_state.shards(engine):
        if shard.replicated and dist.get_rank():
            continue
        for piece in shard.pieces:
            values = shard.flat[piece.offset : piece.offset + piece.numel].double().clone()
            found.setdefault(roles[piece.name], []).append(values)
    return found


def ratios(before: dict[str, list[torch.Tensor]], after: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """Norm of the change over norm, over all ranks. Collective."""
    parts: list[Any] = [None] * dist.get_world_size()
    squares = {
        role: (
            sum((new - old).square().sum().item() for old, new in zip(before[role], after[role], strict=True)),
            sum(old.square().sum().item() for old in before[role]),
        )
        for role in before
    }
    dist.all_gather_object(parts, squares)
    return {
        role: math.sqrt(sum(part[role][0] for part in parts if role in part))
        / math.sqrt(sum(part[role][1] for part in parts if role in part))
        for role in {role for part in parts for role in part}
    }


def run(stage: int, precision: str, rank: int, world: int) -> dict[str, Any]:
    """STEPS steps, each of which is measured."""
    config = tiny_config(
        f"zero.stage={stage}",
        f"train.precision={precision}",
        f"train.global_batch_size={2 * MICRO_BATCHES}",
        "train.micro_batch_size=2",
        "train.gradient_clipping=0.01",
        "optimizer.schedule=constant",
        "optimizer.lr=0.01",
        "data.sequence_length=8",
        "logging.every=1",
    )
    model = tiny_model()
    engine, _ = build_engine(model, config, resolve_batch(config.train, world), whole_parts(model))
    late = SimpleNamespace(seconds=0.0, by=LATE if rank == world - 1 else 0.0)
    phases.time = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late.seconds, monotonic=time.monotonic)  # type: ignore[assignment]

    def delay(module: Any, inputs: Any) -> None:
        if stage < 3:
            late.seconds += late.by

    engine.module.register_forward_pre_hook(delay)
    log = Log()
    told: list[str] = []
    stepper = make_stepper(config, engine, Steps(rank, world, late, stage), log, told.append)
    engine.train()
    progress = Progress()
    before = masters(engine)
    stepper.step(progress)
    moved = ratios(before, masters(engine))
    for _ in range(STEPS - 1):
        stepper.step(progress)
    engine.destroy()
    return {"records": log.records, "told": told, "ratios": moved}


def main(rank: int, world: int, folder: Path, wrappers: list[str]) -> None:
    """Every wrapper, on one process group."""
    start_distributed("cpu", 1)
    results = {}
    for wrapper in wrappers:
        stage, precision = wrapper.split("-")
        results[wrapper] = run(int(stage), precision, rank, world)
    if rank == 0:
        torch.save(results, folder / "figures.pt")
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    leave(0)
