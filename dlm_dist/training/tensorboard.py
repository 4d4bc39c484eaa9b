"""TensorBoard: a run's figures as events, in RUN/tensorboard/train and RUN/tensorboard/validation.

A start that goes on from a checkpoint, and a rollback, write a new file that begins with a note from which step on the
files before it are void; so curves neither double nor have a second branch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import SummaryWriter

from dlm_dist.training.scalars import scalars

_FLUSH_SECONDS = 1
"""What a SIGKILL may take. Written by a thread: no step waits for it."""


class TensorBoard:
    """A sink of events below `folder`, for a run that goes on behind `start_step`; steps that `every` divides.

    Events are made and written by a thread, in order; what goes wrong there is raised by a later call.
    """

    def __init__(self, folder: Path, start_step: int, every: int) -> None:
        self._folder, self._every = folder, every
        self._thread = ThreadPoolExecutor(1, "tensorboard")
        self._pending: deque[Future[None]] = deque()
        self._open(start_step)

    def _open(self, step: int) -> None:
        # Evaluation and sample of `step` itself are made again.
        self._train, self._validation = (
            SummaryWriter(str(self._folder / name), flush_secs=_FLUSH_SECONDS, purge_step=first)
            for name, first in (("train", step + 1), ("validation", step))
        )

    def step(self, record: Mapping[str, Any]) -> None:
        """The numbers of one optimizer step."""
        if record["step"] % self._every == 0:
            self._do(_add, self._train, record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """The numbers of an evaluation, by time too."""
        self._do(_add, self._validation, record)

    def sample(self, record: Mapping[str, Any]) -> None:
        """A generated text."""
        self._do(self._validation.add_text, "sample", record["text"], record["step"])

    def rolled_back(self, step: int, to_step: int, why: str) -> None:
        """Go on behind `to_step`."""
        self._close()
        self._open(to_step)

    def close(self, finished: bool) -> None:
        """Write what is left."""
        self._close()
        self._thread.shutdown()

    def _do(self, call: Callable[..., None], *arguments: Any) -> None:
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(call, *arguments))

    def _close(self) -> None:
        while self._pending:
            self._pending.popleft().result()
        self._train.close()
        self._validation.close()


def _add(writer: SummaryWriter, record: Mapping[str, Any]) -> None:
    # One event for all numbers: add_scalar would make one for each, at many times the cost.
    event = Event()
    for name, value in scalars(record).items():
        event.summary.value.add(tag=name, simple_value=value)
    file_writer = writer.file_writer
    assert file_writer is not None
    file_writer.add_event(event, record["step"])
