"""A loss told apart by diffusion time: every token and every scored place belongs to one bucket."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dlm_dist.diffusion.mask_noise import WithMaskNoise
from dlm_dist.diffusion.objectives import OBJECTIVES, Vocabulary
from dlm_dist.diffusion.time_buckets import (
    TIME_BUCKETS,
    bucket_name,
    bucket_of,
    buckets_of_scored,
    sum_by_bucket,
    tokens_by_time,
)
from dlm_dist.evaluation.bound import timed_parts
from tests.diffusion.test_block_diffusion import rows

CASES: list[tuple[str, dict[str, Any]]] = [
    ("mdlm", {}),
    ("mdlm", {"draws_per_row": 2, "complementary_prob": 0.5}),
    ("mdlm", {"shift": True, "random_length_prob": 0.5}),
    ("mdlm", {"normalization": "scored", "protected_tokens": ("eos",)}),
    ("dllm", {}),
    ("wsd", {"block_lengths": ((0, 4),)}),
    ("block", {"block_lengths": ((0, 4),), "random_length_prob": 0.5}),
    ("block", {"block_lengths": ((0, 0),)}),
    ("card", {}),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_every_token_and_scored_place_has_the_bucket_of_its_time(name: str, settings: dict[str, Any]) -> None:
    objective = OBJECTIVES[name](seed=5, vocabulary=Vocabulary(mask_id=30, eos_id=0, size=30), **settings)
    assert objective.has_times
    batch = objective.corrupt(rows(40, 12))
    assert tokens_by_time(batch).sum() == batch.denominator
    found = buckets_of_scored(batch)
    place = 0
    for sample in range(len(batch.inputs)):
        for token in range(batch.inputs.shape[1]):
            if batch.weights[sample, token] > 0:
                time = batch.times[sample] if batch.block_times is None else batch.block_times[sample, token]
                first, last = map(float, bucket_name(found[place]).split("-"))
                assert first <= time < last
                place += 1
    assert place == len(found)


def test_buckets_are_those_of_the_evaluation() -> None:
    objective = OBJECTIVES["block"](seed=5, vocabulary=Vocabulary(30, 0), block_lengths=((0, 4),))
    batch = objective.corrupt(rows(40, 12))
    losses = np.random.default_rng(0).random(batch.inputs.shape) * batch.weights
    times, nats, tokens = timed_parts(batch, losses)
    summed = sum_by_bucket(torch.from_numpy(losses[batch.masks]), torch.from_numpy(buckets_of_scored(batch)))
    for bucket in range(TIME_BUCKETS):
        inside = bucket_of(times) == bucket
        assert summed[bucket].item() == pytest.approx(nats[inside].sum(), rel=1e-12, abs=1e-12)
        assert tokens_by_time(batch)[bucket] == tokens[inside].sum()


def test_the_last_bucket_holds_the_end() -> None:
    assert bucket_of(np.array([0.0, 0.0999, 0.1, 0.95, 1.0])).tolist() == [0, 0, 1, 9, 9]
    assert bucket_name(3) == "0.3-0.4"


def test_nothing_scored_gives_zeros() -> None:
    assert sum_by_bucket(torch.empty(0), torch.empty(0, dtype=torch.uint8)).tolist() == [0.0] * TIME_BUCKETS


def test_a_causal_loss_has_no_times() -> None:
    objective = OBJECTIVES["ar"](seed=5, vocabulary=Vocabulary(30, 0))
    assert not objective.has_times
    assert not WithMaskNoise(objective, 0, 0.1, 100).has_times
    assert WithMaskNoise(OBJECTIVES["mdlm"](seed=5, vocabulary=Vocabulary(30, 0)), 0, 0.1, 100).has_times
