"""Attention annealing: from causal to bidirectional over a budget of samples, drawn by position alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlm_dist.diffusion.corruption import annealed_attention
from dlm_dist.diffusion.masked import MaskedDiffusion
from dlm_dist.diffusion.model_inputs import model_inputs
from dlm_dist.models.visibility import Visibility, pair_words, unbound
from tests.diffusion.test_block_diffusion import VOCABULARY, rows
from tests.models.test_visibility import LENGTH, influence, model, through

CPU = torch.device("cpu")
BUDGET = 1000


GOLDEN_WORDS = [
    [4086997516, 1420618368, 838857988],
    [184235262, 1489609912, 770852307],
    [2930407137, 3321252504, 143818467],
]
GOLDEN_LABELS = [[1752196424, 1399929897, 0], [3570265492, 692598766, 1073741824], [1393834639, 2392963017, 2147483648]]


def annealed(positions: list[int], length: int = 256, seed: int = 5) -> Tensor:
    """[B, length, length] who sees whom at these positions."""
    labels = annealed_attention(seed, np.array(positions), BUDGET)
    assert labels is not None
    return Visibility(len(positions), length, CPU, annealing=unbound(torch.from_numpy(labels))).dense()[:, 0]


def within_four_errors(count: float, trials: int, probability: float) -> bool:
    return bool(abs(count - trials * probability) <= 4 * np.sqrt(trials * probability * (1 - probability)) + 1e-9)


def test_the_share_of_later_tokens_grows_from_none_to_all() -> None:
    positions = [0, 1, 10, 250, 500, 750, 999, 1000, 5000]
    seen = annealed(positions)
    later = torch.ones(256, 256).triu(1).bool()
    assert seen[:, ~later].all(), "what precedes a token, and itself, is always seen"
    trials = int(later.sum())
    for mask, position in zip(seen, positions, strict=True):
        share = min(1.0, position / BUDGET)
        assert within_four_errors(float(mask[later].sum()), trials, share), position
    assert not seen[0][later].any()
    assert seen[-2:].all()


def test_pairs_are_drawn_independently() -> None:
    """Of neighbours in either direction, mirrored pairs and successive samples, as many are seen together as by chance.

    The 150,000 pairs of a sample at once: four standard errors are 0.5 % of the count.
    """
    first, second = annealed([500, 501], 768)
    below = torch.ones(768, 768).triu(2).bool()
    for name, other in {
        "next key": first.roll(-1, 1),
        "next query": first.roll(-1, 0),
        "eight keys on": first.roll(-8, 1),
        "next sample": second,
    }.items():
        inside = below & below.roll(-1, 1) & below.roll(-1, 0) & below.roll(-8, 1)
        both, chance = first & other & inside, 0.5 * (0.501 if name == "next sample" else 0.5)
        assert within_four_errors(float(both.sum()), int(inside.sum()), chance), name
    # Rows and columns: the spread of their sums is that of independent draws.
    for dim in (0, 1):
        size = below.sum(dim)
        deviation = ((first & below).sum(dim) - size / 2)[size > 100] / (size[size > 100] / 4).sqrt()
        assert abs(float(deviation.square().mean()) - 1) < 4 * np.sqrt(2 / len(deviation))


def test_words_never_change() -> None:
    """Golden values: a resume under another version must draw the same. The words are lowbias32 of unsigned numbers."""
    places = torch.arange(3)
    words = pair_words(torch.tensor(7), torch.tensor(2**32 - 1), places[:, None], places[None])
    assert words.tolist() == GOLDEN_WORDS
    assert annealed_attention(3, np.array([0, 5, 10]), 20).tolist() == GOLDEN_LABELS  # type: ignore[union-attr]


def test_it_is_a_function_of_seed_and_position() -> None:
    positions = np.arange(40)
    whole = annealed_attention(1, positions, 30)
    parts = [annealed_attention(1, part, 30) for part in np.split(positions, [7, 8, 25])]
    assert whole is not None
    assert np.array_equal(whole, np.concatenate([part for part in parts if part is not None]))
    assert len(np.unique(whole[:, :2])) == 80
    other = annealed_attention(2, positions, 30)
    assert other is not None
    assert not (other[:, :2] == whole[:, :2]).any()
    assert annealed_attention(1, positions[30:], 30) is None


def test_behind_the_budget_nothing_is_left_of_it() -> None:
    plain, option = (MaskedDiffusion(seed=1, vocabulary=VOCABULARY, attention_annealing=n) for n in (0, 16))
    behind, without = option.corrupt(rows(4, LENGTH, first=16)), plain.corrupt(rows(4, LENGTH, first=16))
    for field in dataclasses.fields(behind):
        assert np.array_equal(getattr(behind, field.name), getattr(without, field.name)), field.name
    made = model(vocab_size=31, mask_token_id=30)
    losses = []
    for batch in (behind, without):
        losses.append(made(**model_inputs(batch, CPU)))
        assert made.attention_ran == "sdpa"
    assert torch.equal(*losses)
    assert option.is_bound
    before = option.corrupt(rows(4, LENGTH, first=12))
    assert np.array_equal(before.inputs, plain.corrupt(rows(4, LENGTH, first=12)).inputs)
    unmasked = dataclasses.replace(before, annealing=None)
    assert not torch.equal(made(**model_inputs(before, CPU)), made(**model_inputs(unmasked, CPU)))


@pytest.mark.parametrize("changes", [{"draws_per_row": 2}, {"shift": True}])
def test_several_draws_of_a_row_see_the_same_and_a_shifted_row_sees_one_place_more(changes: dict[str, Any]) -> None:
    option = MaskedDiffusion(seed=1, vocabulary=VOCABULARY, attention_annealing=16, **changes)
    batch = option.corrupt(rows(3, LENGTH, first=8))
    assert batch.annealing is not None
    assert np.array_equal(batch.annealing, annealed_attention(1, batch.positions, 16))
    made = model(vocab_size=31, mask_token_id=30)
    made(**model_inputs(batch, CPU)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


def test_a_model_sees_what_was_drawn() -> None:
    labels = annealed_attention(3, np.array([400, 900]), BUDGET)
    assert labels is not None
    annealing = torch.from_numpy(labels)
    rule = Visibility(2, LENGTH, CPU, annealing=unbound(annealing)).dense()[:, 0]
    assert torch.equal(influence(model(num_hidden_layers=1), annealing=annealing), rule)
    assert torch.equal(influence(model(), annealing=annealing), through(rule, rule))
    annealing[:, 2] = 0
    causal = torch.ones(2, LENGTH, LENGTH).tril().bool()
    assert torch.equal(influence(model(), annealing=annealing), causal)
    with pytest.raises(ValueError, match="a model of direction causal never sees"):
        influence(model(direction="causal"), annealing=annealing)
