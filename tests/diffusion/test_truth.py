"""The truth of the loss: every objective that says that it is a bound estimates that bound, and the others do not.

A tiny world of all rows of LENGTH tokens over VOCABULARY ids and a model given as a table of cross entropies, so that
the bound is a finite sum: of the model's loss with the set S hidden, sum over S of |S|^-1 C(LENGTH, |S|)^-1 times the
cross entropies of the tokens in S. (A uniformly random order hides each set of its size with equal probability.)
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from data_pipeline.rows import Rows
from dlm_dist.diffusion.base import Vocabulary
from dlm_dist.diffusion.block_diffusion import BlockDiffusion
from dlm_dist.diffusion.masked import MaskedDiffusion
from dlm_dist.diffusion.objectives import OBJECTIVES
from dlm_dist.diffusion.schedules import SCHEDULES

VOCABULARY, LENGTH, MASK = 3, 4, 3
ROWS = np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # [81, 4]
SUBSETS = np.array(list(itertools.product([False, True], repeat=LENGTH))[1:])  # [15, 4]
IDS = Vocabulary(MASK, eos_id=0, size=VOCABULARY)
PARAMETERS = {"table": {"points": [0.0, 0.1, 0.7, 1.0]}, "power": {"exponent": 0.5}}


def source_probabilities() -> np.ndarray:
    """A distribution [81] in which tokens depend on each other."""
    random = np.random.default_rng(0)
    weights = random.gamma(0.3, size=len(ROWS))
    return weights / weights.sum()


def conditional_losses(probabilities: np.ndarray) -> np.ndarray:
    """-log p(x_i | visible tokens), [81, 15, 4] by row, hidden set and token, 0 for visible ones."""
    losses = np.zeros((len(ROWS), len(SUBSETS), LENGTH))
    for s, hidden in enumerate(SUBSETS):
        agree = (ROWS[:, None, ~hidden] == ROWS[None, :, ~hidden]).all(axis=2)  # [81, 81] on what is visible
        total = agree @ probabilities
        for i in np.flatnonzero(hidden):
            same = agree & (ROWS[:, None, i] == ROWS[None, :, i])
            losses[:, s, i] = np.log(total) - np.log(same @ probabilities)
    return losses


def some_losses() -> np.ndarray:
    """A model that is no one's conditional distribution, [81, 15, 4]."""
    return np.random.default_rng(1).exponential(1.0, (len(ROWS), len(SUBSETS), LENGTH)) * (
        0.3 + SUBSETS.sum(axis=1)[:, None]
    )


def enumerated_bound(losses: np.ndarray) -> np.ndarray:
    """The bound in nats of each row, [81]."""
    sizes = SUBSETS.sum(axis=1)
    share = np.array([1.0 / (k * math.comb(LENGTH, k)) for k in sizes])
    return ((losses * SUBSETS).sum(axis=2) * share).sum(axis=1)


SAMPLES = 81 * 256
PROBABILITIES = source_probabilities()
LOSSES = some_losses()


def estimates(objective, losses: np.ndarray = LOSSES, rows=range(81)) -> tuple[np.ndarray, np.ndarray]:
    """(weighted nats, row number) of each sample of `rows` in turn: what the training loss would sum."""
    row_of = np.array(rows)[np.arange(SAMPLES) % len(rows)]
    tokens = ROWS[row_of]
    zeros = np.zeros(SAMPLES, dtype=np.int64)
    batch = objective.corrupt(Rows(tokens, np.zeros(tokens.shape, np.int32), np.arange(SAMPLES), zeros, zeros))
    per_row = len(batch.inputs) // SAMPLES
    row_of = row_of.repeat(per_row)
    inputs, weights = (batch.inputs[:, 1:], batch.weights[:, :-1]) if objective.shift else (batch.inputs, batch.weights)
    subset = (inputs == MASK) @ (1 << np.arange(LENGTH)[::-1]) - 1
    nats = np.where(subset[:, None] >= 0, losses[row_of, np.maximum(subset, 0)], 0.0)
    values = (nats * weights).sum(axis=1).reshape(SAMPLES, per_row).mean(axis=1)
    return values * SAMPLES * LENGTH / (batch.denominator / per_row), row_of[::per_row]


def strays(objective, losses: np.ndarray = LOSSES, truth: np.ndarray | None = None) -> float:
    """How many standard errors the mean of the estimates is away from the enumerated bound."""
    values, row_of = estimates(objective, losses)
    return errors_away(values - (enumerated_bound(losses) if truth is None else truth)[row_of])


def errors_away(residual: np.ndarray) -> float:
    """How many standard errors the mean of the samples' residuals is away from 0."""
    # Means over 256 successive blocks, which stratified times make independent and no single sample is.
    blocks = residual.reshape(256, -1).mean(axis=1)
    return float(blocks.mean() / (blocks.std(ddof=1) / 16))


@pytest.mark.parametrize(
    "draws",
    [{}, {"times": "independent"}, {"draws_per_row": 2, "complementary_prob": 0.7}],
    ids=["stratified", "independent", "complementary"],
)
@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_estimates_the_enumerated_bound(schedule, masking, draws):
    objective = MaskedDiffusion(
        5, IDS, schedule=schedule, schedule_parameters=PARAMETERS.get(schedule, {}), masking=masking, **draws
    )
    assert objective.is_bound
    assert abs(strays(objective)) < 4


@pytest.mark.parametrize("name", ["mdlm", "dllm"])
def test_the_bound_of_a_perfect_model_is_the_entropy(name):
    losses = conditional_losses(PROBABILITIES)
    entropy = float(-(PROBABILITIES * np.log(PROBABILITIES)).sum())
    assert abs(PROBABILITIES @ enumerated_bound(losses) - entropy) < 1e-12
    values, row_of = estimates(OBJECTIVES[name](seed=3, vocabulary=IDS), losses)
    weighted = values * PROBABILITIES[row_of] * len(ROWS)
    blocks = weighted.reshape(256, -1).mean(axis=1)
    assert abs(blocks.mean() - entropy) < 4 * blocks.std(ddof=1) / 16


def enumerated_bound_of_blocks() -> np.ndarray:
    """The bound in nats of each row, [81], written in two blocks: what a block is asked never sees what follows it.

    Hidden sets are those of the first half, with all of the second; and those of the second half alone.
    """
    truth = np.zeros(len(ROWS))
    for s, hidden in enumerate(SUBSETS):
        for scored in ((0, 1), (2, 3)):
            k = int(hidden[list(scored)].sum())
            if k and hidden[2:].all() if scored == (0, 1) else k and not hidden[:2].any():
                truth += LOSSES[:, s, scored] @ hidden[list(scored)] / (k * math.comb(2, k))
    return truth


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_one_block_at_a_time_estimates_the_bound_of_all_blocks(schedule, masking):
    settings = {"schedule": schedule, "schedule_parameters": PARAMETERS.get(schedule, {}), "masking": masking}
    objective = MaskedDiffusion(7, IDS, one_block_length=2, **settings)
    assert objective.is_bound
    assert abs(strays(objective, truth=enumerated_bound_of_blocks())) < 4


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("length", [5, 20, 32])
@pytest.mark.parametrize("name", ["mdlm", "dllm"])
def test_one_block_that_is_shorter_than_the_others_biases_nothing(name, length, batch):
    """The denominator of a batch must not depend on which blocks were chosen. One loss per place: its mean is known."""
    objective = OBJECTIVES[name](seed=3, vocabulary=IDS, one_block_length=length)
    assert objective.is_bound
    width, steps = 32, 4096
    costs = np.linspace(3.0, 0.0, width)
    zeros = np.zeros(batch, dtype=np.int64)
    tokens = np.zeros((batch, width), dtype=np.int64)
    losses = []
    for step in range(steps):
        positions = np.arange(batch) + step * batch
        found = objective.corrupt(Rows(tokens, np.zeros(tokens.shape, np.int32), positions, zeros, zeros))
        losses.append((found.weights * costs).sum() / found.denominator)
    assert abs(errors_away(np.array(losses) - 1.5)) < 4


EXTREMES = [
    ("power", {"exponent": 0.5}),
    ("power", {"exponent": 20.0}),
    ("sigmoid", {"steepness": 40.0}),
    ("geometric", {"sigma_min": 1e-4, "sigma_max": 30.0}),
]


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
@pytest.mark.parametrize(("schedule", "parameters"), EXTREMES, ids=str)
def test_a_bound_stays_one_at_the_ends_of_what_a_schedule_takes(schedule, parameters, masking):
    """What the bound needs is drawn often enough to show in the mean: a constant loss comes out as it is."""
    objective = MaskedDiffusion(1, IDS, schedule=schedule, schedule_parameters=parameters, masking=masking)
    assert objective.is_bound
    count, width = 16384, 128
    zeros = np.zeros(count, dtype=np.int64)
    tokens = np.zeros((count, width), dtype=np.int64)
    batch = objective.corrupt(Rows(tokens, np.zeros(tokens.shape, np.int32), np.arange(count), zeros, zeros))
    means = batch.weights.sum(axis=1) / width
    assert abs(means.mean() - 1.0) < 0.1
    assert abs(errors_away(means - 1.0)) < 4


def block_residuals(**settings) -> tuple[BlockDiffusion, np.ndarray]:
    """Block diffusion in blocks of two, and what each of its samples sums beyond the enumerated bound of its row."""
    objective = BlockDiffusion(5, IDS, block_lengths=((0, 2),), **settings)
    row_of = np.arange(SAMPLES) % len(ROWS)
    zeros = np.zeros(SAMPLES, dtype=np.int64)
    tokens = ROWS[row_of]
    batch = objective.corrupt(Rows(tokens, np.zeros(tokens.shape, np.int32), np.arange(SAMPLES), zeros, zeros))
    hidden = batch.inputs == MASK
    values = np.zeros(SAMPLES)
    for scored, before, after in (([0, 1], [], [2, 3]), ([2, 3], [0, 1], [])):
        seen = hidden.copy()
        seen[:, before], seen[:, after] = False, True  # the block before as it is, nothing of the one behind
        subset = seen @ (1 << np.arange(LENGTH)[::-1]) - 1
        nats = np.where(subset[:, None] >= 0, LOSSES[row_of, np.maximum(subset, 0)], 0.0)
        values += (nats * batch.weights)[:, scored].sum(axis=1)
    return objective, values - enumerated_bound_of_blocks()[row_of]


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_block_diffusion_estimates_the_bound_of_its_blocks(schedule, masking):
    parameters = PARAMETERS.get(schedule, {})
    objective, residual = block_residuals(schedule=schedule, schedule_parameters=parameters, masking=masking)
    assert objective.is_bound
    assert abs(errors_away(residual)) < 4


@pytest.mark.parametrize("settings", [{"t_min": 0.3}, {"t_max": 0.6}, {"t_min": 0.3, "masking": "bernoulli"}], ids=str)
def test_clipped_block_diffusion_is_no_bound(settings):
    objective, residual = block_residuals(**settings)
    assert not objective.is_bound
    assert abs(errors_away(residual)) > 5


BOUNDS = [
    {"times": "independent"},
    {"draws_per_row": 2},
    {"draws_per_row": 3},
    {"draws_per_row": 2, "complementary_prob": 1.0},
    {"weighting": "inverse_rate"},
    {"weighting": "inverse_rate", "masking": "bernoulli"},
    {"weighting": "inverse_rate", "masking": "bernoulli", "draws_per_row": 2, "complementary_prob": 1.0},
    {"normalization": "maskable"},
    {"shift": True},
]
NO_BOUNDS = [
    {"weighting": "inverse_rate", "schedule": "cosine"},
    {"weighting": "inverse_rate", "schedule": "cosine", "masking": "bernoulli"},
    {"weighting": "inverse_rate", "draws_per_row": 2, "complementary_prob": 1.0},
    {"weighting": "none"},
    {"weighting": "one_minus_t"},
    {"weighting": "snr"},
    {"weighting": "cart"},
    {"weighting": "soft_tail"},
    {"t_min": 0.3},
    {"t_max": 0.6},
    {"t_min": 0.3, "masking": "bernoulli"},
    {"min_masking_rate": 0.4},
    {"min_masking_rate": 0.4, "masking": "bernoulli"},
    {"reweight_cap": 1.5},
    {"normalization": "scored"},
    {"mask_contiguous_region_prob": 1.0, "masking": "bernoulli"},
    {"two_segment_prob": 1.0},
    {"protected_tokens": ("1",)},
]


@pytest.mark.parametrize("settings", BOUNDS, ids=str)
def test_what_says_that_it_is_a_bound_is_one(settings):
    objective = MaskedDiffusion(7, IDS, **settings)
    assert objective.is_bound
    assert abs(strays(objective)) < 4


@pytest.mark.parametrize("settings", NO_BOUNDS, ids=str)
def test_what_says_that_it_is_no_bound_is_none(settings):
    objective = MaskedDiffusion(7, IDS, **settings)
    assert not objective.is_bound
    assert abs(strays(objective)) > 5


def test_two_segments_can_cost_less_than_the_entropy():
    """Why `two_segment_prob` ends the bound: four copies of one fair coin have an entropy of log 2."""
    probabilities = np.where((ROWS[:, :1] == ROWS).all(axis=1) & (ROWS[:, 0] < 2), 0.5, 1e-12)
    losses = conditional_losses(probabilities / probabilities.sum())
    assert ROWS[[0, 40]].tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    values, _ = estimates(MaskedDiffusion(7, IDS, masking="bernoulli", two_segment_prob=1.0), losses, (0, 40))
    assert values.mean() + 4 * values.std() / np.sqrt(len(values)) < math.log(2)


def test_the_default_sampling_lowers_the_spread_of_a_batch_at_least_fourfold():
    # The loss of a hidden token depends on the share that is hidden alone, on rows of 64 tokens.
    length, batches = 64, 2000
    cost = 0.3 + 4.0 * (np.arange(length + 1) / length) ** 2
    zeros = np.zeros(8 * batches, dtype=np.int64)
    tokens = np.zeros((8 * batches, length), dtype=np.int64)
    rows = Rows(tokens, tokens.astype(np.int32), np.arange(8 * batches), zeros, zeros)

    def of_batches(**settings) -> np.ndarray:
        batch = MaskedDiffusion(4, IDS, **settings).corrupt(rows)
        hidden = (batch.inputs == MASK).sum(axis=1)
        nats = (batch.weights * cost[hidden][:, None]).sum(axis=1) / length
        return nats.reshape(-1, 8).mean(axis=1)

    ours, theirs = of_batches(), of_batches(times="independent", masking="bernoulli")
    truth = cost[1:].mean()
    for found in (ours, theirs):
        assert abs(found.mean() - truth) < 4 * found.std() / np.sqrt(batches)
    assert theirs.std() > 4 * ours.std()
