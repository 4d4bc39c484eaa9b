"""Where a run's numbers go: JSON lines (exact), the console, wandb. Rank 0 only."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch


def json_line(result: Mapping[str, Any]) -> str:
    """One line of JSON; numbers that JSON cannot hold (nan, inf) become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(result), allow_nan=False)


class JsonLines:
    """An append-only file of JSON objects with a `step` each; floats read back bit-equal."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Keep the lines of steps below `step`; others, of a run that was cut short, move to NAME.replaced.jsonl."""
        if not self.path.exists():
            return
        kept: list[bytes] = []
        replaced: list[bytes] = []
        for line in self.path.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the end of a line that a kill cut off, or the empty end of the file
            (kept if record["step"] < step else replaced).append(line + b"\n")
        if replaced:
            self._set_aside(b"".join(replaced))
        _write_over(self.path, b"".join(kept))

    def _set_aside(self, lines: bytes) -> None:
        """Add `lines` to NAME.replaced.jsonl, all or none, and not again where a kill came before they left NAME."""
        aside = self.path.with_suffix(".replaced.jsonl")
        before = aside.read_bytes() if aside.exists() else b""
        if not before.endswith(lines):
            _write_over(aside, before + lines)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object, as `json_line` has it."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json_line(record) + "\n")


def _write_over(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


class Console:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, start: int, total: int, every: int) -> None:
        self._every = every
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(initial=start, total=total, unit="step", dynamic_ncols=True)
        self._total = total

    def step(self, record: Mapping[str, Any]) -> None:
        """Show one step's numbers."""
        text = (
            f"loss {record['loss']:.4f}  grad {record['grad_norm']:.3f}  lr {record['lr']:.2e}  "
            f"{record['tokens_per_second']:,.0f} tok/s"
        )
        if record["skipped"]:
            first, stop = record["positions"]
            text += f"  (skipped: {record['skip_reason']}; data positions {first} to {stop - 1})"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
        elif record["step"] % self._every == 0 or record["skipped"]:
            self.line(f"step {record['step']}/{self._total}  {text}")

    def rewind(self, step: int) -> None:
        """Go on from `step`."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class MetricsLog:
    """metrics.jsonl, evaluations.jsonl and samples.jsonl of a run, its console and its wandb run."""

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        max_steps: int,
        every: int,
        wandb_settings: Mapping[str, Any] | None,
    ) -> None:
        self._files = {kind: JsonLines(run_dir / f"{kind}.jsonl") for kind in ("metrics", "evaluations", "samples")}
        self._rewind(start_step)
        self.console = Console(start_step, max_steps, every)
        self._every = every
        self._logged = 0  # wandb takes no step twice
        self._wandb = None
        if wandb_settings is not None:
            import wandb

            self._wandb = wandb.init(**wandb_settings)

    def _rewind(self, step: int) -> None:
        """Go on behind `step`, which itself is recorded already; its evaluation and sample are made again."""
        for kind, file in self._files.items():
            file.rewind(step + 1 if kind == "metrics" else step)

    @property
    def wandb_id(self) -> str | None:
        """Id of the wandb run, for a resume to continue it."""
        return self._wandb.id if self._wandb is not None else None

    def step(self, record: Mapping[str, Any]) -> None:
        """One optimizer step."""
        self._files["metrics"].write(record)
        self.console.step(record)
        if self._wandb is not None and record["step"] % self._every == 0 and record["step"] > self._logged:
            self._logged = record["step"]
            numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
            self._wandb.log(numbers, step=record["step"])

    def rolled_back(self, step: int, to_step: int, why: str) -> None:
        """Lines after `to_step` are replaced: the run goes on from there."""
        self._rewind(to_step)
        self.console.rewind(to_step)
        self.console.line(f"step {step}  {why}: back to the checkpoint of step {to_step}, and on without step {step}")

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One evaluation on held-out rows."""
        self._files["evaluations"].write(record)
        error = record["standard_error"]
        self.console.line(
            f"step {record['step']}  held-out {'likelihood' if record['exact'] else 'bound'} "
            f"{record['bound_nats_per_token']:.4f}"
            + (f" +- {error:.4f}" if error is not None else "")
            + " nats/token"
            + (f"  {record['bits_per_byte']:.4f} bits/byte" if record["bits_per_byte"] is not None else "")
        )
        if (found := record["clip_search"]) is not None:
            self.console.line(
                f"step {record['step']}  times from {found['t_min']:g} to {found['t_max']:g} from here on  variance "
                f"{found['variance']:.4f}, over all times {found['full_variance']:.4f}"
            )
        if self._wandb is not None:
            numbers = {key: value for key, value in record.items() if isinstance(value, float)}
            for bucket in record["loss_by_time"] or ():
                if bucket["draws"]:
                    numbers[f"loss at t {bucket['first']:.1f}-{bucket['last']:.1f}"] = bucket["nats_per_token"]
            self._wandb.log({f"validation/{key}": value for key, value in numbers.items()}, step=record["step"])

    def sample(self, step: int, text: str) -> None:
        """One generated text."""
        self._files["samples"].write({"step": step, "text": text})
        self.console.line(f"step {step}  sample: {text!r}")

    def close(self, finished: bool) -> None:
        """End the bar and the wandb run; a run that is not `finished` is marked as failed there."""
        self.console.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if finished else 1)


class Stopwatch:
    """Seconds spent in a `with` block."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on this device, best of a few tries; the base of MFU.

    Measured at every start, because no table knows every machine: MFU is relative to what this one can do
    with the threads that this rank has.
    """
    size, tries = (8192, 5) if device.type == "cuda" else (1024, 4)
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    torch.mm(a, b)
    best = math.inf
    for _ in range(tries):
        with Stopwatch() as watch:
            result = torch.mm(a, b)
            result[0, 0].item()
        best = min(best, watch.seconds)
    return 2.0 * size**3 / best
