"""One of two ranks that look at checkpoints, or write one, each with a file system of its own.

Started as `python -m tests.distributed.checkpoint_worker RANK FOLDER`. Each case has a folder per rank, in which the
rank works with relative paths: so the ranks see different files under the same names. Writes FOLDER/answer-RANK.json:
what each case gave.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dlm_dist.training import checkpoint_files
from dlm_dist.training.checkpoint import find_resumable
from dlm_dist.training.checkpoint_snapshot import Snapshot
from dlm_dist.training.checkpoint_writer import CheckpointWriter
from launcher.leaving import leave


def look(case: Path, rank: int) -> str:
    """The checkpoint that is found, or why none is."""
    os.chdir(case / f"rank-{rank}")
    try:
        return str(find_resumable(Path("checkpoints"), "auto"))
    except checkpoint_files.CheckpointError as error:
        return f"error: {error}"


def write(folder: Path, rank: int) -> list[str]:
    """Both write into one folder; at the second save the disk of rank 1 is full, at the third it is slow."""
    os.chdir(folder)
    told = []
    writer = CheckpointWriter(Path("checkpoints"), keep_last=1, tell=told.append)
    real = os.pwrite

    def full(*arguments):
        raise OSError(28, "No space left on device")

    for step in (1, 2, 3):
        tensors = {f"tensors/rank-{rank:05d}.safetensors": {"x": torch.full((1000,), float(step))}}
        files = {"trainer_state.json": b"{}"} if rank == 0 else {}
        writer.start(Snapshot(step, tensors, files))
        if rank == 1:
            os.pwrite = full if step == 2 else real
        try:
            writer.finish()
        except checkpoint_files.CheckpointError as error:
            told.append(f"error: {error}")
        dist.barrier()
        told.append(str(sorted(path.name for path in Path("checkpoints").iterdir())))
        dist.barrier()
    writer.close()
    return [line.partition(":")[0] if line.startswith("step") else line for line in told]


def main(rank: int, folder: Path) -> None:
    """Every case in turn, on this rank."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    answers: dict[str, object] = {case.name: look(case, rank) for case in sorted((folder / "cases").iterdir())}
    answers["write"] = write(folder / "shared", rank)
    (folder / f"answer-{rank}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
