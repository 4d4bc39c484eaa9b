"""What stops a run that its user can mend. Needs no torch, so that an early mistake is told early."""

from __future__ import annotations


class TrainingStoppedError(RuntimeError):
    """The run cannot go on by itself; the message says why and what to do."""
