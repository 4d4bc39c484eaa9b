"""Independent tasks over worker processes, results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Self, TypeVar

from data_pipeline.errors import DataError
from data_pipeline.progress import progress

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """Up to `number` processes, started when first needed and ended with the block; 1 means this process."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        what: str,
        sizes: Sequence[int],
        unit: str,
    ) -> list[Result]:
        """`function` of each task, in the order of the tasks. what, sizes, unit: for the progress.

        The first error is raised, and tasks that have not begun are dropped. Raises DataError if a worker
        process dies.
        """
        if not tasks:
            return []
        with progress(what, sum(sizes), unit) as advance:
            if min(self._number, len(tasks)) == 1:
                results = []
                for task, size in zip(tasks, sizes, strict=True):
                    results.append(function(task))
                    advance(size)
                return results
            pool = self._started()
            futures = {pool.submit(function, task): size for task, size in zip(tasks, sizes, strict=True)}
            try:
                for future in as_completed(futures):
                    future.result()
                    advance(futures[future])
            except BrokenProcessPool as error:
                raise DataError(
                    f"a worker process died while {what} (out of memory?); start the same build again to go on, "
                    "with fewer workers if it dies again"
                ) from error
            return [future.result() for future in futures]

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Spawned, not forked: the tokenizer libraries have threads, and a forked copy of their locks hangs.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._number, context, initializer=_start_worker)
        return self._pool


def _start_worker() -> None:
    # One process per core already: threads inside the tokenizer libraries would only get in their way.
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed build must not leave workers behind that still write while the next one runs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
