"""A disk that is full at each stage of a save: one sentence, older checkpoints intact, and on once there is room.

The disk is a small tmpfs, on which space is given in pages: with room for all files but the last pages of one, it is
that one which fails. It holds the checkpoints only, or the whole folder of the run.
"""

import errno
import math
import os
import subprocess
import time
from pathlib import Path

import pytest

from dlm_dist.training import checkpoint_files
from tests.distributed import runs
from tests.faults import small_run, starts

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]

GROUP = "Full disks"
PAGE = os.sysconf("SC_PAGESIZE")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run left alone, and a run up to small_run.SAVED."""
    folder = tmp_path_factory.mktemp("whole")
    return small_run.left_alone(data, folder), small_run.prepared(data, folder)


@pytest.fixture
def mount():
    """Put a tmpfs of eight megabytes at a folder."""
    places = []

    def at(place):
        place.mkdir(parents=True)
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True)
        if made.returncode:
            pytest.skip("only root can mount a small file system")
        places.append(place)

    yield at
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def leave_pages(place, pages):
    """Fill the disk at `place` but for so many pages -> the file to remove."""
    space = os.statvfs(place)
    ballast = place / "ballast"
    ballast.write_bytes(bytes((space.f_bavail - pages) * space.f_bsize))
    assert os.statvfs(place).f_bavail == pages
    return ballast


def pages_before(checkpoint, name):
    """Pages of the files that are written before `name`, and all but the last one of its own."""
    files = sorted((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    names = [path.relative_to(checkpoint).as_posix() for path in files]
    sizes = [math.ceil(path.stat().st_size / PAGE) for path in files]
    return sum(sizes[: names.index(name) + 1]) - 1


def with_checkpoints_on(mount, before, folder):
    """A copy of the run `before` whose checkpoints are on a small disk of their own."""
    run = folder / "run"
    mount(run / "checkpoints")
    subprocess.run(["cp", "-a", f"{before}/.", str(run)], check=True)
    subprocess.run(["rm", "-r", str(run / ".lease")], check=True)
    return run


def fail_and_go_on(run, data, reference, make_room, prepare=None):
    """Start on the full disk, and again when there is room -> what the first one said."""
    folder = run / "checkpoints"
    found = small_run.contents(folder)
    settings = small_run.arguments(data, run)
    statuses, output = starts.to_the_end(settings, "auto", run.parent / "full.log", prepare=prepare)
    assert statuses == [2], output
    assert "Traceback" not in output
    assert small_run.contents(folder) == found, "the older checkpoints are what they were, and nothing is left beside"
    assert [path.name for path in folder.glob(".step-*")] == []
    make_room()
    statuses, second = starts.to_the_end(settings, "auto", run.parent / "room.log")
    assert statuses == [0], second
    assert f"resuming from {folder / f'step-{small_run.SAVED}'}" in second
    small_run.assert_same_end(run, reference)
    (said,) = [line for line in output.splitlines() if "pretrain: error" in line]
    return told(said, run)


def told(line, run):
    """A message without what differs from one machine to the next."""
    return line.partition("error: ")[2].replace(f"{run}/", "").replace(str(run), "RUN")


@pytest.mark.parametrize(
    "name",
    [
        "tensors/rank-00000.safetensors",
        "tensors/rank-00000.json",
        "model/model.safetensors",
        "model/config.json",
        "trainer_state.json",
        "tokenizer/dlm_tokenizer.json",
        "manifest.json",
    ],
)
def test_no_room_for_a_file(name, mount, whole, data, tmp_path, report):
    reference, before = whole
    run = with_checkpoints_on(mount, before, tmp_path)
    ballast = leave_pages(run / "checkpoints", pages_before(before / "checkpoints" / "step-4", name))
    said = fail_and_go_on(run, data, reference, ballast.unlink)
    assert "checkpoint step-6 could not be written: rank 0: " in said
    assert "No space left on device" in said
    report.case(GROUP, f"no room for the end of `{name}`", said)


def test_no_room_for_the_staging_folder(mount, whole, data, tmp_path, report):
    """The disk has no inode left."""
    reference, before = whole
    run = with_checkpoints_on(mount, before, tmp_path)
    folder = run / "checkpoints"
    space = os.statvfs(folder)

    def inodes(number):
        subprocess.run(["mount", "-o", f"remount,nr_inodes={number}", str(folder)], check=True)

    inodes(space.f_files - space.f_ffree)
    said = fail_and_go_on(run, data, reference, lambda: inodes(space.f_files))
    assert "checkpoint step-6 could not be written" in said
    assert "No space left on device" in said
    report.case(GROUP, "no room for the staging folder (no inode left)", said)


def refuse_rename():
    """A disk that has no room for the new name; a tmpfs always has, so this error is made."""
    real = Path.rename

    def rename(path, target):
        if path.name.endswith(".writing"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, target)

    Path.rename = rename


def test_no_room_for_the_new_name(whole, data, tmp_path, report):
    reference, before = whole
    run = small_run.copy(before, tmp_path / "run")
    said = fail_and_go_on(run, data, reference, lambda: None, refuse_rename)
    assert "checkpoint step-6 could not be written" in said
    report.case(GROUP, "no room for the new name (injected error of `rename`)", said)


def test_the_disk_of_the_run_is_full_at_its_start(mount, whole, data, tmp_path, report):
    """Not even the lease can be written; the next start need not wait for it."""
    reference, before = whole
    run = tmp_path / "run"
    mount(run)
    subprocess.run(["cp", "-a", f"{before}/.", str(run)], check=True)
    ballast = leave_pages(run, 0)
    said = fail_and_go_on(run, data, reference, ballast.unlink)
    assert "cannot be used" in said
    assert "waiting" not in (tmp_path / "room.log").read_text()
    report.case(GROUP, "the run's whole folder, before the start", said)


LONG = {"train__max_steps": 120, "checkpoint__every": 25}


@pytest.fixture(scope="module")
def long_reference(data, tmp_path_factory):
    """A run of more steps, left alone."""
    return small_run.left_alone(data, tmp_path_factory.mktemp("long"), **LONG)


@pytest.mark.parametrize("pages", [0, 20])
def test_the_disk_of_the_run_fills_up(pages, mount, whole, long_reference, data, tmp_path, report):
    """While it trains: metrics, heartbeats, checkpoints and the lease meet a full disk, whichever comes first."""
    run = tmp_path / "run"
    mount(run)
    subprocess.run(["cp", "-a", f"{whole[1]}/.", str(run)], check=True)
    settings = small_run.arguments(data, run, **LONG)
    start = starts.begin("forked", settings, "auto", tmp_path / "full.log")
    while "\nstep 30/" not in start.output() and start.running():
        time.sleep(0.001)
    ballast = leave_about(run, pages)
    statuses = start.wait()
    output = start.output()
    assert statuses == [2], output
    assert "Traceback" not in output
    assert "No space left on device" in output
    newest = checkpoint_files.list_checkpoints(run / "checkpoints")
    assert [checkpoint_files.verify(path) for path in newest] == [[]] * len(newest)
    ballast.unlink()
    statuses, second = starts.to_the_end(settings, "auto", tmp_path / "room.log")
    assert statuses == [0], second
    assert f"resuming from {newest[-1]}" in second
    assert "waiting" not in second
    runs.assert_same_steps(run, long_reference)
    (said,) = [line for line in output.splitlines() if "pretrain: error" in line]
    assert "metrics.jsonl: " in said or "checkpoint step-" in said
    report.case(GROUP, f"the run's whole folder while it trains, {pages} pages left", told(said, run))


def leave_about(place, pages):
    """As leave_pages, while others write."""
    ballast = place / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        while (free := os.statvfs(place).f_bavail) > pages:
            file.write(bytes(min(free - pages, 256) * PAGE))
    return ballast
