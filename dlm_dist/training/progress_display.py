"""A run on a terminal: a bar with the time left, below it the newest figures, above it lines that stay."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_REFRESHES_PER_SECOND = 2.0
"""Drawing takes some milliseconds of the interpreter that the steps run in."""

_SPEED_WINDOW_SECONDS = 600.0
"""The time left follows from the steps of so long: evaluations and saves are then part of it."""


class ProgressDisplay:
    """The display of a run from step `start` to step `total`; begins to draw at once, until `close`."""

    def __init__(self, start: int, total: int, terminal: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            speed_estimate_period=_SPEED_WINDOW_SECONDS,
            expand=True,
        )
        self._task = self._progress.add_task("train", total=total, completed=start)
        self._figures: Sequence[str] = ()
        self._live = Live(
            get_renderable=self._drawing,
            console=terminal or Console(),
            refresh_per_second=_REFRESHES_PER_SECOND,
            # Whatever else prints goes above the bar.
            redirect_stdout=True,
            redirect_stderr=True,
        )
        self._live.start()
        # A process that is killed cannot bring a hidden cursor back.
        self._live.console.show_cursor(True)

    def _drawing(self) -> Group:
        table = Table.grid(padding=(0, 3))
        table.add_row(*self._figures)
        return Group(self._progress, table)

    def step(self, step: int, figures: Sequence[str]) -> None:
        """The run stands behind `step`, and has these figures."""
        self._figures = figures
        self._progress.update(self._task, completed=step)

    def line(self, text: str) -> None:
        """Print above the bar, as it is: nothing in it is markup."""
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Draw once more, and leave the terminal as it was."""
        self._live.stop()
