"""`dlm status` on a real run while it trains, after it is killed, and as other hosts see it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards import write_source
from data_pipeline.tokenizers import load
from dlm_dist.runs.status import read_status
from dlm_dist.training.chain import Chain, Outcome
from dlm_dist.training.lease import Owner
from tests.commands import dlm, mistake
from tests.distributed import runs

DAYS = 10**6
"""Steps that nobody waits for."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(folder, status while it trained) of a run of one rank that is killed behind its first checkpoint."""
    folder = tmp_path_factory.mktemp("status")
    tokenizer = load("bytes")
    rows = np.stack([tokenizer.encode(f"{i:06d} some text that is 32 byte!"[:32]) for i in range(24)])
    write_source(folder / "train", rows, tokenizer)
    (folder / "empty.yaml").write_text("{}\n")
    run = folder / "run"
    settings = runs.overrides(folder, run, "qwen3", train__max_steps=DAYS, train__gradient_accumulation_steps=1)
    program = str(runs.REPOSITORY / "launcher" / "pretrain.py")
    command = [sys.executable, program, "--config", str(folder / "empty.yaml")]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([*command, *settings], stdout=log, stderr=log, env=runs.environment(1))
    try:
        deadline = time.monotonic() + 240
        while runs.last_step(run) < 10 or not (run / "checkpoints" / "step-8").exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        status = read_status(run)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return run, status, process.pid


@pytest.fixture
def run(killed, tmp_path) -> Path:
    """A copy of the killed run."""
    return shutil.copytree(killed[0], tmp_path / "run", copy_function=shutil.copy2)


def change_lease(run: Path, **values) -> float:
    """Change what the lease says -> when its heart beat last."""
    (path,) = [path for path in (run / ".lease").iterdir() if path.name.isdecimal()]
    beat = path.stat().st_mtime
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    os.utime(path, (beat, beat))
    return beat


def test_a_run_that_trains(killed):
    _, status, process = killed
    assert status.state == "running"
    assert f"process {process} on {os.uname().nodename}" in status.why
    assert status.hosts == (os.uname().nodename,)
    assert (status.ranks, status.starts, status.max_steps) == (1, 1, DAYS)
    assert status.step >= 8
    assert status.checkpoint >= 8
    assert status.checkpoint % 4 == 0
    assert 0 <= status.checkpoint_age < 300
    assert status.behind == ()
    assert status.silent_for is None
    assert " of step " in status.phase


def test_the_rate_is_that_of_the_newest_steps_with_their_saves(killed, run):
    _, status, _ = killed
    assert status.seconds_left == pytest.approx(status.seconds_per_step * (DAYS - status.step))
    records = runs.metrics(run)[-100:]
    seconds = sum(record["step_seconds"] for record in records)
    between = sum(record["save_seconds"] + record["evaluation_seconds"] for record in records[1:])
    assert between > 0
    assert read_status(run).seconds_per_step == pytest.approx((seconds + between) / len(records))


def test_a_run_that_was_killed(killed, run, capsys):
    status = read_status(run)
    assert status.state == "killed"
    assert 0 < status.silent_for < 300
    assert (status.seconds_left, status.phase, status.asked) == (None, None, ())
    assert dlm("status", run) == 0
    text = capsys.readouterr().out
    assert "run: killed (it was process" in text
    assert "last sign of life" in text
    assert f"newest checkpoint: step-{status.checkpoint}, written" in text
    assert dlm("status", run.parent, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["state"], found["step"], found["checkpoint"]) == ("killed", status.step, status.checkpoint)


@pytest.mark.parametrize(("later", "state"), [(60.0, "running"), (119.0, "running"), (121.0, "silent")])
def test_from_another_host_its_heart_must_beat(run, later, state):
    now = change_lease(run, host="elsewhere") + later
    status = read_status(run, now)
    assert status.state == state
    assert (status.silent_for is not None) == (state == "silent")
    assert "on elsewhere" in status.why


def test_a_run_that_has_not_come_to_its_first_step(run):
    since = max(beat.stat().st_mtime for beat in (run / "heartbeats").iterdir()) + 5.0
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(since))
    now = change_lease(run, host="elsewhere", since=stamp)
    assert read_status(run, now + 1.0).state == "starting"


def test_ranks_that_are_behind_or_silent(run):
    now = change_lease(run, host="elsewhere")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["starts"][-1]["topology"]["world_size"] = 3
    (run / "manifest.json").write_text(json.dumps(manifest))
    beat = {"interval": 15.0, "seconds_in_phase": 7.0, "time": now, "phase": "backward", "step": 40}

    def write(rank: int, **changes) -> None:
        record = {**beat, "rank": rank, "host": f"n{rank}", "pid": 100 + rank, **changes}
        (run / "heartbeats" / f"rank-{rank:05d}.json").write_text(json.dumps(record))

    for rank in range(4):  # the last one is of an earlier start with more ranks
        write(rank, step=1 if rank == 3 else 40)
    (run / "SAVE").touch()
    status = read_status(run, now + 1.0)
    assert status.asked == ("for a checkpoint now (SAVE)",)
    assert (status.hosts, status.behind) == (("n0", "n1", "n2"), ())
    write(1, step=39, phase="data")
    status = read_status(run, now + 1.0)
    assert status.behind == ("rank 1 on n1 (process 101) is in the phase data of step 40 for 7 s",)
    assert status.phase == "data of step 40 for 7 s"
    write(1, time=now - 100.0)
    assert read_status(run, now).behind == ("rank 1 on n1 (process 101) has given no sign of life for 100 s",)


def test_why_a_run_has_ended(run):
    change_lease(run, released=True)
    assert "it ended by itself, and its log says why" in read_status(run).why
    (run / "STOP").write_text("3 attempts in a row made no new checkpoint\n")
    status = read_status(run)
    assert (status.state, status.why) == ("stopped", "STOP is there: 3 attempts in a row made no new checkpoint")
    (run / "DONE").touch()
    assert read_status(run).state == "finished"


def test_a_run_that_its_watchdog_ended(run):
    (run / "heartbeats" / "rank-00000.stacks.txt").touch()
    status = read_status(run)
    assert status.state == "stopped"
    assert "its watchdog ended it: the stacks of rank-00000 are in" in status.why


def test_the_last_step_is_the_end(run):
    change_lease(run, released=True)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["starts"][-1]["max_steps"] = read_status(run).checkpoint
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert read_status(run).state == "finished"


def test_what_the_chain_of_jobs_knows(run, capsys):
    chain = Chain(run)
    for name in ("7_0", "7_1"):
        chain.begin(name, ["n1", "n2"])
        chain.end(name, Outcome(1, {"n2": "a rank ended with status 1: no\nGPU"}), told=False)
    assert dlm("status", run) == 0
    text = capsys.readouterr().out
    assert "  attempt 7_1 on n1,n2 ended with status 1; node n2: a rank ended with status 1: no\n" in text
    assert "  left out from now on: n2\n" in text
    chain.begin("7_2", ["n1"])
    assert read_status(run).attempt == "attempt 7_2 on n1 was killed, or its node died"
    now = change_lease(run, host="elsewhere")
    assert read_status(run, now).attempt is None


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert "is no run (no config.yaml)" in mistake(capsys, "status", tmp_path)


def test_another_process_of_that_number_is_not_the_run(run, monkeypatch):
    """Process numbers are used again: the lease names when its process started."""
    change_lease(run, process=os.getpid())
    assert read_status(run).state == "killed"
    change_lease(run, process=os.getpid(), started=Owner.this_process().started)
    assert read_status(run).state in ("running", "starting")


def test_a_run_that_never_came_to_its_first_step_says_why(tmp_path, capsys):
    """The first night of a user: three attempts that failed before there was a config.yaml."""
    chain = Chain(tmp_path / "run")
    for name in ("1_0", "1_1", "1_2"):
        chain.begin(name, ("n1", "n2"))
        chain.end(name, Outcome(1), False)
    chain.give_up("3 attempts in a row made no new checkpoint")
    assert dlm("status", tmp_path) == 0
    said = capsys.readouterr().out
    assert "run: stopped (STOP is there: 3 attempts in a row made no new checkpoint)" in said
    assert "no checkpoint yet" in said
