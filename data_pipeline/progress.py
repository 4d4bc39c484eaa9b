"""How far long work is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. Bytes (unit "B") are shown in k, M, G. Where stderr is no terminal, a line at
    least every 10 s of progress and one at the end."""
    if sys.stderr.isatty():
        with tqdm(total=total, initial=done, desc=what, unit=unit, unit_scale=unit == "B") as bar:

            def move_bar(n: int) -> None:
                bar.update(n)

            yield move_bar
        return
    started = last = time.monotonic()

    def line() -> None:
        share = 100 * done / total if total else 100.0
        size = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB" if unit == "B" else f"{done} of {total} {unit}"
        print(f"{what}: {size} ({share:.0f} %), {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            line()

    yield advance
    line()
