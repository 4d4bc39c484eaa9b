"""Files that are on the disk when the call returns: written at its speed, hashed on the way, and hashed again.

Large files go past the page cache (O_DIRECT). To copy a state into new pages of the cache takes as long as the disk
takes to write it, keeps a core busy that SHA-256 needs, and pushes the training data out of memory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

BLOCK_BYTES = 2**23
"""Written at a time; files smaller than that take the page cache."""
_IN_FLIGHT = 4
_HASHED_TOGETHER = 2
_READ_BYTES = 2**20  # stays in a core's cache between reading and hashing
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux alone has it


def write_files(folder: Path, contents: Mapping[str, Sequence[memoryview]]) -> dict[str, dict[str, Any]]:
    """Write new files {relative path: buffers} -> {relative path: {size, sha256}}; their bytes are durable on return.

    Threads hash the buffers meanwhile, so that a save takes as long as the slower of disk and hash. The folders are
    not synced: `fsync_folder`.
    """
    hashing = ThreadPoolExecutor(_HASHED_TOGETHER)
    try:
        digests = {name: hashing.submit(_sha256, buffers) for name, buffers in contents.items()}
        sizes = {name: _write_file(folder / name, buffers) for name, buffers in contents.items()}
        return {name: {"size": size, "sha256": digests[name].result()} for name, size in sizes.items()}
    finally:
        hashing.shutdown(cancel_futures=True)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes; `advance` hears of the bytes read."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            if advance is not None:
                advance(size)
    return digest.hexdigest()


def files_sha256(paths: Sequence[Path], advance: Callable[[int], None] | None = None) -> list[str]:
    """`file_sha256` of each, a few at a time."""
    lock = Lock()

    def tell(size: int) -> None:
        if advance is not None:
            with lock:
                advance(size)

    with ThreadPoolExecutor(_HASHED_TOGETHER) as hashing:
        return list(hashing.map(lambda path: file_sha256(path, tell), paths))


def _sha256(buffers: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for parts in _blocks(buffers):
        for part in parts:
            digest.update(part)
    return digest.hexdigest()


def _blocks(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The bytes of all buffers in blocks of BLOCK_BYTES, the last one smaller, each as the pieces that make it up."""
    parts: list[memoryview] = []
    room = BLOCK_BYTES
    for buffer in buffers:
        view = buffer.cast("B")
        while view:
            parts.append(view[:room])
            room -= len(parts[-1])
            view = view[len(parts[-1]) :]
            if room == 0:
                yield parts
                parts, room = [], BLOCK_BYTES
    if parts:
        yield parts


def _write_file(path: Path, buffers: Sequence[memoryview]) -> int:
    """Write one new file -> its size; durable on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(buffer.nbytes for buffer in buffers)
    with open(path, "xb", buffering=0) as file:
        if size < BLOCK_BYTES:
            _write_at(file.fileno(), b"".join(buffers), 0)
        else:
            _write_large(file.fileno(), buffers)
        os.fsync(file.fileno())
    return size


def _write_large(descriptor: int, buffers: Sequence[memoryview]) -> None:
    """Gather the bytes in aligned blocks, as O_DIRECT wants them; a few at a time are under way to the disk."""
    import numpy as np  # only here: `dlm checkpoint` starts without it. Its copies release the GIL, memoryview's do not

    spaces = deque(np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), dtype=np.uint8) for _ in range(_IN_FLIGHT))
    under_way: deque[Future[None]] = deque()
    offset = 0
    _bypass_cache(descriptor, True)
    with ThreadPoolExecutor(_IN_FLIGHT) as threads:
        for parts in _blocks(buffers):
            if len(under_way) == _IN_FLIGHT:
                under_way.popleft().result()
            space, size = spaces[0], 0
            spaces.rotate(-1)
            for part in parts:
                space[size : size + len(part)] = np.frombuffer(part, dtype=np.uint8)
                size += len(part)
            if size < BLOCK_BYTES:
                # The end of the file is not aligned.
                _finish(under_way)
                _bypass_cache(descriptor, False)
            under_way.append(threads.submit(_write_at, descriptor, space[:size].data, offset))
            offset += size
        _finish(under_way)


def _finish(writes: deque[Future[None]]) -> None:
    while writes:
        writes.popleft().result()


def _bypass_cache(descriptor: int, wanted: bool) -> None:
    """Switch O_DIRECT, where the file system has it: what is written is the same without."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT if wanted else flags & ~_O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _write_at(descriptor: int, block: memoryview | bytes, offset: int) -> None:
    """Write all of `block`; through the cache where the file system refuses this one as it is."""
    rest = memoryview(block)
    through_cache = False
    while rest:
        try:
            written = os.pwrite(descriptor, rest, offset)
        except OSError as error:
            # Blocks larger than a page, or what a short write has left of one.
            if error.errno != errno.EINVAL or through_cache:
                raise
            through_cache = True
            _bypass_cache(descriptor, False)
            continue
        rest = rest[written:]
        offset += written
