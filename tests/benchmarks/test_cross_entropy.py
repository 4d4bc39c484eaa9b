"""benchmarks/cross_entropy.py runs from end to end; its reference, its errors and its instrument are right.

No test looks at a time.
"""

import json
import math
import sys

import pytest
import torch

from benchmarks import cross_entropy
from benchmarks.machine import PeakMemory, in_fresh_process

TINY = cross_entropy.SIZES["tiny"]


def case(precision):
    return cross_entropy.Case(TINY, TINY.vocabularies[0], precision, "cpu", 1)


def test_the_tiny_run_reports_every_figure(tmp_path, monkeypatch, capsys):
    """Peak memory, a process each, is made up here."""
    peaks = {cross_entropy.BASE: 1000, cross_entropy.GATHERED: 500, cross_entropy.OURS: 100}
    monkeypatch.setattr(cross_entropy, "in_fresh_process", lambda function, case, name: peaks[name])
    output = tmp_path / "result.json"
    cross_entropy.main(
        ["--size", "tiny", "--rounds", "2", "--device", "cpu", "--threads", "1", "--output", str(output)]
    )
    printed = capsys.readouterr().out.rstrip("\n").split("\n")
    assert output.read_text() == printed[-1] + "\n"
    result = json.loads(printed[-1])
    assert result["benchmark"] == "cross_entropy"
    assert {"date", "command", "commit", "versions", "hardware", "size"} <= set(result)
    names = [cross_entropy.BASE, cross_entropy.GATHERED, cross_entropy.OURS]
    assert [(row["precision"], row["vocabulary"], row["candidate"]) for row in result["rows"]] == [
        (precision, vocabulary, name)
        for precision in ("bf16", "fp32")
        for vocabulary in TINY.vocabularies
        for name in names
    ]
    for row in result["rows"]:
        assert 0 < row["supervised_rows"] < TINY.rows * TINY.length
        assert 0 < row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"] < math.inf
        limit = 1e-6 if row["precision"] == "fp32" else 1e-2
        assert all(0 <= error < limit for kinds in row["errors"].values() for error in kinds.values())
    assert len(result["goals"]) == 8  # two for each precision and vocabulary
    memory = [goal for goal in result["goals"] if "memory" in goal["goal"]]
    assert [(goal["value"], goal["passed"]) for goal in memory] == [(0.1, True)] * 2
    verdicts = [line.split()[0] for line in printed if line.startswith(("pass ", "FAIL "))]
    assert verdicts == ["pass" if goal["passed"] else "FAIL" for goal in result["goals"]]
    assert set(result["fastest"].values()) <= set(names)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_full_logits_are_seen_in_the_peak_memory_and_blocks_hold_little_of_them():
    size = cross_entropy.Size(rows=8, length=128, width=16, vocabularies=(40_000,))
    wide = cross_entropy.Case(size, 40_000, "fp32", "cpu", 1)
    logits = 8 * 128 * 40_000 * 4
    assert in_fresh_process(cross_entropy.peak_memory, wide, cross_entropy.BASE) > logits
    assert in_fresh_process(cross_entropy.peak_memory, wide, cross_entropy.OURS) < logits / 4


def test_the_reference_is_autograd_through_fp64_logits():
    operands = case("fp32").operands()
    total, *gradients = cross_entropy.reference(operands, chunk=7)
    wide = cross_entropy.Operands(
        operands.hidden.detach().double().requires_grad_(),
        operands.weight.detach().double().requires_grad_(),
        operands.supervised,
        operands.targets,
        operands.weights.double(),
    )
    logits = wide.hidden[wide.supervised] @ wide.weight.t()
    losses = torch.nn.functional.cross_entropy(logits, wide.targets, reduction="none")
    expected = (losses * wide.weights).sum()
    torch.testing.assert_close(total, expected.detach(), rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (wide.hidden, wide.weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_errors_are_relative_and_see_one_wrong_entry():
    exact = [torch.tensor(4.0), torch.ones(10, 10), torch.ones(4)]
    wrong = [torch.tensor(5.0), torch.ones(10, 10), torch.ones(4)]
    wrong[1][3, 3] = 1.5
    found = cross_entropy.errors(wrong, exact)
    assert found["loss"] == {"largest": 0.25, "norm": 0.25}
    assert found["d_hidden"] == pytest.approx({"largest": 0.5, "norm": 0.05})
    assert found["d_weight"] == {"largest": 0.0, "norm": 0.0}


def grow(megabytes, kept):
    """Peak growth while so much is held in pieces, which are dropped one by one or kept until the end."""
    torch.set_num_threads(1)
    with PeakMemory(torch.device("cpu")) as memory:
        pieces = []
        for _ in range(4):
            pieces.append(torch.ones(megabytes * 2**18 // 4))
            if not kept:
                pieces.clear()
    return memory.bytes


def fail():
    raise SystemExit(3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_was_held_at_once():
    megabyte = 2**20
    assert in_fresh_process(grow, 256, True) == pytest.approx(256 * megabyte, abs=8 * megabyte)
    assert in_fresh_process(grow, 256, False) == pytest.approx(64 * megabyte, abs=8 * megabyte)


def test_a_process_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="fail"):
        in_fresh_process(fail)
