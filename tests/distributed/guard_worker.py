"""One rank of test_guards: a step that goes wrong on rank 1 alone, over every wrapper.

Started as `python -m tests.distributed.guard_worker RANK WORLD FOLDER`. Each rank writes FOLDER/rank-R.pt: for each
case the reasons of its steps, and masters, their average and step counts at the end.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dlm_dist.config import RunConfig, resolve_batch
from dlm_dist.diffusion.time_buckets import TIME_BUCKETS
from dlm_dist.training import zero_state
from dlm_dist.training.batches import RankStep
from dlm_dist.training.checkpoint_writer import CheckpointWriter
from dlm_dist.training.distributed import start_distributed
from dlm_dist.training.engine import build_engine
from dlm_dist.training.guards import Guards
from dlm_dist.training.phases import PhaseClock
from dlm_dist.training.progress import Progress
from dlm_dist.training.rank_times import RankTimes
from dlm_dist.training.starting_model import whole_parts
from dlm_dist.training.step import Stepper
from dlm_dist.training.step_figures import Pace, StepFigures
from dlm_dist.training.stop_requests import StopRequest
from dlm_dist.training.update_figures import UpdateMeter
from dlm_dist.training.weight_average import WeightAverage
from launcher.leaving import leave
from tests.training.conftest import micro_batch, tiny_config, tiny_model

ACCUMULATION = 2
WRAPPERS = [(stage, precision) for stage in range(4) for precision in ("bf16", "fp32")]
KINDS = ("left out", "loss", "gradient", "spike")
BAD_STEP = 2


class Log:
    """Keeps the records."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def step(self, record: dict[str, Any]) -> None:
        self.records.append(record)


class Steps:
    """What the loop reads: this rank's part of each of the numbered steps."""

    def __init__(self, numbers: list[int], kind: str, rank: int, world: int) -> None:
        self._numbers, self._kind, self._rank, self._world = iter(numbers), kind, rank, world

    def next(self) -> RankStep:
        number = next(self._numbers)
        first = (number * self._world + self._rank) * ACCUMULATION
        batches = [micro_batch(first + index) for index in range(ACCUMULATION)]
        if number == BAD_STEP and self._rank == 1:
            factor = {"loss": math.nan, "spike": 100.0}.get(self._kind, 1.0)
            batches[0]["weights"] = batches[0]["weights"] * factor
        counts = np.array([16 * ACCUMULATION] * 3 + [0, 16 * ACCUMULATION])
        digests = np.zeros((2, 2 * ACCUMULATION, 32), dtype=np.uint8)
        by_time = np.zeros(TIME_BUCKETS, dtype=np.int64)
        return RankStep(batches, counts, digests, (number * 8, number * 8 + 8), by_time, None)


def make_stepper(
    config: RunConfig, engine: Any, steps: Any, log: Log, tell: Any = None, average: WeightAverage | None = None
) -> Stepper:
    """Steps of `engine`, which reads `steps` and records in `log`."""
    world = torch.distributed.get_world_size()
    return Stepper(
        config=config,
        plan=resolve_batch(config.train, world),
        max_steps=100,
        engine=engine,
        device=torch.device("cpu"),
        host_group=None,
        read_ahead=steps,
        is_bound=True,
        head_settings={},
        peak_flops=1.0,
        log=log,  # type: ignore[arg-type]
        writer=CheckpointWriter(Path("unused")),
        alarm=lambda: None,
        guards=Guards(loss_spike=config.guards.loss_spike),
        stop=StopRequest(None),
        clock=PhaseClock(torch.device("cpu")),
        figures=StepFigures(
            config.logging.every,
            UpdateMeter(engine),
            RankTimes(["here"] * world, tell, window=4),
            Pace(100),
            lambda data_pos: {},
        ),
        average=average,
    )


def run(stage: int, precision: str, kind: str, rank: int, world: int) -> dict[str, Any]:
    """Four steps, of which BAD_STEP goes wrong as `kind` says, or does not come at all."""
    config = tiny_config(
        f"zero.stage={stage}",
        f"train.precision={precision}",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "optimizer.name=adamw8bit",
        "optimizer.schedule=constant",
        "guards.loss_spike=20",
        "data.sequence_length=8",
    )
    plan = resolve_batch(config.train, world)
    model = tiny_model()
    engine, _ = build_engine(model, config, plan, whole_parts(model))
    numbers = [number for number in range(4) if not (kind == "left out" and number == BAD_STEP)]
    log = Log()
    # So short that its decay no longer depends on how many steps there were.
    average = WeightAverage(engine, half_life=1)
    stepper = make_stepper(config, engine, Steps(numbers, kind, rank, world), log, average=average)
    engine.train()
    progress = Progress(losses=[4.0 + 0.01 * index for index in range(20)])
    for number in numbers:
        hook = None
        if kind == "gradient" and number == BAD_STEP and rank == 1:
            hook = engine.module.model.norm.register_forward_hook(_infinite_gradient)
        stepper.step(progress)
        if hook is not None:
            hook.remove()
    shards = zero_state.shards(engine)
    result = {
        "reasons": [record["skip_reason"] for record in log.records],
        "progress": progress.as_state(),
        "masters": [shard.flat.clone() for shard in shards],
        "averages": [average.of(shard) for shard in zero_state.own_shards(engine)],
        "steps": [int(zero_state.optimizer_state(engine, shard)["step"]) for shard in shards],
    }
    engine.destroy()
    return result


def _infinite_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.register_hook(lambda gradient: gradient * math.inf)


def main(rank: int, world: int, folder: Path) -> None:
    """Every case, on one process group."""
    start_distributed("cpu", 1)
    results = {
        (stage, precision, kind): run(stage, precision, kind, rank, world)
        for stage, precision in WRAPPERS
        for kind in KINDS
    }
    torch.save(results, folder / f"rank-{rank}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    leave(0)
