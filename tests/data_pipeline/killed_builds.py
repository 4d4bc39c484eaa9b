"""Builds that are killed: each in a small process of its own, since a large one cannot always be forked."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from data_pipeline.build import BuildOptions, build_dataset


def build_until_killed(options: BuildOptions, at_rename: int) -> bool:
    """Build in a child that kills itself instead of its rename number `at_rename`; whether it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    child = context.Process(target=_build, args=(options, at_rename))
    child.start()
    child.join()
    return child.exitcode == -signal.SIGKILL


def _build(options: BuildOptions, at_rename: int) -> None:
    renames = 0
    rename = os.replace

    def rename_or_die(source: Path, target: Path) -> None:
        nonlocal renames
        renames += 1
        if renames == at_rename:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = rename_or_die  # type: ignore[assignment]
    build_dataset(options)
