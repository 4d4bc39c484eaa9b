"""The goodput model: its three views agree with each other and with what can be counted by hand."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_dist.goodput import (
    DAY,
    Failure,
    Run,
    best_interval,
    daly_interval,
    draw_failures,
    expected_share,
    good_intervals,
    largest,
    simulate,
    young_interval,
)

RUN = Run(nodes=512, interval=600.0, stall=2.0, restart=300.0, write=40.0)


def account(run: Run, seconds: float, *failures: tuple[float, bool]) -> dict[str, float]:
    found = vars(simulate(run, seconds, [Failure(*failure) for failure in failures]))
    return {name: value for name, value in found.items() if value}


def test_the_run_without_failures():
    # Three saves from 600 s on, the last of which ends the second before.
    run = replace(RUN, restart=0.0)
    assert account(run, 1806.0) == {"productive": 1800.0, "stall": 6.0}


@pytest.mark.parametrize(
    ("time", "kept"),
    [
        (250.0, 0.0),  # in the first start
        (340.0, 0.0),  # in the first interval
        (401.0, 0.0),  # in the first save
        (411.0, 0.0),  # while it is written
        (412.0, 100.0),  # there
        (513.0, 100.0),  # in the second save
        (514.0, 200.0),  # there: 300 + 2 (100 + 2) + 10
    ],
)
def test_what_a_failure_takes_back(time, kept):
    run = Run(nodes=1, interval=100.0, stall=2.0, write=10.0, restart=300.0, detect=7.0)
    found = simulate(run, time + 7.0, [Failure(time, False)])
    assert (found.productive, found.detection, found.failures) == (kept, 7.0, 1)
    assert found.seconds == pytest.approx(time + 7.0)


def test_a_save_waits_for_the_one_before_it():
    # Trains to 10, saves to 11, trains to 21, waits to 41 for the first save, saves to 42, trains to 50.
    run = Run(nodes=1, interval=10.0, stall=1.0, write=30.0, restart=0.0)
    assert account(run, 50.0) == {"productive": 28.0, "stall": 2.0, "waiting": 20.0}


def test_a_failure_while_a_hang_is_not_noticed_changes_nothing():
    run = Run(nodes=1, interval=10.0, stall=0.0, restart=5.0, hang_detect=100.0, hang_share=0.5)
    expected = {"productive": 15.0, "lost": 5.0, "detection": 100.0, "restart": 10.0, "failures": 1}
    assert account(run, 130.0, (20.0, True), (60.0, False), (119.9, False)) == expected


def test_a_failure_in_a_restart_begins_it_anew():
    run = Run(nodes=1, interval=10.0, stall=0.0, restart=5.0)
    assert account(run, 20.0, (8.0, False), (12.0, False)) == {
        "productive": 3.0,
        "lost": 3.0,
        "restart": 14.0,
        "failures": 2,
    }


def test_starts_that_took_their_own_time():
    # 2 of a start, 8 of training that are lost; a start of 4, then 5 each.
    run = Run(nodes=1, interval=100.0, stall=0.0, restart=5.0)
    failures = [Failure(10.0, False), Failure(20.0, False)]
    found = simulate(run, 30.0, failures, [2.0, 4.0])
    assert (found.restart, found.lost, found.productive) == (11.0, 14.0, 5.0)


def test_a_job_that_ends_saves_in_time_and_loses_nothing():
    # Two jobs of 100: each 5 of restart, 92 of training and 1 + 2 of a save that holds up.
    run = Run(nodes=1, interval=1000.0, stall=1.0, write=2.0, restart=5.0, job=100.0)
    assert account(run, 200.0) == {"productive": 184.0, "stall": 6.0, "restart": 10.0}


@settings(max_examples=60, deadline=None)
@given(
    run=st.builds(
        Run,
        nodes=st.integers(1, 4096),
        interval=st.floats(1.0, 1e4),
        stall=st.floats(0.0, 100.0),
        restart=st.floats(0.0, 1000.0),
        write=st.floats(0.0, 3000.0),
        detect=st.floats(0.0, 100.0),
        hang_share=st.floats(0.0, 1.0),
        hang_detect=st.floats(0.0, 4000.0),
        job=st.none() | st.floats(5000.0, 1e5),
    ),
    seconds=st.floats(1.0, 5e5),
    seed=st.integers(0, 1000),
)
def test_every_second_is_accounted_for(run, seconds, seed):
    found = simulate(run, seconds, draw_failures(run, seed))
    assert found.seconds == pytest.approx(seconds)
    assert all(value >= 0 for value in vars(found).values())
    assert sum(found.shares().values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "run",
    [
        RUN,
        replace(RUN, nodes=8, interval=100_000.0),
        replace(RUN, nodes=4096, write=900.0, detect=30.0),
        replace(RUN, nodes=2048, hang_share=0.3, hang_detect=3600.0, detect=60.0),
        replace(RUN, nodes=10_000, restart=1000.0, stall=60.0, write=0.0),
        replace(RUN, job=43_200.0),
    ],
)
def test_the_simulated_share_is_the_expected_one(run):
    """Over 20 runs of about 500 failures each, within four standard errors; with `job` it is a first order."""
    seconds = 500.0 / run.rate
    shares = [simulate(run, seconds, draw_failures(run, seed)).shares()["productive"] for seed in range(20)]
    error = statistics.stdev(shares) / math.sqrt(len(shares))
    assert abs(statistics.fmean(shares) - expected_share(run)) < 4 * error + (0.001 if run.job else 0.0)
    assert error < 0.005


def test_without_background_and_detection_it_is_dalys_complete_form():
    run = Run(nodes=4000, interval=1500.0, stall=90.0, restart=400.0)
    rate = run.rate
    daly = run.interval * rate / (math.exp(rate * run.restart) * math.expm1(rate * (run.interval + run.stall)))
    assert expected_share(run) == pytest.approx(daly, rel=1e-12)


@pytest.mark.parametrize("nodes", [8, 64, 512, 4096])
def test_the_best_interval_is_the_textbooks_where_theirs_hold(nodes):
    run = Run(nodes=nodes, interval=1.0, stall=20.0, restart=300.0)
    best = best_interval(run)
    assert daly_interval(run.stall, run.rate) == pytest.approx(best, rel=0.005)
    assert young_interval(run.stall, run.rate) == pytest.approx(best, rel=0.08)
    share = expected_share(replace(run, interval=best))
    assert share >= expected_share(replace(run, interval=best * 1.05))
    assert share >= expected_share(replace(run, interval=best / 1.05))


def test_an_interval_is_never_shorter_than_the_writing_of_a_checkpoint_allows():
    run = Run(nodes=512, interval=1.0, stall=0.5, write=900.0, restart=300.0)
    assert young_interval(run.stall, run.rate) < 300.0
    assert best_interval(run) == pytest.approx(900.0, rel=1e-3)


def test_intervals_that_are_nearly_as_good():
    run = replace(RUN, interval=best_interval(RUN))
    shortest, longest = good_intervals(RUN, 0.001)
    assert shortest < run.interval < longest
    for interval in (shortest, longest):
        assert expected_share(replace(RUN, interval=interval)) == pytest.approx(expected_share(run) - 0.001, abs=1e-6)


def test_the_largest_restart_for_a_share():
    limit = largest(RUN, "restart", 0.97)
    assert limit is not None
    run = replace(RUN, restart=limit)
    assert expected_share(replace(run, interval=best_interval(run))) == pytest.approx(0.97, abs=1e-5)
    assert largest(replace(RUN, detect=DAY), "restart", 0.97) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nodes": 0}, "nodes is 0: expected more than 0"),
        ({"interval": math.nan}, "interval is nan: expected more than 0"),
        ({"stall": -1.0}, "stall is -1: expected seconds, at least 0"),
        ({"restart": math.inf}, "restart is inf"),
        ({"hang_share": 1.5}, "hang_share is 1.5: expected a share from 0 to 1"),
        ({"job": 100.0}, "a job of 100 s is not longer than a restart and a save, 342 s"),
    ],
)
def test_numbers_that_describe_no_run(change, words):
    with pytest.raises(ValueError, match=words):
        replace(RUN, **change)


def test_an_absurd_run_has_no_share():
    assert expected_share(replace(RUN, nodes=10**9)) == 0.0
    assert daly_interval(1e9, 1.0) == 1.0
