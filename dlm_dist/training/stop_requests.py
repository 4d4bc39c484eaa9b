"""A run that is asked to end before its last step: by SIGTERM, SIGINT, SIGUSR1, its limit of hours, or a file STOP.

The request is only noted here. The ranks agree on it at the end of a step (training/loop.py), save, and end. A second
signal ends this process at once; but not under SLURM, which sends several by itself (SIGUSR1 ahead of the time limit,
SIGTERM at the limit) and SIGKILL when it has waited long enough.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

from dlm_dist.training.switches import Switches

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_ECHO_SECONDS = 2.0
"""Ctrl-C reaches a rank from the terminal and once more through its launcher: within this time it is one request."""


class StopRequest:
    """Notes signals while it is entered: `with StopRequest(...) as stop`. Main thread only.

    `switches` are those of the run's folder, on the one rank that looks at them.
    """

    def __init__(self, max_hours: float | None, switches: Switches | None = None) -> None:
        self._max_hours = max_hours
        self._switches = switches
        self._patient = "SLURM_JOB_ID" in os.environ
        self._deadline = time.monotonic() + 3600.0 * max_hours if max_hours is not None else None
        self._signal: tuple[str, float] | None = None

    @property
    def reason(self) -> str | None:
        """Why this process wants to stop; None while it does not."""
        if self._signal is not None:
            return self._signal[0]
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"train.max_hours = {self._max_hours:g} have passed"
        return self._switches.stop_reason if self._switches is not None else None

    @property
    def save_wanted(self) -> bool:
        """Whether a file SAVE asks for a checkpoint now."""
        return self._switches is not None and self._switches.save_wanted

    def saved(self) -> None:
        """The checkpoint that SAVE asked for is there."""
        if self._switches is not None:
            self._switches.saved()

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        # launcher/node.py starts its ranks with a signal blocked, so that one which comes too early waits until here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal = (signal.Signals(number).name, now)
        elif not self._patient and now - self._signal[1] >= _ECHO_SECONDS:
            # Not sys.exit: the main thread may wait in a collective for ever.
            os._exit(128 + number)
