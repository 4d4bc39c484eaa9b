"""Two ranks agree on a checkpoint or all refuse it: no mixed load, no rank left waiting, nothing half published."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from dlm_dist.training import checkpoint_files
from dlm_dist.training.checkpoint_files import MANIFEST
from tests.distributed import runs
from tests.test_checkpoint_command import publish

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def damage(path):
    path.write_bytes(path.read_bytes()[::-1])


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What both ranks said of each case; rank 1 sees a copy of rank 0's files that differs."""
    folder = tmp_path_factory.mktemp("views")
    (folder / "shared").mkdir()
    changes = {
        "alike": lambda view: None,
        "damaged for both": lambda view: None,
        "not there yet": lambda view: shutil.rmtree(view / "step-8"),
        "no manifest yet": lambda view: (view / "step-8" / "manifest.json").unlink(),
        "another one of the same name": lambda view: (shutil.rmtree(view / "step-8"), publish(view, 8, b"other")),
        "a file is not there yet": lambda view: (view / "step-8" / "tensors" / "rank-00000.safetensors").unlink(),
        # All of them, since the ranks share the hashing: rank 1 reads but some.
        "files are old": lambda view: [damage(x) for x in (view / "step-8").rglob("*.*") if x.name != MANIFEST],
    }
    for case, change in changes.items():
        view = folder / "cases" / case / "rank-0" / "checkpoints"
        for step in (4, 8):
            publish(view, step)
        if case == "damaged for both":
            damage(view / "step-8" / "model" / "model.safetensors")
        shutil.copytree(view.parent, view.parent.with_name("rank-1"))
        change(folder / "cases" / case / "rank-1" / "checkpoints")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.checkpoint_worker", str(rank), str(folder)],
            cwd=runs.REPOSITORY,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(250) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    one, other = (json.loads((folder / f"answer-{rank}.json").read_text()) for rank in range(2))
    assert checkpoint_files.verify(folder / "shared" / "checkpoints" / "step-3") == []
    assert one.keys() == other.keys() == {*changes, "write"}
    return {case: (one[case], other[case]) for case in one}


def test_the_same_view_is_loaded(answers):
    one, other = answers["alike"]
    assert one == other == "(PosixPath('checkpoints/step-8'), [])"


def test_what_is_damaged_for_all_is_passed_over_by_all(answers):
    one, other = answers["damaged for both"]
    assert one == other
    assert one.startswith("(PosixPath('checkpoints/step-4'), ['checkpoints/step-8 does not verify: ")


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("not there yet", "another manifest.json"),
        ("no manifest yet", "another manifest.json"),
        ("another one of the same name", "another manifest.json"),
        ("a file is not there yet", "rank-00000.safetensors is missing"),
        ("files are old", "does not have its recorded SHA-256"),
    ],
)
def test_a_rank_that_sees_something_else_stops_all(answers, case, what):
    """It is neither loaded, nor passed over as if it were damaged: that would train again what is trained."""
    one, other = answers[case]
    assert one == other
    assert one.startswith("error: rank 1 on ")
    assert "does not see checkpoints/step-8 as rank 0" in one
    assert what in one


def test_a_disk_that_is_full_for_one_rank_stops_the_save_of_all(answers):
    problem = "error: checkpoint step-2 could not be written: rank 1: [Errno 28] No space left on device"
    expected = ["step 1  saved checkpoints/step-1", "['step-1']", problem, "['step-1']"]
    expected += ["step 3  saved checkpoints/step-3", "['step-3']"]
    assert answers["write"] == (expected, expected)
