"""The benchmark of goodput: what it counts as productive, and that its figure is the model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import goodput, slurm_restart
from benchmarks.goodput import kept_steps, measured
from benchmarks.killed_runs import Life


def life(begun: float, ended: float, first: float, steps: range) -> Life:
    """A start whose step of a second each end at `first`, `first` + 1, ..."""
    return Life(begun, ended, [(first + i, step) for i, step in enumerate(steps)], [0.5])


LIVES = [
    life(0.0, 15.0, 6.0, range(1, 10)),  # steps 1 to 9
    Life(15.0, 17.0),  # killed in its start
    life(17.0, 30.0, 23.0, range(5, 12)),  # went on behind step 4
    life(30.0, 40.0, 36.0, range(9, 13)),  # behind step 8
]


@pytest.fixture
def run(tmp_path) -> Path:
    for name, count in (("metrics.jsonl", 12), ("metrics.replaced.jsonl", 8)):
        records = [{"save_seconds": 0.25 if i == 3 else 0.0} for i in range(count)]
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_steps_that_a_later_start_made_again_are_lost():
    assert kept_steps(LIVES) == 4 + 4 + 4
    assert kept_steps(LIVES[:1]) == 9


def test_the_time_of_a_run_is_what_its_lines_say(run):
    found = measured(LIVES, run)
    assert (found["failures"], found["steps"]) == (3, 20)
    assert found["restart_seconds"] == 5.0
    assert found["restart_seconds_one_by_one"] == [5.0, None, 5.0, 5.0]
    assert (found["saves"], found["write_seconds"]) == (3, pytest.approx(0.5 - 0.5 / 3))
    assert found["shares"]["restart"] == 17.0 / 40.0
    assert found["shares"]["productive"] == pytest.approx(12 / 20 * (40 - 17 - 0.5) / 40)
    assert sum(found["shares"].values()) == pytest.approx(1.0)


def test_a_run_that_ends_in_a_start_keeps_what_is_published(run):
    (run / "checkpoints" / "step-4").mkdir(parents=True)
    (run / "checkpoints" / "step-4" / "manifest.json").touch()
    found = measured(LIVES[:2], run)
    assert found["shares"]["productive"] / found["shares"]["lost"] == pytest.approx(4 / 5)


@pytest.fixture(scope="module")
def figure():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(goodput, "WEEKS", 20)
        return goodput.cluster_figures(start=20.0)


def test_the_figure_for_clusters(figure):
    shares = [row["expected_share"] for row in figure["runs"]]
    assert shares == sorted(shares, reverse=True)
    for row in figure["runs"]:
        assert row["simulated_shares"]["productive"] == pytest.approx(row["expected_share"], abs=0.004)
    (row,) = [row for row in figure["runs"] if row["nodes"] == 512]
    assert figure["share_at_512"] == row["expected_share"]
    assert figure["goal_met"] == (row["restart"] <= figure["goal_needs_at_most"]["restart"])
    assert figure["share_with_synchronous_saves"] < figure["share_at_512"]
    for name in ("parameters", "detect_seconds", "hang_share", "hang_minutes"):
        half, twice = figure["share_with_half_and_twice"][name]
        assert half > figure["share_at_512"] > twice, name


def test_the_tables_and_the_picture(run, figure, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    found = measured(LIVES, run)
    model = goodput.compare(goodput.Run(1, 4.0, 0.25, 5.0, 0.25, node_mtbf=10.0), found, [goodput.Failure(15.0, False)])
    weeks = [{"interval_seconds": 4.0, **found, "model": model}]
    result = {"weeks": weeks, "cluster": figure}
    goodput.print_tables(result)
    assert "512 nodes: " in capsys.readouterr().out
    goodput.draw_picture(result, tmp_path / "picture.svg")
    assert "1024 nodes" in (tmp_path / "picture.svg").read_text()


def test_the_runs_of_a_record_are_not_made_again(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(goodput, "WEEKS", 2)
    found = measured(LIVES, run)
    model = goodput.compare(goodput.Run(1, 4.0, 0.25, 5.0, 0.25, node_mtbf=10.0), found, [])
    record = {"benchmark": "goodput", "weeks": [{"interval_seconds": 4.0, **found, "model": model}]}
    (tmp_path / "weeks.json").write_text(json.dumps(record))
    parts = {name: {"median": value} for name, value in (("detect", 1.0), ("requeue", 3.0), ("start", 50.0))}
    (tmp_path / "restart.json").write_text(json.dumps({"seconds": parts}))
    options = ["--weeks", str(tmp_path / "weeks.json"), "--slurm-restart", str(tmp_path / "restart.json")]
    assert goodput.main(options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["weeks"] == json.loads(json.dumps(record["weeks"]))
    assert result["cluster"]["start_seconds"] == 53.0


def test_the_steps_of_an_attempt_are_counted_in_the_log_of_its_first_rank(tmp_path):
    assert slurm_restart._steps(tmp_path, 7, 0) == 0
    (tmp_path / "logs" / "7_0").mkdir(parents=True)
    lines = ["note: x", "step 1/9  loss 1.0", "step 1  saved x: 1 MB in 0.1 s", "step 2/9  loss 0.9"]
    (tmp_path / "logs" / "7_0" / "rank-00000.n1.log").write_text("\n".join(lines))
    assert slurm_restart._steps(tmp_path, 7, 0) == 2


@pytest.mark.slow
def test_the_real_trainer_killed_and_resumed(tmp_path, capsys):
    assert goodput.main(["--quick", "--folder", str(tmp_path), "--output", str(tmp_path / "out.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (week,) = result["weeks"]
    assert week["steps"] > 20
    assert week["failures"] >= 1
    assert sum(week["shares"].values()) == pytest.approx(1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
