"""`dlm goodput`: the figures are those of the model, and options that fit no run are answered with a sentence."""

from __future__ import annotations

import json

import pytest

from dlm_dist.goodput import Run, best_interval, expected_share
from tests.commands import dlm, mistake

COSTS = ["--stall", 2, "--restart", 300, "--write", 40]


def reports(capsys, *arguments):
    capsys.readouterr()
    assert dlm("goodput", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)["runs"]


def test_the_recommended_interval_is_the_models(capsys):
    (found,) = reports(capsys, *COSTS, "--nodes", 512, "--step-seconds", 10)
    run = Run(nodes=512, interval=1.0, stall=2.0, restart=300.0, write=40.0)
    assert found["interval_seconds"] == pytest.approx(best_interval(run), rel=1e-4)
    assert found["interval_steps"] == round(found["interval_seconds"] / 10)
    assert found["hours_between_failures"] == pytest.approx(264 * 24 / 512)
    assert found["simulated_share"] == pytest.approx(found["expected_share"], abs=0.003)
    low, high = found["simulated_share_of_95_weeks"]
    assert low < found["simulated_share"] < high
    assert sum(found["shares"].values()) == pytest.approx(1.0)


def test_more_of_a_cost_is_worse_and_a_longer_life_of_nodes_better(capsys):
    (found,) = reports(capsys, *COSTS, "--nodes", 512, "--hang-share", 0.1)
    share, changes = found["expected_share"], found["sensitivity"]
    for name in ("stall", "write", "restart", "hang_share"):
        assert changes[name][0] > share > changes[name][1], name
    assert changes["node_mtbf"][0] < share < changes["node_mtbf"][1]
    assert all(other < share for other in found["sensitivity_to_interval"])


def test_a_share_of_hangs_is_not_doubled_beyond_all(capsys):
    (found,) = reports(capsys, *COSTS, "--nodes", 64, "--hang-share", 1)
    assert found["sensitivity"]["hang_share"][1] == pytest.approx(found["expected_share"])


def test_storage_adds_the_time_of_a_transfer_to_restart_and_write(capsys):
    storage = ["--checkpoint-gb", 400, "--storage-gb-per-second", 20]
    (found,) = reports(capsys, "--nodes", 64, "--stall", 2, "--restart", 100, "--interval-minutes", 10, *storage)
    run = Run(nodes=64, interval=600.0, stall=2.0, restart=120.0, write=20.0)
    assert found["interval_seconds"] == 600.0
    assert found["expected_share"] == expected_share(run)


def test_the_report_for_people(capsys):
    assert dlm("goodput", *COSTS, "--nodes", 8, 512) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["8", "512"]
    assert dlm("goodput", "--nodes", 512, "--stall", 40, "--restart", 300) == 0
    text = capsys.readouterr().out
    assert "97 % is missed" in text
    assert "restart alone cannot help" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", 0], "nodes is 0: expected more than 0"),
        (["--node-mtbf-days", 0], "--node-mtbf-days is 0: expected more than 0"),
        (["--checkpoint-gb", 5], "--checkpoint-gb and --storage-gb-per-second belong together"),
        (["--hang-share", 2], "hang_share is 2: expected a share from 0 to 1"),
        (["--job-hours", 0.01], "a job of 36 s is not longer than a restart and a save, 342 s"),
    ],
)
def test_options_that_fit_no_run(capsys, options, words):
    assert words in mistake(capsys, "goodput", *COSTS, *options)
