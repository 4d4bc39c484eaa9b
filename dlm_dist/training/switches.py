"""Marker files in a run's folder: how people, and the chain of jobs, tell a run what to do and learn that it is over.

Made with `touch RUN/SAVE`; what the file says is for people. Needs no torch.
"""

from __future__ import annotations

from pathlib import Path

DONE = "DONE"
"""The run has reached its last step: no later job of the chain starts it again."""
STOP = "STOP"
"""End behind the step you are in, with a checkpoint; no job starts the run while the file is there."""
SAVE = "SAVE"
"""Save behind the step you are in, and go on. The run removes the file when the checkpoint is there."""


class Switches:
    """Looks for the files in the folder of the run, which costs a look-up of the file system each."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    @property
    def stop_reason(self) -> str | None:
        """Why the run is to end; None: it is not."""
        path = self._run_dir / STOP
        return f"{path} is there" if path.exists() else None

    @property
    def save_wanted(self) -> bool:
        """Whether somebody asks for a checkpoint now."""
        return (self._run_dir / SAVE).exists()

    def saved(self) -> None:
        """Tell whoever asked that the checkpoint is there."""
        (self._run_dir / SAVE).unlink(missing_ok=True)
