"""A model that is trained on rows from a known Markov source: its bound comes down to the source's own likelihood."""

from __future__ import annotations

import numpy as np
import torch

from data_pipeline.rows import Rows
from dlm_dist import models
from dlm_dist.diffusion.base import Vocabulary
from dlm_dist.diffusion.masked import MaskedDiffusion
from dlm_dist.diffusion.model_inputs import model_inputs

STATES, LENGTH, MASK = 4, 8, 4
BATCH, STEPS, HELD_OUT, DRAWS = 128, 400, 2048, 8
CPU = torch.device("cpu")


class MarkovSource:
    """A chain of STATES states in its stationary distribution."""

    def __init__(self) -> None:
        random = np.random.default_rng(4)
        self.transitions = random.dirichlet([0.5] * STATES, STATES)
        values, vectors = np.linalg.eig(self.transitions.T)
        stationary = np.real(vectors[:, np.argmax(np.real(values))])
        self.start = stationary / stationary.sum()

    @property
    def entropy_rate(self) -> float:
        """Nats per token of a long row."""
        return float(-(self.start[:, None] * self.transitions * np.log(self.transitions)).sum())

    def rows(self, seed: int, count: int) -> np.ndarray:
        """[count, LENGTH]"""
        uniform = np.random.default_rng(seed).random((count, LENGTH))
        tokens = np.empty((count, LENGTH), dtype=np.int64)
        for i in range(LENGTH):
            chances = self.transitions[tokens[:, i - 1]] if i else np.broadcast_to(self.start, (count, STATES))
            tokens[:, i] = (uniform[:, i, None] > np.cumsum(chances, axis=1)[:, :-1]).sum(axis=1)
        return tokens

    def nats(self, rows: np.ndarray) -> np.ndarray:
        """-log p of each row."""
        steps = np.log(self.transitions[rows[:, :-1], rows[:, 1:]]).sum(axis=1)
        return -(np.log(self.start[rows[:, 0]]) + steps)


def as_rows(tokens: np.ndarray, first: int) -> Rows:
    zeros = np.zeros(len(tokens), dtype=np.int64)
    return Rows(tokens, np.zeros(tokens.shape, np.int32), np.arange(first, first + len(tokens)), zeros, zeros)


def bound_of_rows(model, objective: MaskedDiffusion, tokens: np.ndarray) -> np.ndarray:
    """The estimate of -log p of each row from DRAWS draws, in nats."""
    found = np.zeros(len(tokens))
    with torch.no_grad():
        for draw in range(DRAWS):
            batch = objective.corrupt(as_rows(tokens, draw * len(tokens)))
            inputs = model_inputs(batch, CPU)
            losses = model(**inputs, per_row=True)[1] * inputs["weights"]
            row_of = (inputs["supervised"] // LENGTH).numpy()
            found += np.bincount(row_of, weights=losses.double().numpy(), minlength=len(tokens))
    return found / DRAWS


def test_the_bound_of_a_trained_model_comes_down_to_the_source_and_not_below():
    source = MarkovSource()
    sizes = {"vocab_size": STATES + 1, "mask_token_id": MASK, "hidden_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "head_dim": 16, "intermediate_size": 192}
    model = models.build("qwen3", seed=0, **sizes)
    objective = MaskedDiffusion(seed=0, vocabulary=Vocabulary(MASK, eos_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS, pct_start=0.05)
    held_out, held_out_objective = source.rows(1, HELD_OUT), MaskedDiffusion(9, Vocabulary(MASK, eos_id=0))
    nats = source.nats(held_out)

    def excess() -> tuple[float, float]:
        """(mean, standard error) of bound minus the source's own nats, per token."""
        difference = (bound_of_rows(model, held_out_objective, held_out) - nats) / LENGTH
        return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(HELD_OUT))

    before, _ = excess()
    train_rows = source.rows(0, BATCH * STEPS)
    for step in range(STEPS):
        batch = objective.corrupt(as_rows(train_rows[step * BATCH : (step + 1) * BATCH], step * BATCH))
        loss = model(**model_inputs(batch, CPU)) / batch.denominator
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    after, error = excess()
    assert before > 0.2 * source.entropy_rate
    assert after >= -3 * error
    assert after < 0.02 * source.entropy_rate
    # Else the second claim would say nothing.
    assert error < 0.01 * source.entropy_rate
