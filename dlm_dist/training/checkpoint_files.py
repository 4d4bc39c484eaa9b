"""checkpoints/step-N as files: written durably, published by one rename, listed, verified.

Layout and protocol are specified in docs/checkpoint-format.md. Needs neither torch nor other ranks, so that
`dlm checkpoint` starts at once; what is collective is in checkpoint.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
_READ_BY_NAME = ("model", "tokenizer", "tensors")
_INDEX = ".safetensors.index.json"
_STEP_FOLDER = re.compile(r"step-(\d+)")
_BLOCK_BYTES = 2**24
_FLUSH_BYTES = 2**26


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or does not fit the run."""


# --- finding ---------------------------------------------------------------------------------------------------


def step_of(path: Path) -> int | None:
    """The N of a folder named step-N; None for any other name."""
    match = _STEP_FOLDER.fullmatch(path.name)
    return int(match.group(1)) if match else None


def step_folders(folder: Path) -> list[Path]:
    """Everything below `folder` (RUN/checkpoints) that is named step-N, oldest first, published or not."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if step_of(path) is not None), key=lambda path: step_of(path) or 0)


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints below `folder` (RUN/checkpoints), oldest first."""
    return [path for path in step_folders(folder) if (path / MANIFEST).is_file()]


def load_trainer_state(path: Path) -> dict[str, Any]:
    """trainer_state.json of a verified checkpoint."""
    state: dict[str, Any] = json.loads((path / TRAINER_STATE).read_bytes())
    return state


# --- writing ---------------------------------------------------------------------------------------------------


def write_files(folder: Path, contents: Mapping[str, Sequence[memoryview]]) -> dict[str, dict[str, Any]]:
    """Write files {relative path: buffers} -> {relative path: {size, sha256}}; durable on return.

    Two threads work beside this one, so that a save takes as long as the slowest of the three: one hashes, one asks
    the disk to take what is written so far, of which a file system would else keep much until the end.
    """
    hashing, flushing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    try:
        digests = {name: hashing.submit(_sha256, buffers) for name, buffers in contents.items()}
        sizes = {name: _write_file(folder / name, buffers, flushing) for name, buffers in contents.items()}
        return {name: {"size": size, "sha256": digests[name].result()} for name, size in sizes.items()}
    finally:
        for threads in (hashing, flushing):
            threads.shutdown(cancel_futures=True)


def _blocks(buffers: Sequence[memoryview]) -> Iterator[memoryview]:
    for buffer in buffers:
        view = buffer.cast("B")
        for start in range(0, len(view), _BLOCK_BYTES):
            yield view[start : start + _BLOCK_BYTES]


def _sha256(buffers: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for block in _blocks(buffers):
        digest.update(block)
    return digest.hexdigest()


def _write_file(path: Path, buffers: Sequence[memoryview], flushing: ThreadPoolExecutor) -> int:
    """Write one new file -> its size; durable on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = flushed = 0
    flush: Future[None] | None = None
    with open(path, "xb", buffering=0) as file:
        for block in _blocks(buffers):
            done = 0
            while done < len(block):
                done += os.write(file.fileno(), block[done:])
            size += len(block)
            if size - flushed >= _FLUSH_BYTES and (flush is None or flush.done()):
                if flush is not None:
                    flush.result()  # an error of the disk is told once
                flushed = size
                flush = flushing.submit(os.fsync, file.fileno())
        if flush is not None:
            flush.result()
        os.fsync(file.fileno())
    return size


def make_staging(staging: Path) -> None:
    """A new folder, durable with the two above it, in which the files of a checkpoint gather."""
    staging.mkdir(parents=True)
    for folder in (staging, *staging.parents[:2]):
        fsync_folder(folder)


def publish(files: Mapping[str, Mapping[str, Any]], staging: Path, final: Path) -> None:
    """Write the manifest over `files` {relative path: {size, sha256}} and rename `staging` to `final`."""
    manifest = {"format_version": FORMAT_VERSION, "files": dict(sorted(files.items()))}
    write_files(staging, {MANIFEST: [memoryview(json.dumps(manifest, indent=2).encode())]})
    for folder in [*(path for path in staging.rglob("*") if path.is_dir()), staging]:
        fsync_folder(folder)
    staging.rename(final)
    fsync_folder(final.parent)


def fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(folder: Path, after: int) -> list[Path]:
    """Rename every step-N with N > `after` to set-aside-N, so that the run can go on from `after` -> new paths.

    These belong to a branch that a resume has left, or did not verify. They are never resumed from by "auto",
    overwritten or deleted; a person may remove them. Rank 0 only.
    """
    moved = []
    for path in step_folders(folder):
        step = step_of(path)
        if step is not None and step > after:
            target = path.with_name(f"set-aside-{step}")
            number = 1
            while target.exists():
                number += 1
                target = path.with_name(f"set-aside-{step}.{number}")
            path.rename(target)
            moved.append(target)
    if moved:
        fsync_folder(folder)
    return moved


def retain(folder: Path, keep_last: int | None, keep_every: int | None = None) -> None:
    """Delete all but the newest `keep_last` checkpoints (None: delete none) and every `keep_every`-th step.

    Rank 0 only. The newest ones are those just written: `set_aside` has moved away whatever lay ahead of the resumed
    step. The manifest goes first, so that a half-deleted checkpoint can never be taken for a whole one. Raises
    CheckpointError, and deletes nothing, where the newest one is not whole: an older one may be the last good one.
    """
    found = list_checkpoints(folder)
    surplus = [path for path in found[:-keep_last] if not _kept_for_good(path, keep_every)] if keep_last else []
    if surplus and (problems := verify(found[-1], hashes=False)):
        raise CheckpointError(problems[0])
    for path in surplus:
        (path / MANIFEST).unlink()
        fsync_folder(path)
        shutil.rmtree(path)


def _kept_for_good(path: Path, keep_every: int | None) -> bool:
    step = step_of(path)
    assert step is not None
    return keep_every is not None and step % keep_every == 0


def sweep(folder: Path) -> None:
    """Delete what killed saves and killed deletions left. Rank 0 only, while no save is in flight."""
    unfinished = [path for path in step_folders(folder) if not (path / MANIFEST).is_file()]
    for path in [*folder.glob(".step-*"), *unfinished]:
        shutil.rmtree(path, ignore_errors=True)


# --- verifying -------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """What a checkpoint says it holds: {relative path: {size, sha256}}. Raises CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version = manifest["format_version"]
        files = {
            str(name): {"size": int(e["size"]), "sha256": str(e["sha256"])} for name, e in manifest["files"].items()
        }
    except OSError as error:
        raise CheckpointError(f"{path / MANIFEST} is missing or unreadable ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {version}, this version reads {FORMAT_VERSION}")
    for name in files:
        plain = PurePosixPath(name)
        if name != plain.as_posix() or name in (".", MANIFEST) or {"..", "/"} & set(plain.parts):
            raise CheckpointError(f"{path / MANIFEST} names {name!r}, which is outside the checkpoint or no plain path")
    if TRAINER_STATE not in files:
        raise CheckpointError(f"{path / MANIFEST} is damaged (it does not name {TRAINER_STATE})")
    return files


def verify(
    path: Path,
    share: tuple[int, int] = (0, 1),
    only: tuple[str, ...] = ("",),
    advance: Callable[[int], None] | None = None,
    hashes: bool = True,
) -> list[str]:
    """What is wrong with a checkpoint: [] if it holds the files of its manifest as they were written, and no others.

    Every file must be a plain one inside the folder, of the recorded size and (`hashes`) SHA-256; what libraries read
    by the names they find (`_READ_BY_NAME`) must hold nothing that the manifest does not name. `only` files whose path
    starts with one of these are checked; with `share` = (i, n) every n-th one, starting with the i-th, is hashed.
    `advance` hears of the bytes read.
    """
    return list(find_damage(path, share, only, advance, hashes).values())


def find_damage(
    path: Path,
    share: tuple[int, int] = (0, 1),
    only: tuple[str, ...] = ("",),
    advance: Callable[[int], None] | None = None,
    hashes: bool = True,
) -> dict[str, str]:
    """`verify` by file: relative path -> what is wrong with it."""
    try:
        files = read_manifest(path)
    except CheckpointError as error:
        return {MANIFEST: str(error)}
    problems = {}
    names = {*files, *_read_by_name(path)}
    chosen = sorted(name for name in names if name.startswith(only))
    hashed = set(chosen[share[0] :: share[1]]) if hashes else set()
    for name in chosen:
        file, entry = path / name, files.get(name)
        if any(part.is_symlink() for part in (file, *file.parents[: name.count("/")])):
            problems[name] = f"{file} is a link, or behind one"
        elif entry is None:
            problems[name] = f"{file} is not named in the manifest"
        elif not file.is_file():
            problems[name] = f"{file} is missing"
        elif file.stat().st_size != entry["size"]:
            problems[name] = f"{file} has {file.stat().st_size} bytes instead of {entry['size']}"
        elif name in hashed and file_sha256(file, advance) != entry["sha256"]:
            problems[name] = f"{file} does not have its recorded SHA-256"
        elif name.endswith(_INDEX) and (stray := _stray_shards(file, name, files)):
            problems[name] = f"{file} names {stray[0]!r}, which is no file of the checkpoint"
    return problems


def _read_by_name(path: Path) -> set[str]:
    """What lies in the folders whose files are found by their names; hidden files are nobody's."""
    found = [file for folder in _READ_BY_NAME for file in (path / folder).rglob("*")]
    read = [file for file in found if not file.name.startswith(".") and (file.is_symlink() or not file.is_dir())]
    return {file.relative_to(path).as_posix() for file in read}


def _stray_shards(index: Path, name: str, files: Mapping[str, Any]) -> list[str]:
    """The files that the index of a model in several files names and that are not beside it."""
    try:
        shards = sorted({str(shard) for shard in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return ["nothing readable"]
    return [shard for shard in shards if "/" in shard or name.replace(index.name, shard) not in files]


def require_whole(path: Path, only: tuple[str, ...] = ("model/", "tokenizer/", TRAINER_STATE)) -> None:
    """CheckpointError if `path` is a checkpoint, or the model/ folder of one, and `only` is not what was written."""
    for folder in (path, path.parent):
        if (folder / MANIFEST).is_file() and (folder / TRAINER_STATE).is_file():
            if problems := verify(folder, only=only):
                raise CheckpointError(f"{folder} is damaged: {problems[0]}")
            return


def file_sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes; `advance` hears of the bytes read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()
