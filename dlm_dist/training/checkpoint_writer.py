"""A save: a snapshot written by all ranks, then published as checkpoints/step-N; training may go on meanwhile.

The protocol is specified in docs/checkpoint-format.md. What takes time runs in one thread per rank, which holds no
collective: first every rank writes its files, then rank 0 publishes them and removes old checkpoints. Between the two,
and behind them, the ranks agree at the border between two training steps. A synchronous save is the same with a wait.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dlm_dist.training.checkpoint_files import CheckpointError, make_staging, publish, retain
from dlm_dist.training.checkpoint_snapshot import HostBuffers, Snapshot
from dlm_dist.training.durable_files import write_files
from dlm_dist.training.lease import LeaseError


@dataclass
class _Save:
    """The save in flight: `work` is what this rank's thread does for it now."""

    step: int
    staging: Path
    work: Future[Any]
    started: float = field(default_factory=time.perf_counter)
    files: dict[str, dict[str, Any]] | None = None
    """Of all ranks, once all are written: {relative path: {size, sha256}}."""


class CheckpointWriter:
    """Writes checkpoints to `folder`, at most one at a time. Every rank has one; `group` carries host objects.

    `keep_last` and `keep_every` as in `checkpoint_files.retain`; `tell` gets a line about each published checkpoint;
    rank 0's `guard` runs before one is published, and raises LeaseError where it must not be.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int | None = None,
        keep_every: int | None = None,
        group: dist.ProcessGroup | None = None,
        tell: Callable[[str], None] | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        self.buffers = HostBuffers()
        self._folder = folder
        self._keep = keep_last, keep_every
        self._group = group
        self._tell = tell
        self._guard = guard
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._save: _Save | None = None

    def start(self, snapshot: Snapshot) -> None:
        """Begin to write `snapshot`, whose tensors must not change before `finish`. Collective: every rank must call.

        No save may be in flight. Raises CheckpointError on every rank where rank 0 cannot make the folder.
        """
        assert self._save is None, "a save is in flight: finish() first"
        # A name of its own: a rank of a killed run that lives on for a moment writes into no folder but its own.
        staging = self._folder / f".step-{snapshot.step}.{self._from_rank_0(os.urandom(4).hex())}.writing"
        problem = None
        if dist.get_rank() == 0:
            try:
                make_staging(staging)
            except OSError as error:
                problem = str(error)
                shutil.rmtree(staging, ignore_errors=True)
        self._require(self._from_rank_0(problem), snapshot.step)
        work = self._thread.submit(write_files, staging, snapshot.contents())
        self._save = _Save(snapshot.step, staging, work)

    def ready(self) -> bool:
        """Whether this rank's thread has done its part. Where all ranks say so, they must call `advance`."""
        return self._save is not None and self._save.work.done()

    def advance(self) -> None:
        """Wait for the thread, agree, and begin what comes next. Collective: every rank must call.

        Raises CheckpointError on every rank where one has failed; earlier checkpoints are then untouched.
        """
        save = self._save
        assert save is not None
        error = save.work.exception()
        reports = self._gather((None if error is not None else save.work.result(), _described(error)))
        problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(reports) if text is not None]
        if problems:
            self._save = None
            if dist.get_rank() == 0:
                shutil.rmtree(save.staging, ignore_errors=True)
            self._require("; ".join(problems), save.step, error)
        final = self._folder / f"step-{save.step}"
        if save.files is None:
            files = {name: entry for part, _ in reports for name, entry in part.items()}
            save.files = files
            save.work = self._thread.submit(self._publish, files, save.staging, final)
            return
        self._save = None
        if self._tell is not None:
            size, seconds = sum(entry["size"] for entry in save.files.values()), time.perf_counter() - save.started
            self._tell(f"step {save.step}  saved {final}: {size / 1e6:.1f} MB in {seconds:.2f} s")
        not_removed = reports[0][0]
        if not_removed is not None:
            raise CheckpointError(f"{final} is written, but older checkpoints could not be removed: {not_removed}")

    def finish(self) -> None:
        """Wait until no save is in flight. Collective: every rank must call. Raises as `advance`."""
        while self._save is not None:
            self.advance()

    def close(self) -> None:
        """Wait for the thread alone: without the other ranks a save in flight stays unpublished."""
        self._thread.shutdown()

    def _publish(self, files: Mapping[str, Mapping[str, Any]], staging: Path, final: Path) -> str | None:
        """Rank 0 publishes -> what kept it from removing old checkpoints, if anything did."""
        if dist.get_rank() == 0:
            if self._guard is not None:
                self._guard()
            publish(files, staging, final)
            try:
                retain(self._folder, *self._keep)
            except (OSError, CheckpointError) as error:
                return str(error)
        return None

    def _require(self, problem: str | None, step: int, cause: BaseException | None = None) -> None:
        if problem is not None:
            raise CheckpointError(f"checkpoint step-{step} could not be written: {problem}") from cause

    def _from_rank_0(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def _described(error: BaseException | None) -> str | None:
    if error is None:
        return None
    return str(error) if isinstance(error, (OSError, LeaseError)) else f"{type(error).__name__}: {error}"
