"""One run per folder: a lease that names its owner, beats while the owner lives, and outlives no dead one.

`RUN/.lease/` holds numbered files; the one with the highest number is the lease. To take a folder means to create the
next number, which a file system grants to one process only (O_EXCL; unlike file locks, on network file systems too).
Nobody deletes the highest number, so a starter that is late cannot win with an old one. Needs no torch.

Whether an owner lives: in the same process namespace of the same boot of the same host, its process says so. Elsewhere
its heart beats (the file's modification time) at least every EXPIRY_SECONDS, by the clock of the file system.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

HEARTBEAT_SECONDS = 10.0
EXPIRY_SECONDS = 120.0
"""More than network file systems keep attributes in memory (a minute), and several missed beats."""


class LeaseError(ValueError):
    """The folder belongs to another run, or does not belong to this one any more."""


@dataclass(frozen=True)
class Owner:
    """A process that trains, or trained, in a folder."""

    host: str
    boot: str
    """Identifies one boot of the host; empty where the system does not say."""
    namespace: str
    """Identifies what process numbers mean: containers have their own; empty as above."""
    process: int
    started: str
    """When the process started, in units of the system: process numbers are used again."""
    job: str | None
    """SLURM_JOB_ID."""
    since: str
    released: bool = False

    @staticmethod
    def this_process() -> Owner:
        """What another start needs to know of us."""
        started = _start_of(os.getpid())
        assert started is not None
        return Owner(
            host=platform.node(),
            boot=_read(Path("/proc/sys/kernel/random/boot_id")),
            namespace=_link(Path("/proc/self/ns/pid")),
            process=os.getpid(),
            started=started,
            job=os.environ.get("SLURM_JOB_ID"),
            since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job is not None else ""
        return f"process {self.process} on {self.host}{job}, since {self.since}"

    def lives(self, observer: Owner) -> bool | None:
        """Whether the process is there, as far as `observer` can know; None: not from there."""
        if self.released:
            return False
        here = (observer.host, observer.boot, observer.namespace)
        if (self.host, self.boot, self.namespace) != here:
            return None
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # a process of another user
        started = _start_of(self.process)
        return None if started is None else started == self.started


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _link(path: Path) -> str:
    return os.readlink(path) if path.exists() else ""


def _start_of(process: int) -> str | None:
    """When a process started; "ended" for one that its parent has not noticed to be dead; None: hidden from us."""
    stat = Path(f"/proc/{process}/stat")
    try:
        if not Path("/proc/self/stat").exists():
            return str(psutil.Process(process).create_time())
        # Behind the program's name, which may hold anything: state, ..., and as 22nd of all fields the start in ticks
        # since the boot (see proc(5)), which no correction of the clock moves.
        fields = stat.read_text().rpartition(")")[2].split()
    except (OSError, psutil.Error):
        return None
    return "ended" if fields[0] in "ZX" else fields[19]


class Lease:
    """The right to train in a folder, kept alive by a thread until `release` or the end of the process."""

    def __init__(
        self,
        run_dir: Path,
        expiry: float = EXPIRY_SECONDS,
        heartbeat: float = HEARTBEAT_SECONDS,
        tell: Callable[[str], None] = print,
    ) -> None:
        """Take `run_dir`; LeaseError where a living run owns it, OSError where the folder cannot be written.

        Where the owner cannot be looked at from here, waits for at most `expiry` seconds whether its heart beats, and
        says so with `tell`.
        """
        self.lost: str | None = None
        """Why the folder belongs to this run no more; None while it does."""
        self._run_dir = run_dir
        self._folder = run_dir / ".lease"
        self._expiry = expiry
        self._heartbeat = heartbeat
        self._owner = Owner.this_process()
        self._path = self._take(tell)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """LeaseError if the folder belongs to this run no more."""
        if self.lost is None and self._newest() != self._path:
            self.lost = f"run.dir {self._run_dir} was taken over by {_owner_in(self._newest()) or 'another run'}"
        if self.lost is not None:
            raise LeaseError(f"{self.lost}: this run had not been heard of for {self._expiry:.0f} s; it stops here")

    def release(self) -> None:
        """Let the next run take the folder at once."""
        self._ended.set()
        self._thread.join()
        if self.lost is None and self._newest() == self._path:
            # Where the disk is full, the end of the process releases it as well; what the run died of must be told.
            with contextlib.suppress(OSError):
                _write_over(self._path, replace(self._owner, released=True))

    def _take(self, tell: Callable[[str], None]) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        while True:
            newest = self._newest()
            if newest is not None:
                self._refuse_if_alive(newest, tell)
            path = self._folder / str(_number(newest) + 1)
            try:
                file = open(path, "x", encoding="utf-8")  # noqa: SIM115
            except FileExistsError:
                continue
            try:
                with file:
                    json.dump(asdict(self._owner), file)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.utime(path, (0, 0))  # no heart: an owner whom nobody can read would else be waited for
                raise
            if self._newest() != path:
                # Others have come and gone since we looked.
                path.unlink()
                continue
            for old in self._files():
                if old != path:
                    old.unlink(missing_ok=True)
            return path

    def _refuse_if_alive(self, lease: Path, tell: Callable[[str], None]) -> None:
        """Return once the owner of `lease` is known to be gone."""
        told, first = False, None
        for look in itertools.count():
            owner, beat = _owner_in(lease), _modified(lease)
            if beat is None:
                return  # taken over or gone while we looked: look again
            first = beat if first is None else first
            alive = owner.lives(self._owner) if owner is not None else None
            if alive or (alive is None and beat != first):
                raise LeaseError(
                    f"run.dir {self._run_dir} is in use by {owner or 'another run'}: stop that run, or choose another "
                    "folder"
                )
            if alive is False or self._clock() - beat > self._expiry:
                return
            pause = min(1.0, self._expiry / 10)
            if owner is None and look < 10:
                pause /= 10  # most likely it is being written this moment
            elif not told:
                told = True
                who = owner or "another run"
                tell(f"run.dir was left by {who}; waiting for at most {self._expiry:.0f} s for a sign of it")
            time.sleep(pause)

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self._heartbeat):
            try:
                self.require()
                os.utime(self._path)
                last = time.monotonic()
            except LeaseError:
                return
            except OSError as error:
                if time.monotonic() - last > self._expiry:
                    self.lost = f"the lease on run.dir {self._run_dir} could not be renewed ({error})"
                    return

    def _files(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.name.isdecimal()]

    def _newest(self) -> Path | None:
        return max(self._files(), key=_number, default=None)

    def _clock(self) -> float:
        """The time on the file system's clock, which stamps the heartbeats of all hosts."""
        probe = self._folder / f"clock-{self._owner.host}-{self._owner.process}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()


def last_owner(run_dir: Path) -> tuple[Owner, float] | None:
    """Who holds `run_dir`, or held it last, and when its heart beat last (by the clock of the file system).

    None: nobody has, or somebody is taking it this moment.
    """
    folder = run_dir / ".lease"
    files = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    newest = max(files, key=_number, default=None)
    if newest is None:
        return None
    owner, beat = _owner_in(newest), _modified(newest)
    return None if owner is None or beat is None else (owner, beat)


def _number(lease: Path | None) -> int:
    return int(lease.name) if lease is not None else 0


def _owner_in(lease: Path | None) -> Owner | None:
    """Who holds `lease`; None where it is gone, or its writer has not come that far."""
    if lease is None:
        return None
    try:
        return Owner(**json.loads(lease.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _modified(lease: Path) -> float | None:
    """Last beat of `lease`; None where it is gone. Opened, since network file systems then ask the server."""
    try:
        with open(lease, "rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _write_over(lease: Path, owner: Owner) -> None:
    temporary = lease.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(owner)), encoding="utf-8")
    os.replace(temporary, lease)
