"""CARD: which of what a causal model reads is hidden, and what each token weighs."""

from __future__ import annotations

import numpy as np
import pytest

from dlm_dist.diffusion.objectives import Autoregressive, CausalDiffusion, Vocabulary
from tests.diffusion.test_block_diffusion import rows

VOCABULARY = Vocabulary(mask_id=30, eos_id=0)


def card(**changes) -> CausalDiffusion:
    return CausalDiffusion(seed=1, vocabulary=VOCABULARY, **changes)


@pytest.mark.parametrize("tail", [1.0, 1.5, 4.0])
def test_the_hidden_tokens_lie_in_a_soft_tail(tail: float) -> None:
    data = rows(256, 20)
    batch = card(card_tail=tail).corrupt(data)
    plain = Autoregressive(seed=1, vocabulary=VOCABULARY).corrupt(data)
    hidden = batch.inputs != plain.inputs
    assert (batch.inputs[hidden] == 30).all()
    assert not hidden[:, 0].any(), "what stands in front of the row is never hidden"
    spread = False
    for i, t in enumerate(batch.times):
        # Token j is read at place j + 1; the last token is not read at all.
        count = max(1, int(20 * t))
        window = min(20, int(tail * count))
        places = np.flatnonzero(hidden[i])
        assert len(places) in (count, count - 1)
        assert (places > 20 - window).all()
        spread |= bool(len(places) and places.min() <= 20 - count)
    assert spread == (tail > 1.0)
    assert np.array_equal(batch.targets, data.tokens)
    assert (batch.weights > 0).all(), "every token is asked"


def test_a_token_behind_hidden_ones_weighs_less() -> None:
    batch = card(soft_tail_p=0.3, soft_tail_beta=0.7).corrupt(rows(16, 12))
    for i in range(16):
        hidden = np.append(batch.inputs[i, 1:] == 30, False)  # token by token; the last is not read
        expected = []
        for n in range(12):
            total = sum(hidden[j] * (1 + (j > 0 and hidden[j - 1])) * 0.7 ** (n - 1 - j) for j in range(n))
            expected.append(1 / (0.7 + total))
        expected = np.array(expected)
        if not hidden[:-1].any():
            continue
        assert batch.weights[i] == pytest.approx(expected / expected.mean(), rel=1e-5)


def test_noise_is_a_function_of_the_position_and_cut_tails_are_left_out() -> None:
    objective = card(random_length_prob=0.5, isolate_documents=True)
    whole = objective.corrupt(rows(40, 12))
    parts = [objective.corrupt(rows(n, 12, first)) for first, n in ((0, 13), (13, 27))]
    for name in ("inputs", "weights", "times", "lengths", "document_ids"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts])), name
    assert whole.weights.sum(axis=1) == pytest.approx(whole.lengths, rel=1e-5)
    there = np.arange(12) < whole.lengths[:, None]
    assert not whole.weights[~there].any()
    assert (whole.document_ids[~there] == -1).all()
    assert not card().is_bound


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"card_tail": 0.5}, "at least 1"), ({"soft_tail_p": 0.0}, "0 < p <= 1"), ({"soft_tail_beta": 0.0}, "0 < beta")],
)
def test_values_that_make_no_objective_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        card(**changes)
