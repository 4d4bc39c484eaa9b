"""Weights of hidden tokens against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from dlm_dist.diffusion.schedules import make_schedule
from dlm_dist.diffusion.weighting import SAMPLE_WEIGHTINGS, Level, cart_weights, recency_weights

TIMES = np.array([0.1, 0.4, 0.75, 0.999])
SIZES = np.array([10, 10, 4, 10])


def test_levels():
    exact = Level.at(make_schedule("power"), TIMES, SIZES, exact=True)
    assert exact.counts.tolist() == [1, 2, 3, 10]
    assert exact.shares.tolist() == [0.1, 0.2, 0.75, 1.0]
    independent = Level.at(make_schedule("power"), TIMES, SIZES, exact=False)
    assert independent.counts is None
    assert np.allclose(independent.shares, TIMES**2)
    least = Level.at(make_schedule("power"), TIMES, SIZES, exact=True, min_rate=0.35)
    assert least.counts.tolist() == [4, 4, 3, 10]
    nothing = Level.at(make_schedule("power"), TIMES, np.zeros(4, dtype=int), exact=True)
    assert nothing.counts.tolist() == [0, 0, 0, 0]


def test_complements():
    level = Level.at(make_schedule("power"), TIMES, SIZES, exact=True)
    other = level.complement()
    assert other.counts.tolist() == [9, 8, 1, 0]
    assert np.allclose(other.rates, 1 - TIMES**2)
    assert np.allclose(other.times, np.sqrt(1 - TIMES**2))


@pytest.mark.parametrize(
    ("name", "exact", "independent"),
    [
        # power, t^2: k of l tokens are hidden for sqrt((k - 1) / l) < t <= sqrt(k / l).
        (
            "elbo",
            1 / ((np.sqrt([0.1, 0.2, 0.75, 1.0]) - np.sqrt([0.0, 0.1, 0.5, 0.9])) * [1, 2, 3, 10]),
            2 / TIMES,
        ),
        ("inverse_rate", [10, 5, 4 / 3, 1], TIMES**-2),
        ("none", [1, 1, 1, 1], [1, 1, 1, 1]),
        ("one_minus_t", 1 - TIMES, 1 - TIMES),
        ("snr", [9, 4, 1 / 3, 0], (1 - TIMES**2) / TIMES**2),
    ],
)
def test_weights_of_a_sample(name, exact, independent):
    for counted, expected in ((True, exact), (False, independent)):
        level = Level.at(make_schedule("power"), TIMES, SIZES, exact=counted)
        assert np.allclose(SAMPLE_WEIGHTINGS[name](level, 0.0), expected, rtol=1e-12)


def test_all_weightings_by_sample_are_tested():
    assert set(SAMPLE_WEIGHTINGS) == {"elbo", "inverse_rate", "none", "one_minus_t", "snr"}


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 1.0])
def test_cart_weights_are_the_double_sum(p):
    random = np.random.default_rng(0)
    masks = random.random((3, 400)) < 0.5
    documents = np.zeros((3, 400), dtype=np.int32)
    documents[1, 100:] = 1
    documents[2, 300:] = -1
    distance = abs(np.arange(400)[:, None] - np.arange(400))
    matrix = np.where(distance > 0, 0.5 * p * (1.0 - p) ** np.maximum(distance - 1, 0), 0.0)
    expected = np.zeros(masks.shape)
    for b in range(3):
        same = (documents[b][:, None] == documents[b]) & (documents[b] >= 0)
        expected[b] = (matrix * same * ~masks[b]).sum(axis=1)
    assert np.allclose(cart_weights(masks, documents, p), expected, atol=1e-9)


def test_recency_weights_are_the_sum():
    masks = np.array([[False, True, True, False, True, True]])
    # Costs 0, 1, 2, 0, 1, 2 of what is hidden, halved with every step.
    before = np.array([0, 0, 1, 0.5 + 2, 0.25 + 1, 0.125 + 0.5 + 1])
    assert np.allclose(recency_weights(masks, 0.5, 2.0, np.zeros(masks.shape, np.int32)), 1 / (2 + before))


def test_recency_weights_begin_anew_with_each_document():
    random = np.random.default_rng(1)
    masks = random.random((4, 30)) < 0.5
    documents = np.zeros((4, 30), dtype=np.int32)
    documents[:, 12:] = 1
    found = recency_weights(masks, 0.3, 1.0, documents)
    for part in (slice(0, 12), slice(12, 30)):
        alone = recency_weights(masks[:, part], 0.3, 1.0, np.zeros(masks[:, part].shape, np.int32))
        assert np.allclose(found[:, part], alone)
