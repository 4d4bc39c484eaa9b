"""A checkpoint goes on with other ranks and another ZeRO stage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dlm_dist.training.elastic import SavedShards
from dlm_dist.training.pieces import Piece
from dlm_dist.training.quantisation import BLOCK, dequantise
from tests.distributed import runs

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).resolve().parents[2]
SUB_GROUPS = "deepspeed.zero_optimization.sub_group_size=2000"
STAGES = {
    "0": ["zero.stage=0"],
    "1": ["zero.stage=1"],
    "2": ["zero.stage=2"],
    "3": ["zero.stage=3"],
    "3s": ["zero.stage=3", SUB_GROUPS],
}


def work(ranks: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Run `jobs` (elastic_worker.py) in a world of `ranks` processes."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    shared = runs.environment(ranks) | {"LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(runs.free_port()), "WORLD_SIZE": str(ranks)}
    shared["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.distributed.elastic_worker", str(folder / "jobs.json")]
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with open(log, "w") as output:
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, cwd=folder, env=own, stdout=output, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, "\n".join(log.read_text()[-3000:] for log in logs)


def decoded(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Master, EMA and optimizer states of every parameter as whole fp32 vectors, whoever wrote them; step counts."""
    model = load_file(path / "model" / "model.safetensors")
    saved = SavedShards(path, {name: value.numel() for name, value in model.items()})
    found = {}
    for name, value in model.items():
        size = value.numel()
        master = torch.empty(size)
        runs_of = saved.runs([Piece(name, 0, 0, size)])
        saved.copy_weights(runs_of, "master", master)
        found[name, "master"] = master
        for run in runs_of:
            averages = ("ema",) if run.saved.ema else ()
            state = {key: saved.whole(run.saved, key) for key in (*run.saved.tensors, *averages)}
            state |= dict(run.saved.numbers)
            for key, tensor in state.items():
                if key == "step":
                    assert found.setdefault((name, key), torch.tensor(float(tensor))) == float(tensor)
                elif not key.startswith(("absmax", "qmap")):
                    flat = tensor.reshape(-1)
                    if tensor.dtype == torch.uint8:
                        scales = state[f"absmax{key[-1]}"].repeat_interleave(BLOCK)[: len(flat)]
                        flat = dequantise(flat, scales, state[f"qmap{key[-1]}"])
                    whole = found.setdefault((name, key), torch.full((size,), torch.nan))
                    # `run.to` counts from the start of the parameter here.
                    whole[run.to : run.to + run.numel] = flat[run.start : run.start + run.numel]
    return found


def assert_same_state(path: Path, reference: Path) -> None:
    ours, theirs = decoded(path), decoded(reference)
    assert {"master", "ema", "step"} <= {what for _, what in theirs}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (path, reference))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


CASES = [(precision, optimizer) for precision in ("bf16", "fp32") for optimizer in ("adamw", "adamw8bit", "lion8bit")]
CASES.append(("bf16", "lion"))


@pytest.mark.slow
def test_a_chain_through_worlds_and_stages_changes_nothing(tmp_path):
    """2 ranks -> 4 -> 1 -> 2, another stage each time, all optimizers: every value to the bit, then the very bytes."""
    order = list(STAGES)
    hops = [(2, 0), (4, 2), (1, 4), (2, 0)]
    worlds: list[list[dict[str, Any]]] = []
    for hop, (_, shift) in enumerate(hops):
        jobs = []
        for precision, optimizer in CASES:
            for number, source in enumerate(order):
                name = f"{precision}-{optimizer}-{source}"
                stage = order[(number + shift) % len(order)]
                settings = [*STAGES[stage], f"train.precision={precision}", f"optimizer.name={optimizer}"]
                before = str(tmp_path / f"hop{hop - 1}" / name / "step-1") if hop else None
                to = str(tmp_path / f"hop{hop}" / name)
                jobs.append({"settings": settings, "from": before, "to": to, "steps": 0 if hop else 2})
        worlds.append(jobs)
        work(hops[hop][0], jobs, tmp_path / f"world{hop}")
    for hop in (1, 2, 3):
        for job in worlds[hop]:
            folder = Path(job["to"])
            first = tmp_path / "hop0" / folder.name / "step-1"
            assert_same_state(folder / "step-1", first)
            loaded = json.loads((folder / "report.json").read_text())
            assert loaded["converted_shards"] > 0
            assert loaded["requantised_blocks"] == 0
            eight_bit = "8bit" in folder.name
            assert (loaded["converted_blocks"] > 0) == eight_bit
    for job in worlds[3]:
        folder = Path(job["to"])
        for file in sorted((tmp_path / "hop0" / folder.name / "step-1" / "tensors").glob("*.safetensors")):
            ours, theirs = load_file(folder / "step-1" / "tensors" / file.name), load_file(file)
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                if not key.endswith(("master", "ema")):
                    assert torch.equal(ours[key], value), (folder.name, key)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.build_data(tmp_path_factory.mktemp("data"))


def branch(run: Path, name: str, step: int) -> Path:
    """A copy of a run as it stood after the checkpoint of `step`; its metrics stay whole, a resume cuts them."""
    copy = shutil.copytree(run, run.with_name(name))
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return copy


def assert_goes_on(run: Path, reference: Path, step: int, exact: bool = True) -> None:
    """The same rows, masks and rates as `reference` behind `step`, the first loss to the bit, the others nearly."""
    ours, theirs = runs.metrics(run), runs.metrics(reference)
    for key in ("step", "rows_sha256", "noise_sha256", "data_pos", "lr", "skipped"):
        assert [record[key] for record in ours] == [record[key] for record in theirs], key
    first, expected = ours[step]["loss"], theirs[step]["loss"]
    assert first == expected if exact else first == pytest.approx(expected, rel=1e-5)
    for mine, other in zip(ours[step:], theirs[step:], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-3 if exact else 2e-2)


def elastic_notes(run: Path) -> list[str]:
    start = json.loads((run / "manifest.json").read_text())["starts"][-1]
    notes = [note for note in start["notes"] if note.startswith("elastic resume")]
    assert (start["conversion"] is not None) == bool(notes)
    return notes


def test_a_run_grows_and_shrinks(data, tmp_path):
    def settings(run, **changes):
        changes = {"train__max_steps": 6, "checkpoint__every": 2, "train__precision": "fp32"} | changes
        changes |= {"optimizer__name": "adamw8bit", "train__micro_batch_size": 2}
        return runs.overrides(data, run, train__gradient_accumulation_steps=None, **changes)

    one = tmp_path / "one"
    runs.train(settings(one, zero__stage=0), ranks=1)
    two = branch(one, "two", step=2)
    output = runs.train(settings(two, zero__stage=3), ranks=2, resume="auto")
    assert "note: elastic resume: step-2 of 1 rank at ZeRO-0 goes on with 2 ranks at ZeRO-3" in output
    assert_goes_on(two, one, step=2)
    again = branch(two, "again", step=4)
    runs.train(settings(again, zero__stage=2), ranks=1, resume="auto")
    assert_goes_on(again, two, step=4)
    (note,) = elastic_notes(again)
    assert "step-4 of 2 ranks at ZeRO-3 goes on with 1 rank at ZeRO-2" in note
    assert " 0 of " in note
    assert elastic_notes(one) == []


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit"])
@pytest.mark.parametrize(
    ("backbone", "precision", "path"),
    [
        ("rwkv7", "bf16", [(1, 0), (2, 3), (4, 1)]),
        ("qwen3", "bf16", [(4, 2), (1, 3), (2, 0)]),
        ("rwkv7", "fp32", [(4, 3), (2, 1), (1, 2)]),
        ("qwen3", "fp32", [(2, 0), (4, 2), (1, 1)]),
    ],
)
def test_runs_go_on_in_other_worlds(optimizer, backbone, precision, path, data, tmp_path):
    """Each start resumes the one before it from two steps earlier than its end, with other ranks and another stage."""
    before = None
    for number, (ranks, stage) in enumerate(path):
        run = tmp_path / str(number) if before is None else branch(before, str(number), step=2 + 2 * number)
        changes = {"zero__stage": stage, "optimizer__name": optimizer, "train__precision": precision}
        changes |= {"train__micro_batch_size": 2, "train__gradient_accumulation_steps": None}
        changes |= {"train__max_steps": 8, "checkpoint__every": 2, "model__direction": "bidirectional"}
        runs.train(runs.overrides(data, run, backbone, **changes), ranks, resume=None if before is None else "auto")
        if before is not None:
            assert len(elastic_notes(run)) == 1
            assert_goes_on(run, before, step=2 + 2 * number)
        before = run


@pytest.mark.slow
def test_blocks_that_are_cut_are_quantised_again_and_said_to_be(data, tmp_path):
    """A width of 32 on three ranks: parts are no multiples of 256."""
    settings = {"optimizer__name": "adamw8bit", "train__max_steps": 8, "train__global_batch_size": 12}
    settings |= {"train__gradient_accumulation_steps": None, "train__micro_batch_size": 2}
    settings |= {"train__precision": "fp32"}
    two = tmp_path / "two"
    runs.train(runs.overrides(data, two, **settings, zero__stage=1), ranks=2)
    three = branch(two, "three", step=4)
    runs.train(runs.overrides(data, three, **settings, zero__stage=3), ranks=3, resume="auto")
    assert_goes_on(three, two, step=4)
    (note,) = elastic_notes(three)
    assert " 0 of " not in note
    # Another cut into micro-batches: another order of summation.
    other = branch(two, "other", step=4)
    settings["train__micro_batch_size"] = 3
    runs.train(runs.overrides(data, other, **settings, zero__stage=1), ranks=2, resume="auto")
    assert_goes_on(other, two, step=4, exact=False)
    assert elastic_notes(other) == []
