"""Runs that several jobs of a real cluster finish, whatever happens in between."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dlm_dist.training.chain import Chain
from dlm_dist.training.checkpoint_files import list_checkpoints, step_of
from tests.distributed import runs
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]

SCRIPT = "slurm/pretrain.sbatch"
CONFIG = "tests/distributed/tiny.yaml"


def submit(
    cluster: Cluster, run: Path, data: Path, *options: str, environment: Mapping[str, str] | None = None, **changes: Any
) -> int:
    """sbatch of the real script for a tiny run in `run`; two nodes with a rank each unless `options` say otherwise."""
    output = run.with_suffix(".%A_%a.out")
    everything = runs.environment(1) | {"DLM_VENV": "none"} | dict(environment or {})
    return cluster.submit(
        f"--chdir={runs.REPOSITORY}",
        "--nodes=2",
        f"--output={output}",
        *options,
        SCRIPT,
        CONFIG,
        *runs.overrides(data, run, "qwen3", **changes),
        environment=everything,
    )


def output(run: Path) -> str:
    """What the jobs on `run` have said, task by task."""
    return "\n".join(path.read_text() for path in sorted(run.parent.glob(f"{run.name}.*.out")))


def saved(run: Path) -> list[int]:
    return [step_of(path) or 0 for path in list_checkpoints(run / "checkpoints")]


def wait_for_step(cluster: Cluster, run: Path, step: int, seconds: float = 120) -> None:
    cluster.wait(lambda: runs.last_step(run) >= step, seconds, f"{run} reached step {step}: {output(run)[-5000:]}")


LONG = {"train__max_steps": 60, "checkpoint__every": 25}


@pytest.fixture(scope="module")
def reference(cluster, data, tmp_path_factory):
    """A LONG run on both nodes that nothing interrupts."""
    run = tmp_path_factory.mktemp("reference") / "run"
    job = submit(cluster, run, data, "--array=0", **LONG)
    cluster.wait_until_over(job, 300)
    assert runs.last_step(run) == 60, output(run)[-6000:]
    return run


def test_the_first_job_finishes_a_short_run_and_the_others_have_nothing_to_do(cluster, data, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, data, "--array=0-2%1")
    cluster.wait_until_over(job, 200)
    assert runs.last_step(run) == 12, output(run)[-6000:]
    assert (run / "DONE").read_text() == f"job {job}_0 reached the last step, 12\n"
    text = output(run)
    assert text.count("nothing is left to do") == 2, text
    logs = run / "logs" / f"{job}_0"
    assert {path.name for path in logs.glob("*.log")} == {"rank-00000.n1.log", "rank-00001.n2.log"}
    for index, name in enumerate(cluster.names):
        record = json.loads((logs / f"node-{name}.json").read_text())
        assert record["status"] == 0
        assert record["ranks"] == {str(index): 0}
        assert record["environment"]["SLURM_ARRAY_JOB_ID"] == str(job)
        assert record["environment"]["MASTER_ADDR"] == "n1"
    assert [attempt.nodes for attempt in Chain(run).attempts()] == [("n1", "n2")]


def test_signals_and_requeues_lose_nothing(cluster, data, reference, tmp_path):
    """Three attempts of two jobs, and not a step that was made twice."""
    run = tmp_path / "run"
    job = submit(cluster, run, data, "--array=0-2%1", **LONG)
    wait_for_step(cluster, run, 10)
    # It repeats itself while a step does not confirm, and fails where the job has ended meanwhile.
    cluster.run("scancel", "--signal=USR1", f"{job}_0", check=False)
    wait_for_step(cluster, run, 30)
    cluster.run("scontrol", "requeue", f"{job}_1")
    cluster.wait_until_over(job, 300)
    text = output(run)
    assert (run / "DONE").exists(), text
    first, second, third = Chain(run).attempts()
    assert (first.name, first.status, first.told) == (f"{job}_0", 75, False)
    assert (second.name, second.status, second.told) == (f"{job}_1", 75, True)
    # What comes first then is the scheduler's choice.
    assert third.name in (f"{job}_2", f"{job}_1-restart1")
    assert third.status == 0
    assert -1 == first.checkpoint < first.reached == second.checkpoint < second.reached == third.checkpoint < 60, text
    runs.assert_same_steps(run, reference)
    assert not (run / "metrics.replaced.jsonl").exists()
    assert "SIGUSR1 (rank 0), SIGUSR1 (rank 1)" in text
    assert "SIGTERM (rank 0), SIGTERM (rank 1)" in text
