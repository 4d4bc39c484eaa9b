"""What stops a run that its user can mend. Needs no torch, so that an early mistake is told early."""

from __future__ import annotations


class TrainingStoppedError(RuntimeError):
    """The run cannot go on by itself; the message says why and what to do."""


class StoppedEarlyError(RuntimeError):
    """The run was asked to end before its last step, and has saved; the message says who asked."""
