"""Independent tasks over worker processes, results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data_pipeline.errors import DataError
from data_pipeline.progress import progress

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    what: str,
    sizes: Sequence[int],
    unit: str,
) -> list[Result]:
    """`function` of each task, in this process or in up to `workers` others. sizes, unit: for the progress.

    The first error stops the rest and is raised. Raises DataError if a worker process dies.
    """
    if not tasks:
        return []
    with progress(what, sum(sizes), unit) as advance:
        if min(workers, len(tasks)) == 1:
            results = []
            for task, size in zip(tasks, sizes, strict=True):
                results.append(function(task))
                advance(size)
            return results
        # Spawned, not forked: the tokenizer libraries have threads, and a forked copy of their locks hangs.
        pool = ProcessPoolExecutor(
            min(workers, len(tasks)), multiprocessing.get_context("spawn"), initializer=_start_worker
        )
        try:
            futures = {pool.submit(function, task): size for task, size in zip(tasks, sizes, strict=True)}
            for future in as_completed(futures):
                future.result()
                advance(futures[future])
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise DataError(
                f"a worker process died while {what} (out of memory?); start the same build again to go on, "
                "with fewer workers if it dies again"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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
