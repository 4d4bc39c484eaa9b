"""What a person sees of a run: a progress bar with the newest figures on a terminal, plain lines elsewhere."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlm_dist.training.progress_display import ProgressDisplay


class Console:
    """A sink for eyes; `line` is for whoever else has something to say. `every`: steps between plain lines."""

    def __init__(self, start: int, total: int, every: int) -> None:
        self._every, self._total = every, total
        self._display: ProgressDisplay | None = None
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            from dlm_dist.training.progress_display import ProgressDisplay

            self._display = ProgressDisplay(start, total)

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._display is not None:
            self._display.line(text)
        else:
            print(text, flush=True)

    def step(self, record: Mapping[str, Any]) -> None:
        """Show one step's figures."""
        if self._display is not None:
            self._display.step(record["step"], figures(record))
        if record["skipped"]:
            first, stop = record["positions"]
            why = f"  (skipped: {record['skip_reason']}; data positions {first} to {stop - 1})"
        elif self._display is None and record["step"] % self._every == 0:
            why = ""
        else:
            return
        left = record["seconds_left"]
        rest = "" if left is None else f"  left {datetime.timedelta(seconds=round(left))}"
        self.line(f"step {record['step']}/{self._total}  {'  '.join(figures(record))}{rest}{why}")

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One evaluation on held-out rows, and what a search for a range of times has found there."""
        error, bits = record["standard_error"], record["bits_per_byte"]
        self.line(
            f"step {record['step']}  held-out {'likelihood' if record['exact'] else 'bound'} "
            f"{record['bound_nats_per_token']:.4f}"
            + (f" +- {error:.4f}" if error is not None else "")
            + " nats/token"
            + (f"  {bits:.4f} bits/byte" if bits is not None else "")
        )
        if (found := record["clip_search"]) is not None:
            self.line(
                f"step {record['step']}  times from {found['t_min']:g} to {found['t_max']:g} from here on  variance "
                f"{found['variance']:.4f}, over all times {found['full_variance']:.4f}"
            )

    def sample(self, record: Mapping[str, Any]) -> None:
        """One generated text."""
        self.line(f"step {record['step']}  sample: {record['text']!r}")

    def rolled_back(self, step: int, to_step: int, why: str) -> None:
        """Go on from `to_step`."""
        if self._display is not None:
            self._display.step(to_step, [])
        self.line(f"step {step}  {why}: back to the checkpoint of step {to_step}, and on without step {step}")

    def close(self, finished: bool) -> None:
        """Leave the bar as it is."""
        if self._display is not None:
            self._display.close()


def figures(record: Mapping[str, Any]) -> list[str]:
    """What a person wants to know of one step, in a few words each."""
    return [
        f"loss {record['loss']:.4f}",
        f"grad {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"MFU {100.0 * record['mfu']:.1f} %",
    ]
