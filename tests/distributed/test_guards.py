"""Bad steps, signals and hangs over real ranks: every rank draws the same conclusion, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from dlm_dist.training.checkpoint_files import list_checkpoints, load_trainer_state, step_of
from tests.distributed import runs
from tests.distributed.guard_worker import BAD_STEP, KINDS, WRAPPERS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

STOPPED_EARLY = 75
WORLD = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guards")
    runs.run_workers("tests.distributed.guard_worker", WORLD, folder)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize(("stage", "precision"), WRAPPERS)
def test_a_step_that_is_bad_on_one_rank_is_skipped_on_all(stage, precision, kind, results):
    """Masters, their average and the optimizer's own count are then those of a run that never saw the step."""
    said = {"loss": "the loss is not finite", "gradient": "the gradient is not finite", "spike": "the loss, "}[kind]
    for rank in range(WORLD):
        found, clean = results[rank][stage, precision, kind], results[rank][stage, precision, "left out"]
        assert [reason is not None for reason in found["reasons"]] == [number == BAD_STEP for number in range(4)]
        assert found["reasons"][BAD_STEP].startswith(said)
        assert clean["reasons"] == [None] * 3
        assert found["progress"]["global_step"] == 4
        assert found["progress"]["skipped_steps"] == 1
        assert found["progress"]["losses"] == clean["progress"]["losses"]
        assert found["steps"] == clean["steps"] == [3] * len(clean["steps"])
        for what in ("masters", "averages"):
            for mine, expected in zip(found[what], clean[what], strict=True):
                assert torch.equal(mine, expected)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.build_data(tmp_path_factory.mktemp("data"))


# A limit so low that the noise of a healthy run goes over it now and then.
NERVOUS = {
    "train__max_steps": 40,
    "checkpoint__every": 10,
    "optimizer__warmup_steps": 0,
    "guards__window": 16,
    "guards__max_rollbacks": 30,
    "guards__max_consecutive_skips": 30,
}


def replaced(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.replaced.jsonl").read_text().splitlines()]


def test_a_gradient_spike_goes_back_and_leaves_its_step_out(data, tmp_path):
    run = tmp_path / "run"
    output = runs.train(runs.overrides(data, run, "qwen3", guards__grad_norm_spike=0.7, **NERVOUS), ranks=1)
    records = runs.metrics(run)
    assert [record["step"] for record in records] == list(range(1, 41))
    skipped = [record for record in records if record["skipped"]]
    assert skipped
    assert all("gradient norm" in record["skip_reason"] for record in skipped)
    assert "back to the checkpoint of step" in output
    assert f"data positions {skipped[0]['positions'][0]} to" in output
    first = skipped[0]["step"]
    gone = replaced(run)
    before = {record["step"]: record for record in gone[: [record["step"] for record in gone].index(first)]}
    assert set(before) == set(range((first - 1) // 10 * 10 + 1, first))
    for record in records[: first - 1]:
        if record["step"] in before:
            for key in runs.EXACT:
                assert record[key] == before[record["step"]][key], f"the replay of step {record['step']} is another one"
    assert records[first - 1]["data_pos"] == first * 8
    state = load_trainer_state(list_checkpoints(run / "checkpoints")[-1])
    assert state["skipped_steps"] == len(skipped) == state["rollbacks"]


@pytest.mark.slow
def test_a_run_that_may_roll_back_is_resumed_at_its_start_and_in_another_folder(data, tmp_path):
    """Where it has a checkpoint of its own it does not write that again; where it has none it writes one."""
    run, other = tmp_path / "run", tmp_path / "other"
    changes = {"guards__grad_norm_spike": 1e6, "train__max_steps": 6, "checkpoint__every": 4}
    runs.train_and_kill(runs.overrides(data, run, "qwen3", **changes), run, at_step=2, ranks=1)
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-0"]
    runs.train(runs.overrides(data, run, "qwen3", **changes), ranks=1, resume="auto")
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-0", "step-4", "step-6"]
    start = str(run / "checkpoints" / "step-4")
    runs.train(runs.overrides(data, other, "qwen3", **changes), ranks=1, resume=start)
    assert [path.name for path in list_checkpoints(other / "checkpoints")] == ["step-4", "step-6"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loss", "grad_norm"])
@pytest.mark.parametrize("stage", range(4))
def test_a_resume_draws_the_same_conclusions(kind, stage, data, tmp_path):
    # A loss that hardly falls goes above its median as often as below; a gradient norm does either way.
    nervous = {
        "loss": {"guards__loss_spike": 1.0, "optimizer__lr": 1e-6},
        "grad_norm": {"guards__grad_norm_spike": 0.7},
    }

    def settings(run):
        return runs.overrides(data, run, "qwen3", zero__stage=stage, **NERVOUS, **nervous[kind])

    reference, killed = tmp_path / "reference", tmp_path / "killed"
    runs.train(settings(reference), ranks=2)
    assert any(record["skipped"] for record in runs.metrics(reference))
    runs.train_and_kill(settings(killed), killed, at_step=25, ranks=2)
    runs.train(settings(killed), ranks=2, resume="auto")
    runs.assert_same_steps(killed, reference)


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The training processes below a launcher, by local rank."""
    found = {}
    for process in psutil.Process(launcher).children(recursive=True):
        line = process.cmdline()
        place = next((word for word in line if word.startswith("--local_rank=")), None)
        if place is not None and any(word.endswith("pretrain.py") for word in line[1:3]):
            found[int(place.partition("=")[2])] = process
    return [found[rank] for rank in sorted(found)]


def start(arguments: list[str], run: Path, at_step: int, ranks: int) -> tuple[subprocess.Popen, Path]:
    """A run under way that has reached `at_step`, and the file of its output."""
    log = run.with_suffix(".log")
    with open(log, "w") as output:
        process = subprocess.Popen(
            runs.command(arguments, ranks), env=runs.environment(ranks), stdout=output, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + 300
    while runs.last_step(run) < at_step:
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.01)
    return process, log


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(data, tmp_path):
    """What comes after the resume is what would have come."""
    reference, run = tmp_path / "reference", tmp_path / "run"
    settings = {"train__max_steps": 200, "checkpoint__every": 1000}
    process, log = start(runs.overrides(data, run, **settings), run, 5, ranks=2)
    try:
        ranks_of(process.pid)[1].send_signal(signal.SIGUSR1)
        assert process.wait(timeout=120) == STOPPED_EARLY, log.read_text()[-4000:]
    finally:
        process.kill()
    stopped_at = runs.last_step(run)
    assert 5 <= stopped_at < 200
    assert f"stopped behind step {stopped_at} of 200, which is saved: SIGUSR1 (rank 1)" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [f"step-{stopped_at}"]
    end = {**settings, "train__max_steps": stopped_at + 4, "optimizer__schedule": "constant"}
    runs.train(runs.overrides(data, run, **end), ranks=2, resume="auto")
    runs.train(runs.overrides(data, reference, **end), ranks=2)
    for mine, other in zip(runs.metrics(run)[stopped_at:], runs.metrics(reference)[stopped_at:], strict=True):
        assert mine["rows_sha256"] == other["rows_sha256"]
        assert mine["noise_sha256"] == other["noise_sha256"]


def test_marker_files_ask_for_a_checkpoint_and_for_the_end(data, tmp_path):
    run = tmp_path / "run"
    settings = runs.overrides(data, run, train__max_steps=2000, checkpoint__every=None)
    process, log = start(settings, run, 3, ranks=2)
    try:
        (run / "SAVE").touch()
        deadline = time.monotonic() + 120
        while (run / "SAVE").exists():
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.01)
        [saved] = list_checkpoints(run / "checkpoints")
        (run / "STOP").write_text("the disk is being moved")
        assert process.wait(timeout=120) == STOPPED_EARLY, log.read_text()[-4000:]
    finally:
        process.kill()
    stopped_at = runs.last_step(run)
    assert 3 <= step_of(saved) < stopped_at < 2000
    assert [step_of(path) for path in list_checkpoints(run / "checkpoints")] == [step_of(saved), stopped_at]
    assert f"behind step {stopped_at} of 2000, which is saved: {run}/STOP is there (rank 0)" in log.read_text()
    assert (run / "STOP").read_text() == "the disk is being moved"


def test_a_rank_that_stands_still_is_named_and_ends_the_run(data, tmp_path):
    run = tmp_path / "run"
    settings = runs.overrides(data, run, train__max_steps=2000, checkpoint__every=None, guards__hang_minutes=0.1)
    process, log = start(settings, run, 3, ranks=2)
    stopped = None
    try:
        stopped = ranks_of(process.pid)[1]
        stopped.suspend()
        deadline = time.monotonic() + 120
        while "(guards.hang_minutes)" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        assert f"rank 1 on {os.uname().nodename} (process {stopped.pid}) has given no sign of life" in log.read_text()
        stopped.kill()
        assert process.wait(timeout=120) != 0
    finally:
        if stopped is not None and stopped.is_running():
            stopped.kill()
        process.kill()
    stacks = (run / "heartbeats" / "rank-00000.stacks.txt").read_text()
    assert "loop.py" in stacks
