"""A whole run with attention annealing, in this process: where it acts, where it does not, an exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlm_dist.config import ConfigError, RunConfig, load_config
from dlm_dist.training.fallbacks import attention_kernel
from dlm_dist.training.run import train
from tests.data_pipeline.test_token_files import write_llmc
from tests.distributed import runs

BATCH, BUDGET = 4, 13  # the end lies inside a micro-batch of the fourth of six steps


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    write_llmc(tmp_path / "tokens.bin", np.random.default_rng(0).integers(0, 257, 25 * 16 + 7))
    return tmp_path / "tokens.bin"


def start(tokens: Path, run: Path, *changes: str, resume: str | None = None) -> list[dict[str, Any]]:
    """The steps of a run."""
    settings = [
        *runs.MODELS["qwen3"],
        f"run.dir={run}",
        f"data.train.0.path={tokens}",
        f"data.validation={tokens}",
        "data.tokenizer=bytes",
        "data.sequence_length=16",
        "train.max_steps=6",
        f"train.global_batch_size={BATCH}",
        "train.micro_batch_size=2",
        "train.precision=fp32",
        "train.device=cpu",
        "train.cpu_threads=1",
        "train.eval_rows=4",
        "optimizer.schedule=constant",
        "checkpoint.every=3",
    ]
    train(load_config(None, [*settings, *changes]), torch.device("cpu"), resume, ["test"])
    return runs.metrics(run)


def test_a_run_anneals_over_its_budget_and_resumes_exactly(tokens: Path, tmp_path: Path) -> None:
    option = f"objective.attention_annealing={BUDGET}"
    whole = start(tokens, tmp_path / "whole", option)
    start(tokens, tmp_path / "cut", option, "train.max_steps=3")
    start(tokens, tmp_path / "cut", option, resume="auto")
    runs.assert_same_steps(tmp_path / "cut", tmp_path / "whole")
    plain = start(tokens, tmp_path / "plain")
    differs = [mine["noise_sha256"] != other["noise_sha256"] for mine, other in zip(whole, plain, strict=True)]
    assert differs == [step * BATCH < BUDGET for step in range(6)]
    assert whole[0]["loss"] != plain[0]["loss"]
    assert all(mine["rows_sha256"] == other["rows_sha256"] for mine, other in zip(whole, plain, strict=True))

    def first_evaluation(run: str) -> Any:
        return json.loads((tmp_path / run / "evaluations.jsonl").read_text().splitlines()[0])

    assert first_evaluation("whole") == first_evaluation("plain"), "the same weights, evaluated with all in sight"
    single = start(tokens, tmp_path / "single", option, "train.micro_batch_size=1")
    for mine, other in zip(single, whole, strict=True):
        assert mine["noise_sha256"] == other["noise_sha256"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert manifest["starts"][0]["attention"] == {
        "kernel": "sdpa",
        "reason": "FlexAttention has no backward pass on a CPU",
    }
    with pytest.raises(ConfigError, match=r"objective\.attention_annealing is 20, the checkpoint was trained with 13"):
        start(tokens, tmp_path / "cut", "objective.attention_annealing=20", resume="auto")
    with pytest.raises(
        ConfigError, match=r"model\.layer_patterns is \['causal', 'bidirectional'\], the checkpoint was"
    ):
        start(tokens, tmp_path / "cut", option, "model.layer_patterns=[causal, bidirectional]", resume="auto")


def configured(*changes: str) -> RunConfig:
    keys = ["run.dir=unused", "data.train.0.path=unused", "train.max_steps=1", "train.global_batch_size=1"]
    return load_config(None, [*runs.MODELS["qwen3"], *keys, "train.micro_batch_size=1", *changes])


def test_what_runs_masked_attention_is_known_before_the_start() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    choice, fallbacks = attention_kernel(configured(), cuda)
    assert choice is not None
    assert (choice.kernel, fallbacks) == ("flex", [])
    small = configured("model.head_dim=8")
    choice, (fallback,) = attention_kernel(small, cuda)
    assert choice is not None
    assert choice.kernel == "sdpa"
    assert "heads of 8 channels are too small for FlexAttention" in fallback
    with pytest.raises(ConfigError, match="too small for FlexAttention, and strict is true"):
        attention_kernel(configured("model.head_dim=8", "strict=true"), cuda)
    with pytest.raises(ConfigError, match="has no backward pass on a CPU"):
        attention_kernel(configured("model.attention_kernel=flex"), cpu)
    with pytest.raises(ConfigError, match="too small"):
        attention_kernel(configured("model.attention_kernel=flex", "model.head_dim=8"), cuda)
    assert attention_kernel(configured("model.attention_kernel=sdpa", "strict=true"), cuda)[1] == []
