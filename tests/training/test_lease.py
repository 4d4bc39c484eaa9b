"""One run per folder, with real processes: refused while the owner lives, taken at once when it is dead."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dlm_dist.training.lease import Lease, LeaseError, Owner

REPOSITORY = Path(__file__).resolve().parents[2]

# Starts, says "ready", and at a line on standard input takes the folder; keeps it until standard input ends.
PROGRAM = """
import sys
from pathlib import Path
from dlm_dist.training.lease import Lease, LeaseError
print("ready", flush=True)
sys.stdin.readline()
try:
    lease = Lease(Path(sys.argv[1]))
except LeaseError as error:
    print(error, flush=True)
else:
    print("mine", flush=True)
    sys.stdin.read()
    lease.release()
"""


class Other:
    """A process that takes a folder."""

    def __init__(self, run_dir, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(run_dir)],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def go(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def answer(self):
        return self.process.stdout.readline().strip()

    def end(self):
        self.process.communicate(timeout=60)


@pytest.fixture
def other(tmp_path):
    started = []

    def start(run_dir=tmp_path, go=True, **environment):
        one = Other(run_dir, **environment)
        started.append(one)
        if go:
            one.go()
        return one

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.fixture
def take(tmp_path):
    """Take the folder with short times; what was told is in take.told."""
    leases = []

    def call(expiry=0.5, heartbeat=0.05):
        lease = Lease(tmp_path, expiry, heartbeat, call.told.append)
        leases.append(lease)
        return lease

    call.told = []
    yield call
    for lease in leases:
        lease.release()


def leases(run_dir):
    return sorted(int(path.name) for path in (run_dir / ".lease").iterdir() if path.name.isdecimal())


def foreign(run_dir, **changes):
    """A lease that a process of another host left, or one with the `changes`; its file."""
    (run_dir / ".lease").mkdir(exist_ok=True)
    path = run_dir / ".lease" / "7"
    owner = replace(Owner.this_process(), **({"host": "elsewhere"} | changes))
    path.write_text(json.dumps(asdict(owner)))
    return path


def test_the_second_is_refused_by_name(other, tmp_path, take):
    first = other(SLURM_JOB_ID="4711")
    assert first.answer() == "mine"
    with pytest.raises(LeaseError, match=rf"is in use by process {first.process.pid} on .*, job 4711, since 20"):
        take()
    content = json.loads((tmp_path / ".lease" / "1").read_text())
    assert {"host", "boot", "process", "started", "job"} <= content.keys()
    first.end()
    take()
    assert leases(tmp_path) == [2]
    assert take.told == []


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_is_followed_at_once(other, take, reaped):
    first = other()
    assert first.answer() == "mine"
    first.process.send_signal(signal.SIGKILL)
    if reaped:
        first.process.wait()
    else:
        os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)
    take(expiry=1000)
    assert take.told == []


@pytest.mark.parametrize("state", ["fresh", "released", "dead"])
def test_of_many_at_once_one_wins(other, tmp_path, state):
    for _ in range(2):
        if state != "fresh":
            before = other()
            assert before.answer() == "mine"
            if state == "released":
                before.end()
            else:
                before.process.kill()
                before.process.wait()
        starters = [other(go=False) for _ in range(5)]
        for one in starters:
            one.go()
        answers = [one.answer() for one in starters]
        winners = [one for one, answer in zip(starters, answers, strict=True) if answer == "mine"]
        assert len(winners) == 1, answers
        for one, answer in zip(starters, answers, strict=True):
            if one is not winners[0]:
                assert f"is in use by process {winners[0].process.pid} on" in answer
        for one in starters:
            one.end()


def test_a_process_number_used_again_is_another_process(tmp_path, take):
    foreign(tmp_path, host=Owner.this_process().host, started="1")
    take(expiry=1000)
    assert leases(tmp_path) == [8]


@pytest.mark.parametrize("changes", [{}, {"host": Owner.this_process().host, "namespace": "a container"}])
def test_a_process_elsewhere_is_known_by_its_heart(tmp_path, take, changes):
    path = foreign(tmp_path, **changes)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            os.utime(path)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(LeaseError, match="is in use by process"):
            take(expiry=1000)
    finally:
        stop.set()
        heart.join()
    # The heart stands still, and the dead is waited for but not for ever.
    take(expiry=0.5)
    assert "waiting for at most" in take.told[-1]
    assert leases(tmp_path) == [8]


def test_a_heart_that_stopped_long_ago_is_not_waited_for(tmp_path, take):
    path = foreign(tmp_path)
    os.utime(path, (1e9, 1e9))
    take(expiry=1000)
    assert take.told == []


@pytest.mark.parametrize("content", ["", "[]", '{"host": 1}'])
def test_a_lease_that_says_nothing_is_known_by_its_heart_too(tmp_path, take, content):
    foreign(tmp_path).write_text(content)
    take(expiry=0.3)
    assert len(take.told) == 1


def test_a_late_starter_with_an_old_number_does_not_win(tmp_path, take, monkeypatch):
    """It looked before others came and went; the number it then creates is free again, and yet it must not own."""
    owner = take()
    owner._path = owner._path.rename(owner._path.with_name("5"))
    looks = ["nothing there yet"]
    real = Lease._newest

    def newest(self):
        return real(self) if self is owner or not looks else looks.clear()

    monkeypatch.setattr(Lease, "_newest", newest)
    with pytest.raises(LeaseError, match="is in use"):
        take()
    assert looks == []
    assert leases(tmp_path) == [5]
    owner.require()


def test_an_owner_that_was_taken_over_learns_of_it(tmp_path, take):
    owner = take(heartbeat=1000)
    owner.require()
    (tmp_path / ".lease" / "2").write_text((tmp_path / ".lease" / "1").read_text())
    with pytest.raises(LeaseError, match=r"was taken over by process .* it stops here"):
        owner.require()
    owner.release()
    assert "released" in json.loads((tmp_path / ".lease" / "2").read_text())
    assert json.loads((tmp_path / ".lease" / "2").read_text())["released"] is False


def test_the_heart_notices_it_alone(tmp_path, take):
    owner = take(heartbeat=0.01)
    foreign(tmp_path)
    owner._thread.join(30)
    assert "taken over" in owner.lost


def test_a_full_disk_leaves_no_lease_to_wait_for(tmp_path, take, monkeypatch):
    """Neither one that could not be written, nor one that could not be marked as released."""

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dlm_dist.training.lease.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            take()
    beat = (tmp_path / ".lease" / "1").stat().st_mtime
    (tmp_path / ".lease" / "1").write_text("")  # what a full disk leaves of it
    os.utime(tmp_path / ".lease" / "1", (beat, beat))
    lease = take(expiry=1000)
    with monkeypatch.context() as patch:
        patch.setattr("dlm_dist.training.lease._write_over", full)
        lease.release()
    assert take.told == []
