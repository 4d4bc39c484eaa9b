import errno
import fcntl
import hashlib
import os
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_dist.training import durable_files
from dlm_dist.training.durable_files import file_sha256, write_files

BLOCK = 8192


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(durable_files, "BLOCK_BYTES", BLOCK)


def buffers(*sizes):
    return [memoryview(bytes((i * 31 + size) % 251 for i in range(size))) for size in sizes]


def write(folder, parts):
    found = write_files(folder, {"sub/file": parts})
    content = (folder / "sub/file").read_bytes()
    assert content == b"".join(parts)
    assert found == {"sub/file": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    assert file_sha256(folder / "sub/file") == found["sub/file"]["sha256"]


@given(st.lists(st.integers(0, 3 * BLOCK), max_size=6))
@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize("edge", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 9 * BLOCK])
def test_the_file_is_its_buffers_one_after_another(edge, sizes):
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), buffers(edge, *sizes))


def test_read_only_and_typed_buffers_are_taken_as_bytes(tmp_path):
    tensor = torch.arange(3 * BLOCK, dtype=torch.int64)
    written = write_files(tmp_path, {"x": [tensor.numpy().data, memoryview(b"end")]})
    assert (tmp_path / "x").read_bytes() == tensor.numpy().tobytes() + b"end"
    assert written["x"]["size"] == 24 * BLOCK + 3


def test_a_file_that_is_there_is_never_written_over(tmp_path):
    write(tmp_path, buffers(10))
    with pytest.raises(FileExistsError):
        write_files(tmp_path, {"sub/file": buffers(20)})


class Writes:
    """Every os.pwrite: (is it past the cache, size); `change` may do it another way."""

    def __init__(self, monkeypatch, change=None):
        self.seen = []
        real, lock = os.pwrite, threading.Lock()

        def instead(descriptor, block, offset):
            direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
            with lock:
                self.seen.append((direct, len(block)))
            return (change or (lambda real, direct, *arguments: real(*arguments)))(
                real, direct, descriptor, block, offset
            )

        monkeypatch.setattr("os.pwrite", instead)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="Linux alone has O_DIRECT")
class TestPastTheCache:
    def test_whole_blocks_go_past_it_the_end_and_small_files_do_not(self, tmp_path, monkeypatch):
        probe = os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY)
        try:
            fcntl.fcntl(probe, fcntl.F_SETFL, os.O_DIRECT)
        except OSError:
            pytest.skip("the file system of the temporary folder has no O_DIRECT")
        finally:
            os.close(probe)
        writes = Writes(monkeypatch)
        write(tmp_path, buffers(3 * BLOCK, 5))
        assert sorted(writes.seen) == [(False, 5), *[(True, BLOCK)] * 3]
        writes.seen.clear()
        write_files(tmp_path, {"small": buffers(BLOCK - 1)})
        assert writes.seen == [(False, BLOCK - 1)]

    def test_a_file_system_without_it_is_written_through_the_cache(self, tmp_path, monkeypatch):
        real = fcntl.fcntl

        def refusing(descriptor, command, value=0):
            if command == fcntl.F_SETFL and value & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(descriptor, command, value)

        monkeypatch.setattr("fcntl.fcntl", refusing)
        writes = Writes(monkeypatch)
        write(tmp_path, buffers(3 * BLOCK, 5))
        assert {direct for direct, _ in writes.seen} == {False}

    def test_blocks_that_are_refused_are_written_through_the_cache(self, tmp_path, monkeypatch):
        """As where the file system wants larger alignment than a page."""

        def refusing(real, direct, descriptor, block, offset):
            if direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(descriptor, block, offset)

        Writes(monkeypatch, refusing)
        write(tmp_path, buffers(9 * BLOCK, 5))

    def test_short_writes_are_gone_on_with(self, tmp_path, monkeypatch):
        def short(real, direct, descriptor, block, offset):
            return real(descriptor, block[: max(1, len(block) // 3)], offset)

        Writes(monkeypatch, short)
        write(tmp_path, buffers(9 * BLOCK, 500))

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EINVAL])
    def test_what_the_disk_says_is_raised(self, code, tmp_path, monkeypatch):
        def broken(real, direct, descriptor, block, offset):
            if offset == 4 * BLOCK:
                raise OSError(code, os.strerror(code))
            return real(descriptor, block, offset)

        Writes(monkeypatch, broken)
        with pytest.raises(OSError, match=os.strerror(code)):
            write(tmp_path, buffers(9 * BLOCK))
