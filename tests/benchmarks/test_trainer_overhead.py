import json

import pytest

from benchmarks import trainer_overhead
from benchmarks.trainer_overhead import Ledger, summary


def test_the_script_runs_and_its_last_line_says_what_it_must(tmp_path, capsys):
    assert trainer_overhead.main(["--quick", "--logging-every", "1", "--output", str(tmp_path / "out.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert lines[-1] == (tmp_path / "out.json").read_text().strip()
    (one,) = result["sizes"].values()
    assert one["steps"] == 3
    parts = {"rows", "model", "update", "totals", "agree", "judge", "updates", "by time", "figures", "sinks", "rest"}
    assert set(one["milliseconds"]) == {*parts, "step"}
    assert one["noise_milliseconds"]["median"] > 0
    assert one["overhead_share"] > one["loop_share_cpu"] > 0


def test_a_part_within_a_part_counts_once(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    monkeypatch.setattr("time.thread_time", lambda: now / 2)
    ledger = Ledger()
    ledger.next_step()
    with ledger.during("update"):
        now += 3.0
        with ledger.during("updates"):
            now += 1.0
    now += 2.0
    with ledger.during("sinks"):
        now += 0.5
    ledger.next_step()
    ledger.next_step()
    assert ledger.steps[0] == {
        "update": (3.0, 1.5),
        "updates": (1.0, 0.5),
        "sinks": (0.5, 0.25),
        "rest": (2.0, 1.0),
        "step": (6.5, 3.25),
    }
    result = summary(ledger.steps[:1], noise=[0.05], beats=[0.0], threads=1)
    assert result["loop_share_wall"] == pytest.approx(3.5 / 6.5)
    assert result["overhead_share"] == pytest.approx(3.5 / 6.5 + 0.05 / 3.25)
    assert result["logging_share_of_50_ms"] == pytest.approx(0.75 / 0.05)
