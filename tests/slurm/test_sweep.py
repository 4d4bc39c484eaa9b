"""A sweep on a real cluster: every task its own run, put back into the queue by itself, and taken up again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from dlm_dist.training.chain import Chain
from tests.commands import dlm
from tests.distributed import runs
from tests.slurm.cluster import Cluster
from tests.slurm.test_chain import OF_A_JOB, wait_for_step

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture
def grid(data, tmp_path):
    """A grid of two seeds."""
    overrides = runs.overrides(data, tmp_path / "unused", "qwen3", train__max_steps=60, checkpoint__every=25)
    tree = {
        "config": str(runs.REPOSITORY / "tests" / "distributed" / "tiny.yaml"),
        "dir": str(tmp_path / "sweep"),
        "overrides": [override for override in overrides if not override.startswith("run.dir=")],
        "grid": {"run.seed": [5, 6]},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "grid.yaml"


def submit(cluster: Cluster, grid: Path, tasks: str) -> int:
    everything = runs.environment(1) | OF_A_JOB
    place = [f"--chdir={runs.REPOSITORY}", f"--output={grid.parent}/%a.out", f"--array={tasks}"]
    return cluster.submit(*place, "slurm/sweep.sbatch", str(grid), environment=everything)


def test_every_task_finishes_its_own_run(cluster, grid, tmp_path, capsys):
    def said(task: int) -> str:
        return (tmp_path / f"{task}.out").read_text()

    first, second = (tmp_path / "sweep" / f"seed={seed}" for seed in (5, 6))
    job = submit(cluster, grid, "0-1%1")
    wait_for_step(cluster, first, 10, 240)
    cluster.run("scancel", "--signal=USR1", f"{job}_0", check=False)
    cluster.wait_until_over(job, 500)
    for task, run in enumerate((first, second)):
        assert (run / "DONE").exists(), said(task)
        assert runs.last_step(run) == 60
    # Task 1 waited when task 0 ended, and yet it was task 0 that went on.
    assert [attempt.status for attempt in Chain(first).attempts()] == [75, 0], said(0)
    assert {attempt.name.partition("-")[0] for attempt in Chain(first).attempts()} == {f"{job}_0"}
    capsys.readouterr()
    assert dlm("sweep", "list", grid) == 0
    assert "all 2 done" in capsys.readouterr().out
    assert dlm("compare", tmp_path / "sweep", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["config"] for run in found["runs"]] == [{"run.seed": 5}, {"run.seed": 6}]
    # Once more: one has nothing to do, and the other number names no run.
    job = submit(cluster, grid, "1-2")
    cluster.wait_until_over(job, 200)
    assert "nothing is left to do" in said(1)
    assert "grid.yaml has 2 runs, 0 to 1, and no 2: submit it with --array=0-1" in said(2)


def test_a_node_without_python_ends_no_task(cluster, grid, tmp_path):
    """An idle node on which every task fails at once is given one after the other."""
    with cluster.hidden("n1", Path(sys.prefix)):
        job = submit(cluster, grid, "0-1%1")
        cluster.wait_until_over(job, 500)
    for task, seed in enumerate((5, 6)):
        said = (tmp_path / f"{task}.out").read_text()
        run = tmp_path / "sweep" / f"seed={seed}"
        assert (run / "DONE").exists(), said
        assert [attempt.nodes for attempt in Chain(run).attempts()] == [("n2",)], said
