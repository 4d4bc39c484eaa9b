"""The search for the range of times of least variance: what it finds, and that it compares what is trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipeline.shards import ShardedSource, write_source
from data_pipeline.tokenizers import load
from dlm_dist.diffusion.base import Vocabulary
from dlm_dist.diffusion.block_diffusion import BlockDiffusion
from dlm_dist.evaluation.bound import EVALUATION_SEED, measure_samples, timed_parts
from dlm_dist.evaluation.clip_search import MIN_BLOCKS, RANGES, least_variance, search_range

CPU = torch.device("cpu")
LENGTH, BLOCK = 32, 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ShardedSource:
    folder, tokenizer = tmp_path_factory.mktemp("rows"), load("bytes")
    write_source(folder, np.random.default_rng(0).integers(32, 127, (64, LENGTH)), tokenizer)
    return ShardedSource.open(folder)


class Costs(torch.nn.Module):
    """A hidden token of a block with k of them costs COSTS[k] nats, times what its id says."""

    COSTS = torch.tensor([0.0, 9.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.2, 20.0])

    def __init__(self, mask_id: int) -> None:
        super().__init__()
        self.mask_id = mask_id

    def forward(self, input_ids, supervised, targets, weights, per_row, clean_ids, block_ids):
        hidden = (input_ids == self.mask_id).reshape(len(input_ids), -1, BLOCK).sum(dim=2)
        rows = self.COSTS[hidden[supervised // LENGTH, supervised % LENGTH // BLOCK]] * (1 + targets / 400)
        return (rows * weights).sum(), rows


def objective(source: ShardedSource, **changes: object) -> BlockDiffusion:
    made = BlockDiffusion(seed=3, vocabulary=Vocabulary(source.mask_id, source.eos_id), clip_search=True)
    return replace(made, **changes)


def test_the_grid_is_that_of_the_paper() -> None:
    assert len(RANGES) == len(set(RANGES)) == 36
    assert RANGES[0] == (0.0, 1.0)
    widths = {round(high - low, 10) for low, high in RANGES}
    assert widths == {0.5, 0.6, 0.7, 0.8, 0.9, 1.0}
    assert {low for low, high in RANGES if round(high - low, 10) == 0.5} == {i / 20 for i in range(11)}
    assert max(high for _, high in RANGES) == 1.0


def test_the_range_of_least_variance_is_found() -> None:
    random = np.random.default_rng(0)
    times = random.random(20_000)
    quiet = (times >= 0.35) & (times <= 0.85)
    losses = 2.0 + random.normal(size=20_000) * np.where(quiet, 0.5, 3.0)
    found = least_variance(times, losses)
    assert (found.t_min, found.t_max, found.blocks) == (0.35, 0.85, 20_000)
    assert found.variance == pytest.approx(0.25, rel=0.05)
    assert found.full_variance == pytest.approx(losses.var())


def test_without_grounds_all_times_stay() -> None:
    times = np.linspace(0.0, 1.0, 100)
    for losses in (np.full(100, 2.0), np.full(100, np.nan)):
        found = least_variance(times, losses)
        assert (found.t_min, found.t_max) == (0.0, 1.0)
    few = least_variance(times[:: 100 // MIN_BLOCKS], np.arange(MIN_BLOCKS) % 7.0)
    assert (few.t_min, few.t_max) == (0.0, 1.0), "all blocks together are enough, any part of them is not"


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
def test_what_is_compared_is_what_training_would_draw(source: ShardedSource, masking: str) -> None:
    model = Costs(source.mask_id)
    choice = search_range(
        model, source, CPU, objective(source, masking=masking), block_length=BLOCK, num_rows=64, draws=8
    )
    assert choice.blocks == 64 * 8 * (LENGTH // BLOCK)
    assert (choice.t_min, choice.t_max) != (0.0, 1.0)

    def drawn(t_min: float, t_max: float) -> np.ndarray:
        """Losses of blocks with times from a range, by other draws than those of the search."""
        made = objective(
            source, masking=masking, block_lengths=((0, BLOCK),), seed=EVALUATION_SEED + 1, t_min=t_min, t_max=t_max
        )

        def measure(batch, losses):
            _, nats, tokens = timed_parts(batch, losses)
            return nats / tokens

        return measure_samples(model, source, CPU, made, measure, num_rows=64, draws=16).reshape(-1)

    for range_, said in (((choice.t_min, choice.t_max), choice.variance), ((0.0, 1.0), choice.full_variance)):
        losses = drawn(*range_)
        squares = (losses - losses.mean()) ** 2
        # The search has the spread of a variance of half as many blocks, or fewer.
        error = squares.std() / np.sqrt(len(losses)) * np.sqrt(1 + 2 / (range_[1] - range_[0]))
        assert abs(said - squares.mean()) < 4 * error, range_


def test_what_the_run_has_chosen_and_cuts_does_not_matter(source: ShardedSource) -> None:
    model = Costs(source.mask_id)
    plain, clipped = (
        search_range(model, source, CPU, objective(source, **changes), block_length=BLOCK, num_rows=9)
        for changes in ({}, {"seed": 8, "t_min": 0.5, "random_length_prob": 1.0, "block_lengths": ((0, 4),)})
    )
    assert plain == clipped
    assert plain != search_range(model, source, CPU, objective(source), block_length=BLOCK, num_rows=10)
