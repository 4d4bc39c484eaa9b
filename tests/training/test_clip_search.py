"""A run that chooses its range of times: what it trains on follows from its checkpoint, and a resume repeats it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.loader import SampleStream
from dlm_dist.config import ConfigError, RunConfig, load_config, resolve_batch
from dlm_dist.diffusion.block_diffusion import ClipRange
from dlm_dist.diffusion.mask_noise import WithMaskNoise
from dlm_dist.training.batches import gather_totals, prepare_step
from dlm_dist.training.objective import make_objective
from dlm_dist.training.run import train
from dlm_dist.training.sources import open_sources
from tests.data_pipeline.test_token_files import write_llmc
from tests.distributed import runs

LENGTH, BATCH, STEPS = 32, 8, 8


def config(folder: Path, run: Path, *changes: str) -> RunConfig:
    settings = [
        *runs.MODELS["qwen3"],
        f"run.dir={run}",
        f"data.train.0.path={folder / 'train.bin'}",
        f"data.validation={folder / 'validation.bin'}",
        "data.tokenizer=bytes",
        f"data.sequence_length={LENGTH}",
        "objective.name=block",
        "objective.block_lengths=[[1280, 8], [0, 4]]",
        "objective.clip_search=true",
        "objective.mask_noise_std=0.1",
        "objective.mask_noise_samples=1000",
        f"train.max_steps={STEPS}",
        f"train.global_batch_size={BATCH}",
        "train.micro_batch_size=4",
        "train.eval_every=2",
        "train.eval_rows=16",
        "train.precision=fp32",
        "train.device=cpu",
        "optimizer.schedule=constant",
        "optimizer.lr=1e-2",
        "checkpoint.every=3",
    ]
    return load_config(None, [*settings, *changes])


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def noise_of(settings: RunConfig, ranges: tuple[ClipRange, ...]) -> list[str]:
    """noise_sha256 of every step, from the configuration and the choices alone."""
    source = open_sources(settings)[0]
    stream = SampleStream([source], [1.0], settings.run.seed)
    made = make_objective(settings, source)
    assert isinstance(made, WithMaskNoise)
    objective = replace(made, objective=replace(made.objective, clip_ranges=ranges))
    plan = resolve_batch(settings.train, 1)
    steps = (stream.positions(step * BATCH, BATCH) for step in range(STEPS))
    prepared = (prepare_step(stream.read, objective, at, plan, 0, 1) for at in steps)
    return [gather_totals(step, None, ready=True, alarm=False).noise_sha256 for step in prepared]


def test_the_choices_are_a_function_of_the_checkpoint(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, rows in (("train", 48), ("validation", 16)):
        write_llmc(tmp_path / f"{name}.bin", np.sort(random.integers(0, 200, (rows, LENGTH)), axis=1).reshape(-1))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = config(tmp_path, whole)
    train(settings, torch.device("cpu"), None, ["test"])
    # Once it ends between two searches, and once at the step of one, which is behind its checkpoint.
    for steps in (3, 4, STEPS):
        train(config(tmp_path, cut, f"train.max_steps={steps}"), torch.device("cpu"), "auto", ["test"])
    runs.assert_same_steps(cut, whole)
    assert lines(cut) == lines(whole)
    searches = [record["clip_search"] for record in lines(whole)]
    assert [record["step"] for record in lines(whole)] == [0, 2, 4, 6, 8]
    assert searches[0] is None
    assert [found["block_length"] for found in searches[1:]] == [8, 8, 4, 4]
    assert [found["from_position"] for found in searches[1:]] == [16, 32, 48, 64]
    assert all(found["variance"] <= found["full_variance"] for found in searches[1:])
    assert {record["bound_nats_per_token"] for record in runs.metrics(whole)} == {None}
    # Evaluations stay over all times.
    assert all(part["draws"] > 0 for record in lines(whole) for part in record["loss_by_time"])

    state = json.loads((whole / "checkpoints" / "step-8" / "trainer_state.json").read_text())
    assert state == json.loads((cut / "checkpoints" / "step-8" / "trainer_state.json").read_text())
    ranges = tuple(ClipRange(*chosen) for chosen in state["clip_ranges"])
    assert {chosen.block_length for chosen in ranges} == {4, 8}
    for chosen in ranges:
        found = searches[chosen.position // 16]
        assert (found["t_min"], found["t_max"]) == (chosen.t_min, chosen.t_max) != (0.0, 1.0)
    recorded = [record["noise_sha256"] for record in runs.metrics(whole)]
    assert recorded == noise_of(settings, ranges), "read ahead under an old range"
    # Blocks of 4 begin at position 40, and have a range of their own only once it was searched for them.
    first = {length: min(c.position for c in ranges if c.block_length == length) for length in (8, 4)}
    clipped = [first[8] <= at < 40 or at >= first[4] for at in range(0, STEPS * BATCH, BATCH)]
    unclipped = noise_of(settings, ())
    assert [a != b for a, b in zip(recorded, unclipped, strict=True)] == clipped

    with pytest.raises(ConfigError, match=r"train\.eval_every is 4, the checkpoint was trained with 2"):
        train(config(tmp_path, cut, "train.eval_every=4"), torch.device("cpu"), "auto", ["test"])
