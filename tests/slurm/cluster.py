"""A real SLURM cluster on one Linux machine: munge, slurmctld, and a slurmd per node in a network namespace.

Every node has an address, a host name and a link that can be cut; processes, files and CPUs are the machine's. All
state lies in one temporary folder, and nothing of the machine's own configuration is read or changed, so that several
clusters can run side by side. Needs root: `missing()` says what else.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

PACKAGES = "slurm-wlm munge iproute2"
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "mungekey", "ip", "unshare", "nsenter", "setpriv")
_CONFIGURATION = """\
ClusterName=dlm{number}
SlurmctldHost=ctl({network}.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
InactiveLimit=0
KillWait=15
SchedulerParameters=batch_sched_delay=1,sched_interval=3,bf_interval=3
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=2
"""


class ClusterError(RuntimeError):
    """The cluster did not do what a test asked of it; the message holds the logs that say why."""


def missing() -> str | None:
    """Why no cluster can run here; None: one can."""
    if os.geteuid() != 0:
        return "a local SLURM cluster needs root"
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt install {PACKAGES}"
    probe = f"dlm-probe-{os.getpid()}"
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", "probe", "type", "bridge")
    except ClusterError as error:
        return f"no network namespaces with bridges here: {error}"
    finally:
        subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return None


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Cluster:
    """Nodes n1, n2 ... of two CPUs each. `with local_cluster() as cluster` brings one up and takes it down."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.names = [f"n{i + 1}" for i in range(nodes)]
        number = os.getpid() % 10000
        while (Path("/run/netns") / f"d{number}n1").exists() or Path(f"/sys/class/net/d{number}").exists():
            number += 1
        self._number = number
        self._bridge = f"d{number}"
        self._network = f"10.{100 + number // 250 % 100}.{number % 250}"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def address(self, name: str) -> str:
        """IP address of a node."""
        return f"{self._network}.{11 + self.names.index(name)}"

    @property
    def environment(self) -> dict[str, str]:
        """What sbatch, squeue and the others need to find this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Bring everything up; returns once all nodes are idle."""
        self._write_configuration()
        self._start_munge()
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("address", "add", f"{self._network}.1/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for name in self.names:
            self._add_namespace(name)
        self._daemons["ctl"] = self._daemon("ctl", ["slurmctld", "-D", "-c", "-f", f"{self.folder}/slurm.conf"])
        for name in self.names:
            self.start_node(name)
        self.wait(lambda: set(self.node_states().values()) == {"idle"}, 60, "all nodes are idle")

    def stop(self) -> None:
        """Take everything down, whatever state it is in."""
        for process in psutil.process_iter():
            if self._belongs_here(process):
                _kill(process)
        for daemon in self._daemons.values():
            daemon.wait(timeout=30)
        for name in self.names:
            # The cable first: with the namespace alone it would vanish some time later.
            subprocess.run(["ip", "link", "delete", self._cable(name)], capture_output=True)
            subprocess.run(["ip", "netns", "delete", self._namespace(name)], capture_output=True)
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True)

    def run(self, *command: str, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
        """Standard output of a SLURM command, run on the controller."""
        everything = {**os.environ, **(environment or {}), **self.environment}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=everything)
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def submit(self, *arguments: str, environment: Mapping[str, str] | None = None) -> int:
        """sbatch -> the job's number."""
        return int(self.run("sbatch", "--parsable", *arguments, environment=environment))

    def node_states(self) -> dict[str, str]:
        """Name -> idle, mixed, allocated, down ... ("idle*": does not answer)."""
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines()
        return dict(line.split() for line in lines)

    def jobs(self) -> dict[str, tuple[str, str]]:
        """What waits, runs or completes: "ARRAY_TASK" or "JOB" -> (state, reason or nodes)."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i|%T|%R").splitlines()
        return {job: (state, why) for job, state, why in (line.split("|") for line in lines)}

    def job(self, number: int | str) -> dict[str, str]:
        """What `scontrol show job` tells, by its keys."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", str(number))))

    def wait(self, condition: Callable[[], Any], seconds: float, what: str) -> None:
        """ClusterError with the logs where `condition` does not come true in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {seconds:g} s in vain until {what}\n{self.logs()}")
            time.sleep(0.2)

    def wait_until_over(self, job: int, seconds: float) -> None:
        """Until no task of the job waits or runs."""
        self.wait(lambda: not [name for name in self.jobs() if name.split("_")[0] == str(job)], seconds, f"{job} ended")

    def logs(self) -> str:
        """The ends of the daemons' logs and the queue."""
        tails = [f"== queue: {self.run('squeue', check=False)}\n== nodes: {self.node_states()}"]
        for path in sorted(self.folder.glob("*.log")):
            tails.append(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(tails)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node that is new, or was killed: it comes back as after a boot."""
        command = ["slurmd", "-D", "-N", name, "-f", f"{self.folder}/slurm.conf"]
        self._daemons[name] = self._daemon(name, command)

    def kill_node(self, name: str) -> None:
        """What a power cut does: the link is down and every process of the node is gone at the same moment."""
        self.cut(name)
        for process in self.processes(name):
            _kill(process)
        self._daemons.pop(name).wait(timeout=30)

    def cut(self, name: str) -> None:
        """Unplug the node's cable."""
        _ip("link", "set", self._cable(name), "down")

    def repair(self, name: str) -> None:
        """Plug the cable in again."""
        _ip("link", "set", self._cable(name), "up")

    def part(self, one: str, other: str) -> None:
        """Let two nodes hear each other no more; the controller hears both."""
        for here, there in ((one, other), (other, one)):
            _ip("-n", self._namespace(here), "route", "add", "blackhole", self.address(there))

    def join(self, one: str, other: str) -> None:
        """Undo `part`."""
        for here, there in ((one, other), (other, one)):
            _ip("-n", self._namespace(here), "route", "delete", "blackhole", self.address(there))

    def processes(self, name: str) -> list[psutil.Process]:
        """Every process in the node's network namespace."""
        wanted = os.stat(f"/run/netns/{self._namespace(name)}").st_ino
        return [process for process in psutil.process_iter() if _network_of(process) == wanted]

    def on_node(self, name: str, *command: str) -> list[str]:
        """A command line that runs `command` as if on the node."""
        return ["nsenter", f"--net=/run/netns/{self._namespace(name)}", *self._as_host(name, command)]

    @contextmanager
    def hidden(self, name: str, path: Path) -> Iterator[None]:
        """An empty folder lies over `path` for what the node's slurmd starts meanwhile: a broken installation."""
        empty = self.folder / "empty"
        empty.mkdir(exist_ok=True)
        self._in_mounts_of(name, "mount", "--bind", str(empty), str(path))
        try:
            yield
        finally:
            self._in_mounts_of(name, "umount", str(path))

    def _in_mounts_of(self, name: str, *command: str) -> None:
        subprocess.run(["nsenter", f"--mount=/proc/{self._daemons[name].pid}/ns/mnt", *command], check=True)

    def _write_configuration(self) -> None:
        values = {
            "number": self._number,
            "network": self._network,
            "folder": self.folder,
            "controller_port": 20000 + self._number,
            "node_port": 30000 + self._number,
            "names": ",".join(self.names),
            "nodes": "\n".join(
                f"NodeName={name} NodeHostname={name} NodeAddr={self.address(name)} CPUs=2 RealMemory=2000"
                for name in self.names
            ),
        }
        (self.folder / "slurm.conf").write_text(_CONFIGURATION.format(**values))
        # slurmd looks at the cgroups even where no plugin uses them. Where version 1 is mounted beside version 2, its
        # detection gives up ("Hybrid mode is not supported").
        unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        plugin = "autodetect" if unified else "cgroup/v1\nCgroupAutomount=yes"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        names = [f"{self._network}.1 ctl", *(f"{self.address(name)} {name}" for name in self.names)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        (self.folder / "state").mkdir()

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        subprocess.run(["mungekey", "-c", "-k", str(folder / "key")], check=True)
        for path in (folder, folder / "key"):
            shutil.chown(path, "munge", "munge")
        command = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", shutil.which("munged") or "munged"]
        command += ["--foreground", "--force", f"--socket={folder}/socket", f"--key-file={folder}/key"]
        command += [f"--pid-file={folder}/pid", f"--log-file={folder}/log", f"--seed-file={folder}/seed"]
        self._daemons["munge"] = self._spawn("munge", command)
        self.wait((folder / "socket").exists, 20, "munged has its socket")

    def _add_namespace(self, name: str) -> None:
        space, cable = self._namespace(name), self._cable(name)
        _ip("netns", "add", space)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", cable, "master", self._bridge, "up")
        _ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "link", "set", "lo", "up")

    def _daemon(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        return self._spawn(name, self.on_node(name, *command) if name in self.names else self._as_host(name, command))

    def _spawn(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{name}.out.log", "ab") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )

    def _as_host(self, name: str, command: Sequence[str]) -> list[str]:
        # Not `ip netns exec`: it mounts /sys anew, and slurmd then finds no cgroups.
        script = f'mount --bind {self.folder}/hosts /etc/hosts && hostname {name} && exec "$@"'
        return ["unshare", "--uts", "--mount", "bash", "-c", script, "bash", *command]

    def _namespace(self, name: str) -> str:
        return f"{self._bridge}{name}"

    def _cable(self, name: str) -> str:
        return f"{self._bridge}{name}"

    def _belongs_here(self, process: psutil.Process) -> bool:
        if process.pid in {daemon.pid for daemon in self._daemons.values()}:
            return True
        spaces = [Path("/run/netns") / self._namespace(name) for name in self.names]
        return _network_of(process) in {space.stat().st_ino for space in spaces if space.exists()}


def _network_of(process: psutil.Process) -> int | None:
    try:
        return os.stat(f"/proc/{process.pid}/ns/net").st_ino
    except OSError:
        return None


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


@contextmanager
def local_cluster(nodes: int = 2) -> Iterator[Cluster]:
    """A cluster that is up for as long as the block lasts. ClusterError where it does not come up."""
    folder = Path(tempfile.mkdtemp(prefix="dlm-slurm-"))
    folder.chmod(0o755)
    cluster = Cluster(folder, nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)
