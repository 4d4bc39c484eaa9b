"""The pictures of docs/objectives.md are those of the code as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import objective_pictures

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


def test_every_picture_is_drawn_shown_and_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    for folder in ("one", "two"):
        assert objective_pictures.main(["--output", str(tmp_path / folder)]) == 0
    shown = re.findall(r"\(pictures/([a-z-]+)\.svg\)", (DOCS / "objectives.md").read_text())
    assert sorted(shown) == sorted(objective_pictures.PICTURES)
    for name in shown:
        assert (tmp_path / "one" / f"{name}.svg").read_bytes() == (tmp_path / "two" / f"{name}.svg").read_bytes()
        assert (DOCS / "pictures" / f"{name}.svg").stat().st_size > 5000


def test_patterns_show_what_they_are_named_after():
    complementary = objective_pictures.pattern(*objective_pictures.PATTERNS["complementary_prob: 1 (pairs)"])
    assert ((complementary[0::2] == 1) ^ (complementary[1::2] == 1)).all()
    one_block = objective_pictures.pattern(*objective_pictures.PATTERNS["one_block_length: 8"])
    assert set(one_block.reshape(-1)) == {0, 1, 3}
    replaced = objective_pictures.pattern(*objective_pictures.PATTERNS["noise_type: random_replace"])
    assert set(replaced.reshape(-1)) == {0, 2}
