"""What a job of SLURM knows about itself: its name and nodes, where its ranks meet, and what it can ask of SLURM."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

_PATIENCE_SECONDS = 300.0
"""How long a controller may be away: one that restarts must not end a run."""

_AWAY = re.compile(
    r"Unable to contact|timed out|Connection refused|Communication|Zero Bytes|temporarily", re.IGNORECASE
)


@dataclass(frozen=True)
class Job:
    """The job that this process is part of."""

    number: int
    array: int | None
    """The number of the array whose tasks all go on with this run; None: there are no others (slurm/sweep.sbatch)."""
    name: str
    """ARRAY_TASK, or the number of a job that is no array: what SLURM's commands take for this one task."""
    restarts: int
    nodes: tuple[str, ...]
    partition: str
    ends: float | None
    """Unix time of its time limit."""
    least_nodes: int
    """With how many the jobs to come are content (DLM_MIN_NODES): SLURM does not tell what a job was submitted with."""

    @property
    def attempt(self) -> str:
        """A name for this start of the job, for files too."""
        return self.name + (f"-restart{self.restarts}" if self.restarts else "")

    @staticmethod
    def this(environment: Mapping[str, str]) -> Job:
        """ValueError outside of a job."""
        if "SLURM_JOB_ID" not in environment:
            raise ValueError("this is no job of SLURM: submit one with `sbatch slurm/pretrain.sbatch CONFIG`")
        number = int(environment["SLURM_JOB_ID"])
        nodes = _hostnames(environment["SLURM_JOB_NODELIST"])
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        return Job(
            number=number,
            array=int(array) if array is not None and "DLM_SWEEP" not in environment else None,
            name=str(number) if array is None else f"{array}_{task}",
            restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
            nodes=nodes,
            partition=environment.get("SLURM_JOB_PARTITION", ""),
            ends=float(environment["SLURM_JOB_END_TIME"]) if "SLURM_JOB_END_TIME" in environment else None,
            least_nodes=int(environment.get("DLM_MIN_NODES", len(nodes))),
        )

    def waiting(self) -> list[str]:
        """The tasks of this array that are still to come; empty where it is none."""
        if self.array is None:
            return []
        return _ask("squeue", "-h", "-r", "-t", "PENDING", "-j", str(self.array), "-o", "%i").split()

    def exclude(self, jobs: Sequence[str], nodes: Sequence[str]) -> bool:
        """Keep jobs that wait off `nodes`, besides those that they were submitted to keep off.

        False: the partition has too few others that work, and nothing is changed: the jobs would wait for ever.
        """
        shown = re.search(r"ExcNodeList=(\S+)", _ask("scontrol", "show", "job", "-o", jobs[0]))
        before = _hostnames(shown.group(1)) if shown is not None and shown.group(1) != "(null)" else ()
        excluded = list(dict.fromkeys([*before, *nodes]))
        working = _ask("sinfo", "-h", "-N", "-t", "idle,mix,alloc,comp", "-p", self.partition, "-o", "%N").split()
        if len(set(working) - set(excluded)) < self.least_nodes:
            return False
        _ask("scontrol", "update", f"JobId={','.join(jobs)}", f"ExcNodeList={','.join(excluded)}")
        return True

    def requeue(self) -> None:
        """Put this task, and no other of its array, back into the queue. SLURM then ends this process."""
        _ask("scontrol", "requeue", self.name)


def _hostnames(nodelist: str) -> tuple[str, ...]:
    return tuple(_ask("scontrol", "show", "hostnames", nodelist).split())


def _ask(*command: str) -> str:
    """Standard output of one of SLURM's commands; OSError where it fails. Waits for a controller that is away."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            failure = "" if done.returncode == 0 else done.stderr.strip() or f"status {done.returncode}"
            away = bool(_AWAY.search(failure))
        except subprocess.TimeoutExpired:
            failure, away = "no answer within two minutes", True
        if not failure:
            return done.stdout
        if not away or time.monotonic() > deadline:
            raise OSError(f"{' '.join(command)}: {failure}")
        time.sleep(5.0)


def first_host(nodelist: str) -> str:
    """The first name of a list like `gpu[03-05,7],login1`."""
    match = re.match(r"([^\[,]+)(?:\[([^-,\]]+))?", nodelist)
    if match is None:
        raise ValueError(f"{nodelist!r} is no list of nodes")
    return match.group(1) + (match.group(2) or "")


def rendezvous_port(job: int) -> int:
    """A port that jobs on the same node hardly share, below those that Linux gives to clients (32768 and up)."""
    return 10000 + job % 20000


def meeting_point(environment: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR and MASTER_PORT from the job's, where they are not set."""
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_JOB_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(rendezvous_port(int(environment["SLURM_JOB_ID"]))))


def adopt_srun_task(environment: MutableMapping[str, str]) -> None:
    """Make a task of `srun` the rank that it is, for `srun python launcher/pretrain.py`; others stay as they are."""
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment or tasks == 1:
        return
    meeting_point(environment)
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], str(tasks)
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    here = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if here is not None:
        environment["LOCAL_WORLD_SIZE"] = here.group()


def this_host() -> str:
    """The node's name as SLURM has it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename.partition(".")[0]
