"""Joining the process group: the share of the cores, and no compiler on the way."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from dlm_dist.training import distributed

REPOSITORY = Path(__file__).resolve().parents[2]

WORKER = """
import sys
from dlm_dist.training.distributed import start_distributed
from launcher.leaving import leave
device = start_distributed("cpu", cpu_threads=3)
import deepspeed, torch
assert torch.get_num_threads() == 3
value = torch.ones(3) * (1 + torch.distributed.get_rank())
deepspeed.comm.all_reduce(value)
assert value.tolist() == [3.0] * 3, value
print(device, "done")
leave(0)
"""


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 6),
        ({"LOCAL_WORLD_SIZE": "3"}, 2),  # torchrun
        ({"LOCAL_SIZE": "2"}, 3),  # deepspeed
        ({"LOCAL_SIZE": "16"}, 1),
    ],
)
def test_ranks_of_a_machine_share_its_cores(monkeypatch, environment, threads):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert distributed.threads_per_rank() == threads


def test_an_environment_that_is_not_activated_finds_its_programs(monkeypatch):
    scripts = sysconfig.get_path("scripts")
    monkeypatch.setenv("PATH", "/usr/bin")
    distributed._find_own_programs()
    distributed._find_own_programs()
    assert os.environ["PATH"] == f"{scripts}{os.pathsep}/usr/bin"


def test_two_cpu_ranks_start_without_any_compiler(tmp_path):
    # A store in a file: no port that another test may hold.
    program = WORKER.replace(
        "device = start",
        f"import torch\ntorch.distributed.init_process_group('gloo', init_method='file://{tmp_path}/s', "
        "rank=int(sys.argv[1]), world_size=2)\ndevice = start",
    )
    ranks = []
    for rank in range(2):
        environment = {
            "HOME": str(tmp_path),
            "PATH": str(tmp_path),
            "PYTHONPATH": str(REPOSITORY),
            "MASTER_PORT": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_SIZE": "2",
        }
        command = [sys.executable, "-c", program, str(rank)]
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert all("cpu done" in output for output in outputs)
    assert not list(tmp_path.rglob("*shm_comm*"))
