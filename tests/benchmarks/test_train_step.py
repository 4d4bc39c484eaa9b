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
        ("bare", 1024),
        ("full logits", 1024),
    ]
    for row in result["steps"] + result["losses"]:
        assert set(row) == FIGURES
        assert row["rounds"] == 2
        for name in ("seconds", "tokens_per_second", "mfu", "speed_ratio"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"] < math.inf
    assert all(row["peak_memory_bytes"] > 0 for row in result["losses"])


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
