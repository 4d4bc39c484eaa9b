"""The other ways to start ranks on two nodes, which make the same run: `srun` alone, and `deepspeed --hostfile`."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlm_dist.training.watchdog import read_heartbeats
from tests.distributed import runs
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]

PROGRAM = ["launcher/pretrain.py", "--config", "tests/distributed/tiny.yaml"]

SERVER = """\
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/{name}.pid
PermitRootLogin yes
PubkeyAuthentication yes
StrictModes no
UsePAM no
"""

CLIENT = """\
IdentityFile {folder}/user_key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


@pytest.fixture(scope="module")
def started_by_srun(cluster, data, tmp_path_factory) -> Path:
    """A run whose ranks are tasks of srun, without any launcher."""
    run = tmp_path_factory.mktemp("srun") / "run"
    command = ["srun", sys.executable, *PROGRAM, *runs.overrides(data, run, "qwen3")]
    log = run.with_suffix(".log")
    job = cluster.submit(
        *("--nodes=2", "--ntasks-per-node=1", f"--chdir={runs.REPOSITORY}", f"--output={log}"),
        f"--wrap={shlex.join(command)}",
        environment=runs.environment(1),
    )
    cluster.wait_until_over(job, 200)
    assert runs.last_step(run) == 12, log.read_text()[-6000:]
    return run


def hosts(run: Path) -> list[tuple[int, str]]:
    return [(beat["rank"], beat["host"]) for beat in read_heartbeats(run / "heartbeats")]


def test_tasks_of_srun_are_ranks(started_by_srun):
    assert hosts(started_by_srun) == [(0, "n1"), (1, "n2")]


@pytest.fixture
def ssh(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """A server on each node -> a folder with an `ssh` that may enter them without a password."""
    absent = [name for name in ("sshd", "ssh", "ssh-keygen", "pdsh") if shutil.which(name) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} not found: apt install openssh-server openssh-client pdsh")
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    (tmp_path / "client").write_text(CLIENT.format(folder=tmp_path))
    wrapper = tmp_path / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/client "$@"\n')
    wrapper.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks itself in
    servers = []
    for name in cluster.names:
        settings = tmp_path / f"server-{name}"
        settings.write_text(SERVER.format(address=cluster.address(name), folder=tmp_path, name=name))
        command = cluster.on_node(name, shutil.which("sshd") or "sshd", "-D", "-e", "-f", str(settings))
        with open(tmp_path / f"server-{name}.log", "wb") as log:
            servers.append(subprocess.Popen(command, stdout=log, stderr=log))
    yield wrapper.parent
    for server in servers:
        server.kill()
        server.wait()


def test_deepspeed_starts_the_ranks_of_a_hostfile_over_ssh(cluster, data, started_by_srun, ssh, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(tmp_path / "hosts")]
    done = subprocess.run(
        cluster.on_node("n1", *deepspeed, *PROGRAM, *runs.overrides(data, run, "qwen3")),
        cwd=runs.REPOSITORY,
        env=runs.environment(1) | {"PATH": f"{ssh}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert hosts(run) == [(0, "n1"), (1, "n2")]
    runs.assert_same_steps(run, started_by_srun)
