"""One rank of a world that trains, saves, loads and saves again: `python -m ... JOBS.json`.

A job is {"settings": [...], "from": a checkpoint or null, "to": folder, "steps": n, "first": m}: a tiny engine, loaded
or new, which takes n steps from step m on (0 where it is left out) and is saved with an average of its weights; rank 0
leaves what `load_shards` said in `to`/report.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlm_dist.config import resolve_batch
from dlm_dist.training.distributed import start_distributed
from launcher.leaving import leave
from tests.training.conftest import run_steps, tiny_config


def run(job: dict[str, Any]) -> None:
    """One job; collective."""
    import torch.distributed as dist

    from dlm_dist.training import checkpoint
    from dlm_dist.training.checkpoint_snapshot import take_snapshot
    from dlm_dist.training.checkpoint_writer import CheckpointWriter
    from dlm_dist.training.engine import build_engine
    from dlm_dist.training.starting_model import starting_model
    from dlm_dist.training.weight_average import WeightAverage

    sizes = ["model.vocab_size=64", "model.head_dim=16", "model.intermediate_size=64"]
    config = tiny_config(*sizes, "train.global_batch_size=8", "train.micro_batch_size=2", *job["settings"])
    plan = resolve_batch(config.train, dist.get_world_size())
    source = Path(job["from"]) if job["from"] is not None else None
    start = starting_model(config, plan, 60, source)
    engine, _ = build_engine(start.model, config, plan, start.unrounded)
    engine.train()
    loaded = checkpoint.load_shards(engine, source) if source is not None else None
    average = WeightAverage(engine, half_life=16)
    if source is not None:
        average.load(source)
    # Every rank reads the same rows, so the same steps mean the same gradients in every world.
    first = job.get("first", 0)
    for step in range(first, first + job["steps"]):
        run_steps(engine, step, 1, accumulation=plan.gradient_accumulation_steps)
        average.update(8 * (step + 1), 8)
    writer = CheckpointWriter(Path(job["to"]))
    writer.start(take_snapshot(engine, 1, {"global_step": 1}, {}, average=average))
    writer.finish()
    writer.close()
    if dist.get_rank() == 0:
        (Path(job["to"]) / "report.json").write_text(json.dumps(None if loaded is None else asdict(loaded)))


if __name__ == "__main__":
    start_distributed("cpu", 1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
    leave(0)
