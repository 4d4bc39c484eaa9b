"""Two runs started on one folder: the second is refused by name, and follows at once when the first is killed."""

import json
import platform
import time
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.faults import small_run, starts

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]

GROUP = "Two runs on one folder"
LONG = {"train__max_steps": 120, "checkpoint__every": 20}


def settings(data, run):
    return small_run.arguments(data, run, **LONG)


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """Per number of ranks: the run left alone."""
    folder = tmp_path_factory.mktemp("reference")
    found = {}
    for ranks in (1, 2):
        run = folder / f"ranks-{ranks}"
        statuses, output = starts.to_the_end(settings(data, run), None, folder / f"{ranks}.log", ranks)
        assert statuses == [0] * ranks, output
        found[ranks] = run
    return found


def await_step(start, run, step):
    while runs.last_step(run) < step:
        assert start.running(), start.output()
        time.sleep(0.01)


@pytest.mark.parametrize(("kind", "ranks"), [("forked", 1), ("forked", 2), ("launched", 1), ("launched", 2)])
def test_the_second_is_refused_and_follows_a_kill(kind, ranks, reference, data, tmp_path, report):
    run = tmp_path / "run"
    first = starts.begin(kind, settings(data, run), "auto", tmp_path / "first.log", ranks, SLURM_JOB_ID="4711")
    await_step(first, run, 25)
    statuses, output = starts.to_the_end(settings(data, run), "auto", tmp_path / "second.log", ranks)
    owner = json.loads(next(path for path in (run / ".lease").iterdir() if path.name == "1").read_text())
    assert first.running(), first.output()
    assert owner["process"] == first.rank_process(0)
    assert owner["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert statuses == [2] * ranks
    name = f"is in use by process {owner['process']} on {platform.node()}, job 4711, since {owner['since']}"
    assert name in output
    assert "Traceback" not in output
    first.kill()
    first.wait()
    statuses, output = starts.to_the_end(settings(data, run), "auto", tmp_path / "third.log", ranks)
    assert statuses == [0] * ranks, output
    assert "resuming from" in output
    assert "waiting" not in output
    runs.assert_same_steps(run, reference[ranks])
    outcome = "refused: run.dir is in use by process PID on HOST, job 4711, since TIME; after SIGKILL it starts at once"
    report.case(GROUP, f"a second start beside a run of {ranks} ranks ({kind})", outcome)


def test_of_three_that_follow_a_kill_one_trains(reference, data, tmp_path, report):
    run = tmp_path / "run"
    first = starts.begin("forked", settings(data, run), None, tmp_path / "first.log")
    await_step(first, run, 25)
    first.kill()
    first.wait()
    others = [starts.begin("forked", settings(data, run), "auto", tmp_path / f"{i}.log") for i in range(3)]
    outcomes = []
    for other in others:
        (status,) = other.wait()
        # One that comes when the winner is done finds nothing left to do.
        said = "in use" if "is in use by process" in other.output() else "nothing left"
        outcomes.append("trained" if "\nstep " in other.output() else said)
        assert (status, outcomes[-1]) in ((0, "trained"), (0, "nothing left"), (2, "in use")), other.output()
    assert outcomes.count("trained") == 1
    runs.assert_same_steps(run, reference[1])
    report.case(GROUP, "three starts at the same moment behind a kill", f"one trained: {', '.join(sorted(outcomes))}")
