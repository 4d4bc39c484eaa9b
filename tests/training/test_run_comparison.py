"""`dlm compare` on real runs, made in this process: the figures are those of their files."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from dlm_dist.config import load_config
from dlm_dist.runs import comparison
from dlm_dist.training.run import train
from tests.commands import dlm, mistake
from tests.data_pipeline.test_token_files import write_llmc
from tests.distributed import runs


def start(folder: Path, name: str, *changes: str, tokens: str = "tokens.bin") -> Path:
    """A run of four steps."""
    settings = [
        *runs.MODELS["qwen3"],
        f"run.dir={folder / name}",
        f"data.train.0.path={folder / 'tokens.bin'}",
        f"data.validation={folder / tokens}",
        "data.tokenizer=bytes",
        "data.sequence_length=16",
        "train.max_steps=4",
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
        "train.precision=fp32",
        "train.device=cpu",
        "train.cpu_threads=1",
        "train.eval_rows=4",
        "optimizer.schedule=constant",
        "checkpoint.every=4",
    ]
    train(load_config(None, [*settings, *changes]), torch.device("cpu"), None, ["test"])
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with three runs: two seeds at one learning rate, one at another."""
    folder = tmp_path_factory.mktemp("sweep")
    for seed, name in enumerate(("tokens.bin", "other.bin")):
        write_llmc(folder / name, np.random.default_rng(seed).integers(97, 123, 25 * 16))
    start(folder, "lr=0.001,seed=0", "optimizer.lr=1e-3")
    start(folder, "lr=0.001,seed=1", "optimizer.lr=1e-3", "run.seed=1")
    start(folder, "lr=0.01,seed=0", "optimizer.lr=1e-2")
    return folder


def test_only_what_differs_is_shown_and_seeds_are_grouped(folder, capsys):
    assert dlm("compare", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "step", "loss", "bound", "bits/byte", "tokens/s", "run.seed", "optimizer.lr"]
    assert [line.split()[0] for line in lines[1:4]] == ["lr=0.001,seed=0", "lr=0.001,seed=1", "lr=0.01,seed=0"]
    assert lines[7].split()[0] == "2"
    assert not any(line.startswith("note:") for line in lines)


def test_the_figures_are_those_of_the_files(folder, capsys):
    assert dlm("compare", folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    for run in found["runs"]:
        records = runs.metrics(Path(run["path"]))
        assert run["loss"] == statistics.fmean(record["loss"] for record in records)
        assert run["tokens_per_second"] == statistics.median(record["tokens_per_second"] for record in records)
        evaluated = json.loads((Path(run["path"]) / "evaluations.jsonl").read_text().splitlines()[-1])
        assert (run["bound"], run["bound_error"]) == (evaluated["bound_nats_per_token"], evaluated["standard_error"])
        assert run["bits_per_byte_error"] / run["bits_per_byte"] == pytest.approx(run["bound_error"] / run["bound"])
    (group,) = found["seeds"]
    bounds = [run["bound"] for run in found["runs"][:2]]
    assert group["bound"] == [statistics.fmean(bounds), statistics.stdev(bounds)]
    assert group["values"] == {"optimizer.lr": 0.001}
    assert found["notes"] == []


def test_a_line_of_csv_per_run(folder, capsys):
    assert dlm("compare", folder, "--csv", "--sort", "bound") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    bounds = [float(row["bound"]) for row in rows]
    assert bounds == sorted(bounds)
    assert {row["optimizer.lr"] for row in rows} == {"0.001", "0.01"}


def test_what_must_not_be_compared_is_told(folder, tmp_path, capsys):
    base = folder / "lr=0.001,seed=0"
    for name in ("tokens.bin", "other.bin"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    exact = start(tmp_path, "ar", "objective.name=ar", "model.direction=causal", "optimizer.lr=1e-3")
    assert dlm("compare", base, exact) == 0
    text = capsys.readouterr().out
    assert "note: objective.name differs (mdlm, ar): their training losses are different numbers" in text
    assert "note: some bounds are the exact likelihood, others lie above it" in text
    other = start(tmp_path, "other", "optimizer.lr=1e-3", "train.max_steps=3", tokens="other.bin")
    notes = comparison.notes([comparison.summarise(base), comparison.summarise(other)])
    assert notes == [
        "2 different sets of held-out rows: their bounds are not comparable",
        "the runs stand at different steps, 3 to 4",
        "the runs were evaluated at different steps, 3 to 4",
    ]


def test_a_run_that_has_only_been_started(folder, tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes((folder / "lr=0.01,seed=0" / "config.yaml").read_bytes())
    assert dlm("compare", folder, tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].split()[1:6] == ["-"] * 5


def test_folders_that_are_no_runs(folder, tmp_path, capsys):
    assert "is no run (no config.yaml), and none of its folders is one" in mistake(capsys, "compare", tmp_path)
    assert "there is no such folder" in mistake(capsys, "compare", tmp_path / "nowhere")


def test_of_a_long_log_only_the_end_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 0, "text": "x" * 500})
    with open(path, "w") as file:
        file.writelines(f"{line}\n" for _ in range(2_000))
        file.writelines(json.dumps({"step": step}) + "\n" for step in range(300))
        file.write('{"step": 300, "cut o')
    from dlm_dist.runs import folder as module

    blocks = []

    class Counted(io.FileIO):
        def read(self, size=-1):
            blocks.append(size)
            return super().read(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open", Counted, raising=False)
        assert [record["step"] for record in module.newest_records(path, 200)] == list(range(100, 300))
    assert sum(blocks) < 200_000
    assert [record["step"] for record in module.newest_records(path, 10**6)][-1] == 299
    assert len(module.newest_records(path, 10**6)) == 2_300
