"""benchmarks/train_step.py runs from end to end and reports what it promises. No test looks at a time."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FIGURES = {
    "backbone",
    "system",
    "vocabulary",
    "parameters",
    "tokens_per_step",
    "rounds",
    "seconds",
    "cpu_seconds",
    "tokens_per_second",
    "mfu",
    "speed_ratio",
    "cpu_ratio",
    "peak_memory_bytes",
}


def test_the_smallest_run_reports_every_figure(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.train_step", "--size", "tiny", "--rounds", "2", "--device", "cpu"]
    command += ["--backbones", "rwkv7", "--threads", "1", "--output", str(output)]
    command += ["--parts", "steps", "losses", "head"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    last = done.stdout.rstrip("\n").split("\n")[-1]
    assert output.read_text() == last + "\n"
    result = json.loads(last)
    assert result["benchmark"] == "train_step"
    assert {"date", "command", "commit", "versions", "hardware", "options"} <= set(result)
    assert {"cpu", "cores", "threads"} <= set(result["hardware"])
    assert all(result["gemm_flops"][kind]["median"] > 0 for kind in ("bf16", "fp32"))

    assert [row["system"] for row in result["steps"]] == ["bare", "zero0", "zero2"]
    assert [(row["system"], row["vocabulary"]) for row in result["losses"]] == [
        ("bare", 512),
        ("full logits", 512),
    ]
    assert [(row["system"], row["vocabulary"]) for row in result["head"]] == [
        ("full logits", 512),
        ("bare", 512),
        ("zero0", 512),
    ]
    assert len(result["goals"]) == 4
    for row in result["steps"] + result["losses"] + result["head"]:
        assert set(row) == FIGURES
        assert row["rounds"] == 2
        for name in ("seconds", "tokens_per_second", "mfu", "speed_ratio"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"] < math.inf
    assert all(row["peak_memory_bytes"] > 0 for row in result["losses"] + result["head"])


def test_the_model_that_is_mostly_its_head_has_the_size_it_is_said_to_have(tmp_path):
    import torch

    from benchmarks.train_step import HEAD_SIZE, Case, Options
    from dlm_dist.models.qwen3 import Qwen3DiffusionConfig, Qwen3ForDiffusion

    options = Options(size="head", precision="bf16", optimizer="adamw", device="cpu", threads=1, rounds=1)
    case = Case(options, "qwen3", HEAD_SIZE, HEAD_SIZE.vocabularies[0])
    config = Qwen3DiffusionConfig(**case.config("bare", tmp_path).model.sizes())
    with torch.device("meta"):
        model = Qwen3ForDiffusion(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 102_966_784
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert case.rows_per_step * HEAD_SIZE.length == 4096


def test_goals_are_judged_by_the_median_and_full_logits_have_none():
    from benchmarks.train_step import head_goals

    def row(system, speed, memory):
        return {"system": system, "speed_ratio": {"median": speed}, "peak_memory_bytes": memory}

    found = head_goals([row("full logits", 1.0, 9e9), row("bare", 3.0, 4e9), row("zero0", 2.9, 3.9e9)])
    assert [goal["passed"] for goal in found] == [True, False, False, True]


def test_full_logits_give_the_value_and_gradient_of_ours():
    import torch

    from benchmarks.bare_loop import BareLoop
    from tests.training.conftest import micro_batch, tiny_config, tiny_model

    config = tiny_config("train.precision=fp32", "train.gradient_clipping=0")
    loops = [BareLoop(tiny_model(), config, torch.device("cpu"), full) for full in (False, True)]
    for number in range(2):
        losses = [loop.step([micro_batch(number), micro_batch(number + 2)], 32).item() for loop in loops]
        assert math.isclose(*losses, rel_tol=1e-6)
    for ours, theirs in zip(loops[0].weights, loops[1].weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
