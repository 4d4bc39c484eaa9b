"""What a job of SLURM knows about itself: its name and nodes, where its ranks meet, and what it can ask of SLURM."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass


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
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        return Job(
            number=number,
            array=int(array) if array is not None and "DLM_SWEEP" not in environment else None,
            name=str(number) if array is None else f"{array}_{task}",
            restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
            nodes=tuple(_ask("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()),
        )

    def waiting(self) -> list[str]:
        """The tasks of this array that are still to come; empty where it is none."""
        if self.array is None:
            return []
        return _ask("squeue", "-h", "-r", "-t", "PENDING", "-j", str(self.array), "-o", "%i").split()

    def exclude(self, jobs: Sequence[str], nodes: Sequence[str]) -> None:
        """Keep jobs that wait off `nodes`, besides those that they were submitted to keep off."""
        shown = re.search(r"ExcNodeList=(\S+)", _ask("scontrol", "show", "job", "-o", self.name))
        before = [shown.group(1)] if shown and shown.group(1) != "(null)" else []
        _ask("scontrol", "update", f"JobId={','.join(jobs)}", f"ExcNodeList={','.join([*before, *nodes])}")

    def requeue(self) -> None:
        """Put this task, and no other of its array, back into the queue. SLURM then ends this process."""
        _ask("scontrol", "requeue", self.name)


def _ask(*command: str) -> str:
    """Standard output of one of SLURM's commands; OSError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout


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
