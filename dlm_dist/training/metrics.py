"""Where a run's figures go: JSON lines (exact), the console, TensorBoard, wandb. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dlm_dist.training.console import Console


class Sink(Protocol):
    """Something that is told a run's figures, in order."""

    def step(self, record: Mapping[str, Any]) -> None:
        """One optimizer step, as metrics.jsonl has it."""

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One evaluation on held-out rows, as evaluations.jsonl has it."""

    def sample(self, record: Mapping[str, Any]) -> None:
        """One generated text, as samples.jsonl has it."""

    def rolled_back(self, step: int, to_step: int, why: str) -> None:
        """The run goes on behind `to_step`, and what it told of later steps does not count; `step` was the last."""

    def close(self, finished: bool) -> None:
        """Nothing more will come; `finished`: the run has reached its last step."""


class MetricsLog:
    """All sinks of a run in `run_dir` that goes on behind `start_step`, up to `max_steps`; itself one of them.

    `every`: steps between records of the console, TensorBoard and wandb; the files have every step. `wandb_settings`:
    arguments of wandb.init; None: no wandb.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        max_steps: int,
        every: int,
        wandb_settings: Mapping[str, Any] | None,
        tensorboard: bool = False,
    ) -> None:
        files = MetricsFiles(run_dir)
        logged, evaluated = files.rewind(start_step)
        self._sinks: list[Sink] = [files]
        self._wandb = None
        # Imported where they are used: they take a second or more.
        if tensorboard:
            from dlm_dist.training.tensorboard import TensorBoard

            self._sinks.append(TensorBoard(run_dir / "tensorboard", start_step, every))
        if wandb_settings is not None:
            from dlm_dist.training.wandb_run import WandbRun

            self._wandb = WandbRun(wandb_settings, every, logged, evaluated)
            self._sinks.append(self._wandb)
        # Last, since the others may print while they begin.
        self.console = Console(start_step, max_steps, every)
        self._sinks.append(self.console)

    @property
    def wandb_id(self) -> str | None:
        """Id of the wandb run, for a resume to continue it."""
        return self._wandb.id if self._wandb is not None else None

    def step(self, record: Mapping[str, Any]) -> None:
        """One optimizer step."""
        for sink in self._sinks:
            sink.step(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One evaluation on held-out rows."""
        for sink in self._sinks:
            sink.evaluation(record)

    def sample(self, step: int, text: str) -> None:
        """One generated text."""
        for sink in self._sinks:
            sink.sample({"step": step, "text": text})

    def rolled_back(self, step: int, to_step: int, why: str) -> None:
        """Lines after `to_step` are replaced: the run goes on from there."""
        for sink in self._sinks:
            sink.rolled_back(step, to_step, why)

    def close(self, finished: bool) -> None:
        """End all of them; a run that is not `finished` is marked as failed in wandb."""
        for sink in self._sinks:
            sink.close(finished)


class MetricsFiles:
    """metrics.jsonl, evaluations.jsonl and samples.jsonl of a run: every figure, exactly."""

    def __init__(self, run_dir: Path) -> None:
        self._steps, self._evaluations, self._samples = (
            JsonLines(run_dir / f"{kind}.jsonl") for kind in ("metrics", "evaluations", "samples")
        )

    def rewind(self, step: int) -> tuple[int, int]:
        """Go on behind `step`, which itself is recorded already; its evaluation and sample are made again.

        -> the last steps recorded and evaluated until then; -1: none.
        """
        logged, evaluated = self._steps.rewind(step + 1), self._evaluations.rewind(step)
        self._samples.rewind(step)
        return logged, evaluated

    def step(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self._steps.write(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One line of evaluations.jsonl."""
        self._evaluations.write(record)

    def sample(self, record: Mapping[str, Any]) -> None:
        """One line of samples.jsonl."""
        self._samples.write(record)

    def rolled_back(self, step: int, to_step: int, why: str) -> None:
        """Move what came behind `to_step` to NAME.replaced.jsonl."""
        self.rewind(to_step)

    def close(self, finished: bool) -> None:
        """Close the files."""
        for file in (self._steps, self._evaluations, self._samples):
            file.close()


class JsonLines:
    """An append-only file of JSON objects with a `step` each, in order; floats read back bit-equal.

    The file is opened by the first line and stays open. A line is with the operating system when `write` returns: a
    process that is killed loses none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object, as `json_line` has it. Raises OSError that names the file."""
        if self._file is None:
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - for as long as the run lasts
        try:
            self._file.write(json_line(record) + "\n")
            self._file.flush()
        except OSError as error:
            # It would try to write the rest when it is closed.
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def rewind(self, step: int) -> int:
        """Keep the lines of steps below `step`; others, of a run that was cut short, move to NAME.replaced.jsonl.

        -> the step of the last line until then; -1: there was none. Reads no more than what moves, and is done whole
        or, after a kill, done again.
        """
        self.close()
        if not self.path.exists() or not self.path.stat().st_size:
            return -1
        with open(self.path, "rb") as file:
            kept, last, replaced = _tail(file.fileno(), step)
        if replaced:
            self._set_aside(b"".join(replaced))
        os.truncate(self.path, kept)
        return last

    def _set_aside(self, lines: bytes) -> None:
        """Add `lines` to NAME.replaced.jsonl, all or none, and not again where a kill came before they left NAME."""
        aside = self.path.with_suffix(".replaced.jsonl")
        before = aside.read_bytes() if aside.exists() else b""
        if not before.endswith(lines):
            temporary = aside.with_suffix(".tmp")
            temporary.write_bytes(before + lines)
            os.replace(temporary, aside)

    def close(self) -> None:
        """Close the file, until the next line."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _tail(descriptor: int, step: int) -> tuple[int, int, list[bytes]]:
    """How many bytes hold the lines below `step`, the last step of the file (-1: none), and the other lines.

    What is no whole line is counted among neither: the end that a kill cut off.
    """
    replaced: list[bytes] = []
    last = -1
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as text:
        end = len(text)
        while end > 0:
            start = text.rfind(b"\n", 0, end - 1) + 1
            line = text[start:end]
            try:
                found = json.loads(line)["step"] if line.endswith(b"\n") else None
            except ValueError:
                found = None
            if found is not None:
                last = max(last, found)
                if found < step:
                    break
                replaced.append(line)
            end = start
    return end, last, replaced[::-1]


def json_line(result: Mapping[str, Any]) -> str:
    """One line of JSON; numbers that JSON cannot hold (nan, inf) become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    try:
        return json.dumps(result, allow_nan=False)  # nearly always, at a third of the time
    except (TypeError, ValueError):
        return json.dumps(finite(result), allow_nan=False)
