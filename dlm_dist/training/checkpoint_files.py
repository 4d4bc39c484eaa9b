"""checkpoints/step-N as files: written durably, published by one rename, listed, verified.

Layout and protocol are specified in docs/checkpoint-format.md. Needs neither torch nor other ranks, so that
`dlm checkpoint` starts at once; what is collective is in checkpoint.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dlm_dist.training.durable_files import files_sha256, fsync_folder, write_files

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
ORIGIN = "origin.json"
"""In an exported model's folder: what its weights are, and the state of training that they come from."""
_READ_BY_NAME = ("model", "tokenizer", "tensors")
_INDEX = ".safetensors.index.json"
_STEP_FOLDER = re.compile(r"step-(\d+)")


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


def list_candidates(folder: Path) -> list[Path]:
    """Where a resume may look below `folder` (RUN/checkpoints), oldest first: what is published, or was.

    A folder newer than every published one that has no manifest was damaged by something else: a save brings its
    manifest along, and a deletion begins at the oldest.
    """
    newest = max((step_of(path) or 0 for path in list_checkpoints(folder)), default=-1)
    return [path for path in step_folders(folder) if (path / MANIFEST).is_file() or (step_of(path) or 0) > newest]


def load_trainer_state(path: Path) -> dict[str, Any]:
    """trainer_state.json of a verified checkpoint."""
    state: dict[str, Any] = json.loads((path / TRAINER_STATE).read_bytes())
    return state


# --- writing ---------------------------------------------------------------------------------------------------


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
    starts with one of these are checked; with `share` = (i, n) only the i-th of n shares of them is hashed.
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
    names = sorted({*files, *_read_by_name(path)})
    chosen = [name for name in names if name.startswith(only)]
    problems = {name: problem for name in chosen if (problem := _visible_damage(path, name, files)) is not None}
    if hashes:
        # Dealt out by size: a rank must not get all the large ones.
        by_size = sorted((name for name in chosen if name in files), key=lambda name: (-files[name]["size"], name))
        mine = [name for name in by_size[share[0] :: share[1]] if name not in problems]
        for name, digest in zip(mine, files_sha256([path / name for name in mine], advance), strict=True):
            if digest != files[name]["sha256"]:
                problems[name] = f"{path / name} does not have its recorded SHA-256"
    for name in chosen:
        if name not in problems and name.endswith(_INDEX) and (stray := _stray_shards(path / name, name, files)):
            problems[name] = f"{path / name} names {stray[0]!r}, which is no file of the checkpoint"
    return dict(sorted(problems.items()))


def _visible_damage(path: Path, name: str, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What is wrong with the file `name` of a checkpoint as a folder shows it."""
    file, entry = path / name, files.get(name)
    if any(part.is_symlink() for part in (file, *file.parents[: name.count("/")])):
        return f"{file} is a link, or behind one"
    if entry is None:
        return f"{file} is not named in the manifest"
    if not file.is_file():
        return f"{file} is missing"
    if file.stat().st_size != entry["size"]:
        return f"{file} has {file.stat().st_size} bytes instead of {entry['size']}"
    return None


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
    """CheckpointError if `path` is a checkpoint, or the model/ folder of one, and `only` is not what was written.

    A folder with a trainer_state.json counts as a checkpoint: without a manifest it was never finished.
    """
    for folder in (path, path.parent):
        if (folder / TRAINER_STATE).is_file():
            if problems := verify(folder, only=only):
                raise CheckpointError(f"{folder} is damaged: {problems[0]}")
            return


def require_checkpoint(path: Path) -> None:
    """Raise CheckpointError where `path` is no checkpoint, or not to the last byte as it was written."""
    if problems := verify(path):
        raise CheckpointError(f"{path} is no whole checkpoint: {problems[0]}")
