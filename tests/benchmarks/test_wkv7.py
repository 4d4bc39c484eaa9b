"""benchmarks/wkv7.py runs from end to end and reports what it promises. No test looks at a time."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.machine import take_turns
from benchmarks.wkv7 import CHUNKS, HARD_CASES, QUICK, RESULTS, Operands, fitted_exponent, reference_results, results
from dlm_dist.kernels.wkv7_chunked import wkv7_reference

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_quick_run_reports_every_figure(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.wkv7", "--quick", "--rounds", "2", "--device", "cpu", "--threads", "1"]
    done = subprocess.run(
        [*command, "--output", str(output)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    last = done.stdout.rstrip("\n").split("\n")[-1]
    assert output.read_text() == last + "\n"
    result = json.loads(last)
    assert result["benchmark"] == "wkv7"
    assert {"date", "command", "commit", "versions", "hardware", "options"} <= set(result)

    kernels = [f"chunk {size}" for size in CHUNKS]
    assert len(result["errors"]) == len(QUICK.shapes) * len(kernels) + len(HARD_CASES) * (len(kernels) + 1)
    for row in result["errors"]:
        assert set(row["errors"]) == set(RESULTS)
        assert row["error"] == max(row["errors"].values()) == row["errors"][row["worst"]]
        if row["gradient_scale"] == 1.0:
            assert 0 < row["error"] <= 5e-6, row
    assert [(row["shape"], row["kernel"]) for row in result["speed"]] == [
        (str(shape), kernel) for shape in QUICK.shapes for kernel in [*kernels, "token loop"]
    ]
    for row in result["speed"]:
        assert row["rounds"] == (1 if row["kernel"] == "token loop" else 2)
        for name in ("seconds", "loop_ratio"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"] < math.inf
    assert set(result["growth"]["seconds"]) == {str(shape.length) for shape in QUICK.growth}
    assert math.isfinite(result["growth"]["exponent"])
    assert result["goals"] == [
        {"goal": "largest error at most 5e-06", "value": result["goals"][0]["value"], "met": True}
    ], "a quick run says nothing about times"


def test_the_reference_is_the_same_in_groups_of_heads():
    operands = Operands.draw("correlated keys", QUICK.shapes[1], torch.device("cpu"))  # 3 heads: two groups
    whole = results(wkv7_reference, operands, torch.float64)
    grouped = reference_results(operands)
    for name in RESULTS:
        torch.testing.assert_close(grouped[name], whole[name], rtol=1e-12, atol=1e-12)


def test_the_exponent_is_that_of_the_power_law():
    assert fitted_exponent([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_turns_rotate_and_a_limited_function_drops_out():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in ("a", "b", "slow")}
    times = take_turns(functions, torch.device("cpu"), rounds=3, warmup=1, limits={"slow": 1})
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "slow": 1}
    assert calls == ["a", "b", "a", "b", "slow", "b", "a", "a", "b"]
