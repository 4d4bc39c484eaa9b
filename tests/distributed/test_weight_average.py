"""The EMA of the weights over several ranks: saved and loaded, killed, rolled back, asked for later and dropped."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dlm_dist.training.checkpoint_files import load_trainer_state
from tests.distributed import runs
from tests.distributed.test_elastic import STAGES, work
from tests.distributed.test_guards import NERVOUS
from tests.distributed.test_resume import kill_twice_and_compare

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.build_data(tmp_path_factory.mktemp("data"))


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in tensors/, by the rank that wrote it."""
    files = sorted((checkpoint / "tensors").glob("*.safetensors"))
    return {f"{file.stem} {key}": value for file in files for key, value in load_file(file).items()}


def assert_same_tensors(run: Path, reference: Path) -> None:
    ours, theirs = tensors(run), tensors(reference)
    assert ours.keys() == theirs.keys()
    averages = [key for key in theirs if key.endswith("/ema")]
    assert len(averages) == len([key for key in theirs if key.endswith("/master")]) > 0
    assert any(not torch.equal(theirs[key], theirs[key.replace("/ema", "/master")]) for key in averages)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def test_two_ranks_go_on_with_the_same_average(tmp_path):
    """Over every layout, precision and kind of state: saved, loaded and trained on as if never stopped."""
    halves, wholes = [], []
    for stage, (precision, optimizer) in itertools.product(
        STAGES, [("bf16", "adamw8bit"), ("fp32", "adamw"), ("bf16", "lion8bit")]
    ):
        settings = [*STAGES[stage], f"train.precision={precision}", f"optimizer.name={optimizer}"]
        folder = tmp_path / f"{stage}-{precision}-{optimizer}"
        job = {"settings": settings, "from": None, "to": str(folder / "half"), "steps": 2}
        loaded = {"from": str(folder / "half" / "step-1"), "to": str(folder / "on"), "first": 2}
        halves += [job, job | loaded]
        wholes.append(job | {"to": str(folder / "whole"), "steps": 4})
    work(2, halves + wholes, tmp_path / "world")
    for job in wholes:
        whole = Path(job["to"])
        assert_same_tensors(whole.parent / "on" / "step-1", whole / "step-1")


@pytest.mark.parametrize(
    ("stage", "optimizer", "asynchronous"),
    [(0, "adamw8bit", False), (3, "lion8bit", True)],
)
def test_a_killed_run_ends_with_the_same_average(stage, optimizer, asynchronous, data, tmp_path):
    def settings(run):
        changes = {"zero__stage": stage, "optimizer__name": optimizer, "checkpoint__asynchronous": asynchronous}
        return runs.overrides(data, run, "qwen3", train__ema_half_life=40, **changes)

    kill_twice_and_compare(settings, tmp_path, ranks=2)
    final = Path("checkpoints") / "step-12"
    assert_same_tensors(tmp_path / "killed" / final, tmp_path / "reference" / final)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_rollback_takes_back_its_average(stage, data, tmp_path):
    """Killed and resumed among rollbacks it is that of the run that was never stopped."""

    def settings(run):
        changes = {"guards__grad_norm_spike": 0.7, "zero__stage": stage, "train__ema_half_life": 40}
        return runs.overrides(data, run, "qwen3", **NERVOUS, **changes)

    reference, killed = tmp_path / "reference", tmp_path / "killed"
    runs.train(settings(reference), ranks=2)
    assert any(record["rollbacks"] for record in runs.metrics(reference))
    runs.train_and_kill(settings(killed), killed, at_step=25, ranks=2)
    runs.train(settings(killed), ranks=2, resume="auto")
    runs.assert_same_steps(killed, reference)
    final = Path("checkpoints") / "step-40"
    assert_same_tensors(killed / final, reference / final)


def test_it_may_be_asked_for_later_and_dropped(data, tmp_path):
    """And training is the same with it and without."""
    run, reference = tmp_path / "run", tmp_path / "reference"

    def to(step, run=run, **changes):
        changes |= {"optimizer__schedule": "constant", "train__max_steps": step}
        return runs.train(runs.overrides(data, run, **changes), ranks=1, resume="auto")

    to(4)
    output = to(8, train__ema_half_life=40)
    assert "note: train.ema_half_life is 40 and step-4 has no EMA: it starts from the weights of step-4" in output
    assert load_trainer_state(run / "checkpoints" / "step-8")["ema_half_life"] == 40
    assert any(key.endswith("/ema") for key in tensors(run / "checkpoints" / "step-8"))
    output = to(12)
    assert "note: the EMA of step-8 is dropped, since train.ema_half_life is null" in output
    assert not any(key.endswith("/ema") for key in tensors(run / "checkpoints" / "step-12"))
    notes = [start["notes"] for start in json.loads((run / "manifest.json").read_text())["starts"]]
    assert any("is dropped" in note for note in notes[-1])
    to(12, run=reference)
    runs.assert_same_steps(run, reference)
