"""metrics.jsonl of whole runs, made in this process: what it says of rows and times, computed again from the data."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.loader import SampleStream
from data_pipeline.order import SkipList
from dlm_dist import models
from dlm_dist.config import RunConfig, load_config
from dlm_dist.diffusion.model_inputs import model_inputs
from dlm_dist.training.objective import make_objective
from dlm_dist.training.phases import PHASES
from dlm_dist.training.run import train
from dlm_dist.training.sources import open_sources, source_names
from tests.data_pipeline.test_token_files import write_llmc
from tests.distributed import runs

LENGTH, BATCH, STEPS, EVERY = 16, 8, 6, 3


def config(folder: Path, run: Path, *changes: str) -> RunConfig:
    settings = [
        *runs.MODELS["qwen3"],
        f"run.dir={run}",
        f"data.train.0.path={folder / 'a.bin'}",
        f"data.train.1.path={folder / 'b.bin'}",
        "data.train.1.weight=2",
        "data.tokenizer=bytes",
        f"data.sequence_length={LENGTH}",
        "data.random_length_prob=0.3",
        "data.skip=[[4, 9]]",
        f"train.max_steps={STEPS}",
        f"train.global_batch_size={BATCH}",
        "train.micro_batch_size=4",
        "train.device=cpu",
        "train.cpu_threads=1",
        "train.precision=fp32",
        # The weights stay what they are, so that every loss is one of the weights at the end.
        "optimizer.lr=1e-30",
        "checkpoint.every=2",
        f"logging.every={EVERY}",
    ]
    return load_config(None, [*settings, *changes])


def losses_by_time(settings: RunConfig, first: int, last: int) -> tuple[dict[str, float], int]:
    """Mean losses of the steps from `first` to before `last` by tenth of the time, and the tokens of their rows."""
    sources = open_sources(settings)
    stream = SampleStream(sources, [1.0, 2.0], settings.run.seed, SkipList(settings.data.skip))
    objective = make_objective(settings, sources[0])
    model = models.load(settings.run.dir / "checkpoints" / f"step-{STEPS}" / "model")
    nats, tokens, seen = np.zeros(10), np.zeros(10), 0
    for sample in range(first * BATCH, last * BATCH):
        batch = objective.corrupt(stream.read(stream.positions(sample, 1)))
        seen += int(batch.lengths[0])
        inputs = model_inputs(batch, torch.device("cpu"))
        with torch.no_grad():
            losses = model(**inputs, per_row=True)[1].double().numpy() * batch.weights[batch.weights > 0]
        samples, places = np.nonzero(batch.weights)
        times = batch.times[samples] if batch.block_times is None else batch.block_times[samples, places]
        np.add.at(nats, np.floor(times * 10).astype(int), losses)
        for number, length in enumerate(batch.lengths):
            for place in range(length):
                time = batch.times[number] if batch.block_times is None else batch.block_times[number, place]
                tokens[int(time * 10)] += 1
    means = {f"{i / 10:.1f}-{(i + 1) / 10:.1f}": nats[i] / tokens[i] for i in range(10) if tokens[i]}
    return means, seen


@pytest.mark.parametrize(
    "objective",
    [
        ("objective.name=mdlm", "objective.draws_per_row=2"),
        pytest.param(("objective.name=block", "objective.block_lengths=[[0, 4]]"), marks=pytest.mark.slow),
    ],
)
def test_figures_over_steps_are_those_of_their_rows_also_of_a_run_in_two_parts(objective, tmp_path):
    random = np.random.default_rng(0)
    for name, rows in (("a", 10), ("b", 7)):
        write_llmc(tmp_path / f"{name}.bin", random.integers(0, 200, rows * LENGTH + 1))
    settings = config(tmp_path, tmp_path / "run", *objective)
    for steps in (4, STEPS):
        part = config(tmp_path, tmp_path / "run", *objective, f"train.max_steps={steps}")
        train(part, torch.device("cpu"), "auto", ["test"])
    records = runs.metrics(tmp_path / "run")
    assert [record["loss_by_time"] is not None for record in records] == [step % EVERY == 0 for step in range(1, 7)]
    for first, last in ((0, 3), (3, 6)):
        expected, _ = losses_by_time(settings, first, last)
        found = {part: loss for part, loss in records[last - 1]["loss_by_time"].items() if loss is not None}
        assert found == pytest.approx(expected, rel=1e-5)
    _, seen = losses_by_time(settings, 0, STEPS)
    assert records[-1]["tokens_seen"] == seen < STEPS * BATCH * LENGTH

    # Sample numbers 0 to 47 have the positions 0 to 3 and 9 to 52.
    stream = SampleStream(open_sources(settings), [1.0, 2.0], settings.run.seed)
    drawn = stream.order.locate(np.array([*range(4), *range(9, 53)]))[0]
    read = {name: (drawn == i).sum() / stream.sources[i].num_rows for i, name in enumerate(source_names(settings.data))}
    assert records[-1]["epochs"] == pytest.approx(read)
    assert list(read) == [str(tmp_path / "a.bin"), str(tmp_path / "b.bin")]
    for record in records:
        assert (record["slowest_rank"], record["slowest_host"]) == (0, platform.node())
        assert {f"{name}_seconds" for name in (*PHASES[1:], "data_wait")} <= set(record)
    assert [record["seconds_left"] is None for record in records] == [True, False, False, False, True, False]


def test_a_causal_run_has_no_losses_by_time(tmp_path):
    write_llmc(tmp_path / "a.bin", np.random.default_rng(0).integers(0, 200, 10 * LENGTH + 1))
    write_llmc(tmp_path / "b.bin", np.random.default_rng(1).integers(0, 200, 10 * LENGTH + 1))
    settings = config(tmp_path, tmp_path / "run", "objective.name=ar", "model.direction=causal", "train.max_steps=3")
    train(settings, torch.device("cpu"), None, ["test"])
    last = runs.metrics(tmp_path / "run")[-1]
    assert last["loss_by_time"] is None
    assert last["grad_norm_by_role"] is not None
    assert last["epochs"] is not None


def test_a_source_that_occurs_again_is_numbered(tmp_path):
    settings = config(tmp_path, tmp_path, f"data.train.1.path={tmp_path / 'a.bin'}")
    assert source_names(settings.data) == [str(tmp_path / "a.bin"), f"{tmp_path / 'a.bin'} (2)"]
