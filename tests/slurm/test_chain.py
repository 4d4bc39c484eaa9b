"""Runs that several jobs of a real cluster finish, whatever happens in between."""

from __future__ import annotations

import json
import os
import sys
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

OF_A_JOB = {"DLM_VENV": "none", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}"}
"""This Python and no other: a test that hides it must not find a second one."""


def submit(
    cluster: Cluster, run: Path, data: Path, *options: str, environment: Mapping[str, str] | None = None, **changes: Any
) -> int:
    """sbatch of the real script for a tiny run in `run`; two nodes with a rank each unless `options` say otherwise."""
    output = run.with_suffix(".%A_%a.out")
    everything = runs.environment(1) | OF_A_JOB | dict(environment or {})
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


@pytest.fixture(autouse=True)
def empty_queue(cluster):
    """Leave no job of a test that failed to the next one."""
    yield
    cluster.run("scancel", "--user=root", check=False)
    cluster.wait(lambda: not cluster.jobs(), 60, "the queue is empty")


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


def test_a_time_limit_saves_in_time_and_the_last_job_queues_again_until_it_is_stopped(cluster, data, tmp_path):
    run = tmp_path / "run"
    limits = ["--array=0", "--nodes=1", "--time=2", "--signal=USR1@40"]
    job = submit(cluster, run, data, *limits, train__max_steps=100000, checkpoint__every=None)
    cluster.wait(lambda: len(Chain(run).attempts()) == 2, 240, "the job has come again")
    first, second = Chain(run).attempts()
    assert (first.status, first.told) == (75, False), output(run)
    assert "SIGUSR1 (rank 0)" in output(run)
    assert second.name == f"{job}_0-restart1"
    assert first.reached == second.checkpoint == saved(run)[-1]
    wait_for_step(cluster, run, first.reached + 3)
    (run / "STOP").touch()
    cluster.wait_until_over(job, 60)
    second = Chain(run).attempts()[1]
    assert second.status == 75
    assert second.reached == runs.last_step(run) > first.reached
    assert not (run / "metrics.replaced.jsonl").exists()
    assert "STOP is there" in output(run)


def test_of_two_chains_on_a_run_one_works_and_the_other_says_why_not(cluster, data, tmp_path):
    run = tmp_path / "run"
    endless = {"train__max_steps": 100000, "checkpoint__every": 1000}
    first = submit(cluster, run, data, "--nodes=1", "--array=0", **endless)
    wait_for_step(cluster, run, 2)
    second = submit(cluster, run, data, "--nodes=1", "--array=0-1%1", **endless)
    cluster.wait_until_over(second, 120)
    cluster.run("scancel", str(first))
    cluster.wait_until_over(first, 60)
    others = [path.read_text() for path in sorted(tmp_path.glob(f"run.{second}_*.out"))]
    assert len(others) == 2
    for text in others:
        assert "not started, another chain is at work: run.dir" in text
        assert "is in use by process" in text
    (attempt,) = Chain(run).attempts()
    assert (attempt.name, attempt.status, attempt.told) == (f"{first}_0", 75, True)
    assert attempt.reached == runs.last_step(run)


def test_a_cut_between_nodes_ends_the_job_and_the_chain_goes_on_after_the_repair(cluster, data, reference, tmp_path):
    run = tmp_path / "run"
    changes = {**LONG, "checkpoint__every": 5, "guards__hang_minutes": 0.25}
    job = submit(cluster, run, data, "--array=0-1%1", **changes)
    wait_for_step(cluster, run, 12)
    cluster.part(*cluster.names)
    try:
        cluster.wait(lambda: Chain(run).attempts()[0].status is not None, 300, "the first attempt has ended")
    finally:
        cluster.join(*cluster.names)
    cluster.wait_until_over(job, 300)
    first, second = Chain(run).attempts()
    assert (first.status, dict(first.blamed)) == (76, {}), output(run)
    assert "(guards.hang_minutes)" in output(run)
    assert (second.status, second.checkpoint) == (0, first.reached), output(run)
    assert second.checkpoint >= 10
    runs.assert_same_steps(run, reference)


def test_a_job_whose_node_died_goes_on_when_it_is_back(cluster, data, reference, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, data, "--array=0", **LONG | {"checkpoint__every": 5})
    wait_for_step(cluster, run, 12)
    cluster.kill_node("n2")
    try:
        cluster.wait(lambda: cluster.jobs()[f"{job}_0"][0] == "PENDING", 120, "the job is back in the queue")
    finally:
        cluster.repair("n2")
        cluster.start_node("n2")
    cluster.wait_until_over(job, 300)
    first, second = Chain(run).attempts()
    assert first.status is None or first.told, output(run)
    assert second.name == f"{job}_0-restart1"
    assert (second.status, second.nodes) == (0, ("n1", "n2")), output(run)
    assert second.checkpoint >= 10
    runs.assert_same_steps(run, reference)


def test_a_job_whose_first_node_died_goes_on_with_what_is_left(cluster, data, reference, tmp_path):
    """Rank 0, the script and the owner of the run's folder are gone; another number of ranks goes on."""
    run = tmp_path / "run"
    job = submit(cluster, run, data, "--nodes=1-2", "--array=0", **LONG | {"checkpoint__every": 5})
    wait_for_step(cluster, run, 12)
    cluster.kill_node("n1")
    try:
        cluster.wait_until_over(job, 400)
    finally:
        cluster.repair("n1")
        cluster.start_node("n1")
    first, second = Chain(run).attempts()
    assert (first.nodes, first.status) == (("n1", "n2"), None), output(run)
    assert (second.nodes, second.status) == (("n2",), 0), output(run)
    assert second.checkpoint >= 10
    assert "of 2 ranks at ZeRO-2 goes on with 1 rank at ZeRO-2" in output(run)
    for mine, other in zip(runs.metrics(run), runs.metrics(reference), strict=True):
        for key in ("lr", "data_pos", "rows_sha256", "noise_sha256"):
            assert mine[key] == other[key]
        assert mine["loss"] == pytest.approx(other["loss"], rel=0.01)  # bf16, and other micro-batches
    cluster.wait(lambda: cluster.node_states()["n1"] == "idle", 60, "n1 is back")


def test_a_node_with_a_broken_installation_is_named_and_left_out(cluster, data, tmp_path):
    run = tmp_path / "run"
    with cluster.hidden("n2", Path(sys.prefix)):
        job = submit(cluster, run, data, "--nodes=1-2", "--array=0-3%1", environment={"DLM_MIN_NODES": "1"})
        cluster.wait_until_over(job, 300)
    text = output(run)
    attempts = Chain(run).attempts()
    assert [attempt.nodes for attempt in attempts] == [("n1", "n2"), ("n1", "n2"), ("n1",)], text
    assert [set(attempt.blamed) for attempt in attempts] == [{"n2"}, {"n2"}, set()]
    assert attempts[-1].status == 0
    assert text.count("node n2 failed: ") == 2
    assert "n2: the jobs to come are kept off it" in text
    assert (run / "chain" / "excluded_nodes").read_text() == "n2\n"
    assert (run / "DONE").exists()


def test_a_first_node_without_python_is_left_out(cluster, data, tmp_path):
    """The script itself must see to it: no chain starts there."""
    run = tmp_path / "run"
    with cluster.hidden("n1", Path(sys.prefix)):
        job = submit(cluster, run, data, "--nodes=1-2", "--array=0-1%1")
        cluster.wait_until_over(job, 200)
    text = output(run)
    assert "Python does not run on n1" in text
    assert "kept off n1" in text
    assert [attempt.nodes for attempt in Chain(run).attempts()] == [("n2",)], text
    assert (run / "DONE").exists(), text


def test_a_preempted_run_saves_and_goes_on_afterwards(cluster, data, reference, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, data, "--array=0", **LONG)
    wait_for_step(cluster, run, 12)
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    cluster.wait_until_over(urgent, 120)
    cluster.wait_until_over(job, 300)
    first, second = Chain(run).attempts()
    assert 12 <= first.reached == second.checkpoint < 60, output(run)
    assert second.status == 0, output(run)
    runs.assert_same_steps(run, reference)
    assert not (run / "metrics.replaced.jsonl").exists()
