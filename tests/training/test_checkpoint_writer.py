"""A save in a thread: the state of the moment it began, one at a time, published only when every file is on disk."""

import contextlib
import json
import os
import subprocess
import threading

import pytest
import torch
from safetensors.torch import load_file

from dlm_dist.training import checkpoint_files, checkpoint_writer, durable_files
from dlm_dist.training.checkpoint_files import CheckpointError
from dlm_dist.training.checkpoint_snapshot import HostBuffers, Snapshot, take_snapshot
from dlm_dist.training.checkpoint_writer import CheckpointWriter
from dlm_dist.training.lease import LeaseError
from tests.training.conftest import run_steps, tiny_engine


def snapshot(step, value=0.0):
    """A few files of every kind; `value` in each tensor."""
    return Snapshot(
        step,
        {
            "tensors/rank-00000.safetensors": {"a/master": torch.full((300,), value), "a/state": torch.ones(7)},
            "model/model.safetensors": {"weight": torch.full((10, 3), value)},
        },
        {"trainer_state.json": json.dumps({"global_step": step}).encode(), "tokenizer/tokenizer.json": b"{}"},
    )


@pytest.fixture
def writer(tmp_path):
    one = CheckpointWriter(tmp_path / "checkpoints", keep_last=2)
    yield one
    one.close()


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until the gate is set."""
    gate = threading.Event()

    def write_files(*arguments):
        assert gate.wait(30)
        return durable_files.write_files(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_files", write_files)
    yield gate
    gate.set()


def published(tmp_path):
    return [path.name for path in checkpoint_files.list_checkpoints(tmp_path / "checkpoints")]


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [
        (0, "fp32", "adamw"),
        (0, "bf16", "lion8bit"),
        (1, "bf16", "adamw8bit"),
        (2, "fp32", "adamw"),
        (3, "bf16", "adamw"),
    ],
)
def test_what_is_written_is_the_state_that_was_copied(stage, precision, optimizer, tmp_path, gate):
    """Steps taken while the files are written do not reach them, and the buffers serve the next save too."""
    engine, _ = tiny_engine(f"zero.stage={stage}", f"train.precision={precision}", f"optimizer.name={optimizer}")
    waiting, together = CheckpointWriter(tmp_path / "waiting"), CheckpointWriter(tmp_path / "together")
    for step in (1, 2):
        run_steps(engine, 3 * step, 2)
        gate.set()
        together.start(take_snapshot(engine, step, {"global_step": step}, {}))
        together.finish()
        gate.clear()
        waiting.start(take_snapshot(engine, step, {"global_step": step}, {}, waiting.buffers))
        run_steps(engine, 3 * step + 2, 1)
        assert not waiting.ready()
        gate.set()
        waiting.finish()
    for step in (1, 2):
        one, other = tmp_path / "waiting" / f"step-{step}", tmp_path / "together" / f"step-{step}"
        assert checkpoint_files.verify(one) == []
        assert checkpoint_files.read_manifest(one) == checkpoint_files.read_manifest(other)
    assert checkpoint_files.read_manifest(one) != checkpoint_files.read_manifest(one.with_name("step-1"))
    for each in (waiting, together):
        each.close()


def test_buffers_are_used_again():
    buffers = HostBuffers()
    first = buffers.copy("a", torch.ones(5))
    second = buffers.copy("a", torch.zeros(5))
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(first, torch.zeros(5))
    assert buffers.copy("a", torch.ones(6)).shape == (6,)
    assert buffers.copy("b", torch.ones(6)).data_ptr() != buffers.copy("a", torch.ones(6)).data_ptr()


def test_the_stages_of_a_save(writer, tmp_path, gate):
    """Written, agreed, published, agreed; nothing named step-N before that."""
    assert not writer.ready()
    writer.start(snapshot(4))
    folder = tmp_path / "checkpoints"
    (staging,) = folder.iterdir()
    assert staging.name.startswith(".step-4.")
    assert staging.name.endswith(".writing")
    assert not writer.ready()
    with pytest.raises(AssertionError, match="in flight"):
        writer.start(snapshot(5))
    gate.set()
    writer.advance()
    writer.advance()
    assert published(tmp_path) == ["step-4"]
    assert [path.name for path in folder.iterdir()] == ["step-4"]
    assert not writer.ready()
    writer.finish()
    assert checkpoint_files.verify(folder / "step-4") == []
    assert torch.equal(load_file(folder / "step-4" / "model" / "model.safetensors")["weight"], torch.zeros(10, 3))


def test_close_waits_but_publishes_nothing(writer, tmp_path, gate):
    writer.start(snapshot(4))
    threading.Timer(0.1, gate.set).start()
    writer.close()
    assert published(tmp_path) == []
    (staging,) = (tmp_path / "checkpoints").iterdir()
    assert (staging / "trainer_state.json").is_file()
    checkpoint_files.sweep(tmp_path / "checkpoints")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_an_error_in_the_thread_is_raised_at_the_next_border(writer, tmp_path, monkeypatch):
    writer.start(snapshot(2))
    writer.finish()

    def broken(*arguments):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(checkpoint_writer, "write_files", broken)
    writer.start(snapshot(4))
    with pytest.raises(CheckpointError, match=r"step-4 could not be written: rank 0: KeyError: .*mistake") as caught:
        writer.advance()
    assert isinstance(caught.value.__cause__, KeyError)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    monkeypatch.undo()
    writer.start(snapshot(6))
    writer.finish()
    assert published(tmp_path) == ["step-2", "step-6"]


def test_a_run_that_lost_its_folder_publishes_nothing(tmp_path):
    def guard():
        raise LeaseError("taken over")

    writer = CheckpointWriter(tmp_path / "checkpoints", guard=guard)
    writer.start(snapshot(2))
    with pytest.raises(CheckpointError, match="step-2 could not be written: rank 0: taken over"):
        writer.finish()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    writer.close()


CALLS = ("open", "mkdir", "pwrite", "fsync", "rename", "unlink", "rmdir")


class Faults:
    """Counts what reaches the file system through `os` and strikes at one call."""

    def __init__(self, monkeypatch, at=None, strike=None):
        self.made = []
        self.lock = threading.Lock()
        for name in CALLS:
            monkeypatch.setattr(f"os.{name}", self.counted(name, getattr(os, name), at, strike))

    def counted(self, name, call, at, strike):
        def instead(*arguments, **named):
            with self.lock:
                self.made.append(name)
                now = len(self.made) - 1 == at
            if now:
                strike()
            return call(*arguments, **named)

        return instead


def save_after(tmp_path, step):
    writer = CheckpointWriter(tmp_path / "checkpoints", keep_last=1)
    try:
        writer.start(snapshot(step, float(step)))
        writer.finish()
    finally:
        writer.close()


def number_of_calls(tmp_path):
    save_after(tmp_path, 2)
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch)
        save_after(tmp_path, 4)
    assert {"mkdir", "pwrite", "fsync", "rename", "unlink"} <= set(faults.made)
    return len(faults.made)


def whole_ones(tmp_path):
    """The steps that verify, and whether any folder that says it is a checkpoint does not."""
    paths = checkpoint_files.list_checkpoints(tmp_path / "checkpoints")
    whole = [checkpoint_files.step_of(path) for path in paths if not checkpoint_files.verify(path)]
    return whole, len(whole) < len(paths)


def test_a_disk_that_is_full_at_any_moment_harms_nothing(tmp_path):
    """Every call of a save that reaches the file system fails once: one sentence, and what was saved stays whole."""
    total = number_of_calls(tmp_path / "count")
    said = set()
    for at in range(total):
        place = tmp_path / str(at)
        save_after(place, 2)

        def full():
            raise OSError(28, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, at, full)
            try:
                save_after(place, 4)
            except CheckpointError as error:
                said.add(str(error).replace(str(place), ""))
        whole, damaged = whole_ones(place)
        assert whole
        assert not damaged
        checkpoint_files.sweep(place / "checkpoints")
        save_after(place, 6)
        assert whole_ones(place) == ([6], False)
    assert any("could not be written" in text for text in said)
    assert any("older checkpoints could not be removed" in text for text in said)
    assert all("No space left on device" in text for text in said)


class KilledError(BaseException):
    """Stands for the end of the process: nothing that is ours may handle it."""


def test_a_kill_at_any_moment_harms_nothing(tmp_path):
    """The files as they are when the process ends at any call, all calls of the other threads included."""
    total = number_of_calls(tmp_path / "count")
    for at in range(total):
        place = tmp_path / str(at)
        save_after(place, 2)

        def kill():
            raise KilledError

        with pytest.MonkeyPatch.context() as patch:
            # Everything after the blow fails too: a dead process cleans nothing up.
            dead = Faults(patch)
            for name in CALLS:
                patch.setattr(f"os.{name}", after(dead, at, kill, getattr(os, name)))
            with contextlib.suppress(KilledError, CheckpointError):
                save_after(place, 4)
        whole, damaged = whole_ones(place)
        assert whole
        assert not damaged
        checkpoint_files.sweep(place / "checkpoints")
        assert all(path.name.startswith("step-") for path in (place / "checkpoints").iterdir())
        save_after(place, 6)
        assert whole_ones(place) == ([6], False)


def after(faults, at, kill, call):
    def instead(*arguments, **named):
        if len(faults.made) >= at:
            kill()
        return call(*arguments, **named)

    return instead


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("free", [0, 4096, 40960])
def test_a_real_disk_that_is_full(small_disk, free):
    """Not a byte, a few files, a part of the large one: asynchronous, told at the border, nothing left behind."""
    writer = CheckpointWriter(small_disk / "checkpoints")

    def save(what):
        writer.start(what)
        writer.finish()

    save(snapshot(2))
    space = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(space.f_bavail * space.f_bsize - free))
    large = snapshot(4)
    large.tensors["tensors/rank-00000.safetensors"]["a/large"] = torch.zeros(20_000)
    with pytest.raises(CheckpointError, match=r"step-4 could not be written: .*No space left on device"):
        save(large)
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-2"]
    (small_disk / "ballast").unlink()
    save(large)
    writer.close()
    assert whole_ones(small_disk) == ([2, 4], False)
