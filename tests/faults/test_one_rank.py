"""One of two ranks is killed: the launcher ends the other one, and the run goes on from where it was saved."""

import time

import pytest

from tests.distributed import runs
from tests.faults import small_run, starts

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1200)]

LONG = {"train__max_steps": 40, "checkpoint__every": 10, "zero__stage": 3}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_launcher_ends_the_other_rank(rank, data, tmp_path, report):
    reference, run = tmp_path / "reference", tmp_path / "run"
    statuses, output = starts.to_the_end(
        small_run.arguments(data, reference, **LONG), None, tmp_path / "reference.log", 2
    )
    assert statuses == [0, 0], output
    settings = small_run.arguments(data, run, **LONG)
    start = starts.begin("launched", settings, None, tmp_path / "first.log", 2)
    while runs.last_step(run) < 15:
        assert start.running(), start.output()
        time.sleep(0.002)
    assert start.kill_rank(rank)
    (status,) = start.wait()
    assert status not in (0, -9), start.output()
    statuses, output = starts.to_the_end(settings, "auto", tmp_path / "second.log", 2)
    assert statuses == [0, 0], output
    assert "resuming from" in output
    runs.assert_same_steps(run, reference)
    report.case("One rank of two", f"rank {rank} killed under `deepspeed`", "the launcher ended the other; bit-equal")
