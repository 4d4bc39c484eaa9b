"""Where the real texts and tokenizers are; tests that need them are skipped without them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Loading a vocabulary falls into the first example; its time says nothing.
settings.register_profile("data_pipeline", deadline=None)
settings.load_profile("data_pipeline")

_REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """real_data("peps/peps.jsonl") is that file; the folder is DLM_DIST_DATA, by default ../shared/data."""
    folder = Path(os.environ.get("DLM_DIST_DATA", _REPOSITORY / ".." / "shared" / "data"))

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"real data is missing: {folder / name} (set DLM_DIST_DATA)")
        return folder / name

    return find
