"""The comparison of spreads: its statistics, the analytic model, and that a model on text goes through it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import loss_variance
from data_pipeline.shards import write_source
from data_pipeline.tokenizers import load
from dlm_dist import models


def test_noise_and_differences_between_rows_are_told_apart() -> None:
    random = np.random.default_rng(0)
    losses = random.normal(5.0, 0.7, (400, 1)) + random.normal(0.0, 0.3, (400, 8))
    found = loss_variance.spread(losses)
    assert abs(found["noise_std"] - 0.3) < 4 * found["noise_error"] < 0.05
    assert found["curve_std"] == pytest.approx(math.hypot(0.7, 0.3), rel=0.1)
    assert found["mean_error"] == pytest.approx(0.3 / math.sqrt(3200), rel=0.1)


def test_every_variant_has_the_mean_of_the_analytic_model() -> None:
    result = loss_variance.analytic(groups=40, draws=8)
    found = list(result["variants"].values())
    for one in found:
        assert abs(one["mean"] - result["truth"]) < 4 * one["mean_error"]
    default, counted, spread_out, llada = (one["ratio"] for one in found)
    assert default == 1.0
    assert llada > 4 < counted
    assert 1.5 < spread_out < counted
    assert "7." in loss_variance.table("analytic", result)


def test_a_model_is_measured_on_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load("bytes")
    write_source(tmp_path / "data", np.random.default_rng(0).integers(32, 127, (16, 12)), tokenizer)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    model = models.build("qwen3", vocab_size=300, mask_token_id=tokenizer.mask_id, seed=0, **sizes)
    model.save_pretrained(tmp_path / "model")
    given = ["--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    assert loss_variance.main([*given, "--groups", "2", "--draws", "3", "--output", str(tmp_path / "out.json")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "out.json").read_text() == line + "\n"
    for found in json.loads(line)["trained"]["variants"].values():
        assert found["mean"] == pytest.approx(math.log(300), rel=0.5)
        assert found["noise_std"] > 0
    assert loss_variance.main([*given, "--groups", "3"]) == 2
    assert "has 16 rows, and 3 groups need 24" in capsys.readouterr().err
