"""The objective `ar`: shift, exact likelihood, and documents that do not see each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipeline.rows import Rows, document_ids
from dlm_dist import models
from dlm_dist.diffusion.model_inputs import model_inputs
from dlm_dist.diffusion.objectives import Autoregressive, Vocabulary

EOS, MASK, LENGTH = 50, 51, 12
CPU = torch.device("cpu")


def objective(**settings) -> Autoregressive:
    return Autoregressive(seed=1, vocabulary=Vocabulary(MASK, EOS, np.arange(52)), **settings)


def rows_of(tokens, before: int, documents=None) -> Rows:
    """One row; by default a document ends with its end of text, as packing leaves it."""
    tokens = np.asarray(tokens, dtype=np.int64)[None]
    documents = document_ids(tokens, EOS) if documents is None else np.asarray(documents, dtype=np.int32)[None]
    return Rows(tokens, documents, np.array([7]), tokens.sum(axis=1), np.array([before]))


def random_rows(count: int) -> Rows:
    random = np.random.default_rng(0)
    tokens = random.integers(0, EOS, (count, LENGTH))
    before = random.integers(0, EOS, count)
    return Rows(tokens, document_ids(tokens, EOS), np.arange(count), tokens.sum(axis=1), before)


def test_the_row_is_read_shifted_behind_the_token_before_it():
    rows = random_rows(5)
    batch = objective().corrupt(rows)
    assert np.array_equal(batch.inputs[:, 0], rows.before)
    assert np.array_equal(batch.inputs[:, 1:], rows.tokens[:, :-1])
    assert np.array_equal(batch.targets, rows.tokens)
    assert (batch.weights == 1).all()
    assert (batch.times == 0).all()
    assert (batch.denominator, batch.document_ids) == (5 * LENGTH, None)
    assert np.array_equal(batch.text_bytes, rows.text_bytes)


def test_cut_rows_score_what_is_left_and_do_not_depend_on_the_batch():
    rows = random_rows(200)
    batch = objective(random_length_prob=0.5).corrupt(rows)
    assert np.array_equal(batch.weights, np.arange(LENGTH) < batch.lengths[:, None])
    assert batch.denominator == batch.weights.sum() < 200 * LENGTH
    assert 60 < (batch.lengths < LENGTH).sum() < 130
    known = np.where(batch.weights > 0, rows.tokens, 0).sum(axis=1)
    assert np.array_equal(batch.text_bytes, known)
    parts = [objective(random_length_prob=0.5).corrupt(rows[i : i + 30]) for i in range(0, 200, 30)]
    assert np.array_equal(np.concatenate([part.weights for part in parts]), batch.weights)
    isolated = objective(random_length_prob=0.5, isolate_documents=True).corrupt(rows)
    assert np.array_equal(isolated.document_ids >= 0, batch.weights > 0)


ENDING = [3, 4, EOS, 5, 6, EOS, EOS, 7, 8, 9, EOS, 1]
# The same stream where end of text opens a document (llm.c): ids of the tokens, not of the inputs.
OPENING = [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4, 4]


@pytest.mark.parametrize("documents", [None, OPENING], ids=["end of text ends", "end of text opens"])
def test_a_document_is_read_from_the_end_of_text_in_front_of_it(documents):
    batch = objective(isolate_documents=True).corrupt(rows_of(ENDING, before=2, documents=documents))
    assert batch.inputs[0].tolist() == [2, *ENDING[:-1]]
    assert batch.document_ids is not None
    assert batch.document_ids[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4]


def test_documents_without_end_of_text_between_them_get_one():
    batch = objective(isolate_documents=True).corrupt(rows_of([3, 4, 5, 6], before=EOS, documents=[0, 0, 1, 1]))
    assert batch.inputs[0].tolist() == [EOS, 3, EOS, 5]
    assert batch.document_ids is not None
    assert batch.document_ids[0].tolist() == [1, 1, 2, 2]


@pytest.fixture(scope="module", params=["qwen3", "rwkv7"])
def model(request):
    sizes = {"qwen3": {"num_attention_heads": 2, "head_dim": 16}, "rwkv7": {"head_size": 16}}[request.param]
    sizes |= {"vocab_size": 52, "hidden_size": 32, "num_hidden_layers": 2, "mask_token_id": MASK}
    made = models.build(request.param, direction="causal", seed=3, **sizes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # RWKV-7 starts with output projections of zero, through which nothing is seen
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return made.eval()


def losses(model, rows: Rows, **settings) -> torch.Tensor:
    """Cross entropies of the tokens of a row that are there."""
    batch = objective(**settings).corrupt(rows)
    with torch.no_grad():
        return model(**model_inputs(batch, CPU), per_row=True)[1]


def test_the_loss_is_the_negative_log_likelihood(model):
    rows = random_rows(3)
    batch = objective().corrupt(rows)
    total = model(**model_inputs(batch, CPU))
    inputs = torch.from_numpy(np.concatenate([rows.before[:, None], rows.tokens], axis=1))
    logits = model(input_ids=inputs).logits[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten(), reduction="sum")
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("documents", [None, OPENING], ids=["end of text ends", "end of text opens"])
def test_a_document_changes_no_loss_of_another(model, documents):
    rows = rows_of(ENDING, before=2, documents=documents)
    document_of = np.array([0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4])  # whose loss it is, that of its end of text included
    clean = losses(model, rows, isolate_documents=True)
    packed = losses(model, rows)
    for place in (0, 1, 3, 4, 7, 8, 9):
        tokens = rows.tokens.copy()
        tokens[0, place] += 20
        changed = losses(model, replace(rows, tokens=tokens), isolate_documents=True)
        others = document_of != document_of[place]
        assert torch.equal(changed[others], clean[others])
        after = (document_of == document_of[place]) & (np.arange(LENGTH) >= place)
        assert (changed[after] != clean[after]).all()
        leaking = losses(model, replace(rows, tokens=tokens))
        assert (leaking[place:] != packed[place:]).all()
    before = losses(model, replace(rows, before=np.array([30])), isolate_documents=True)
    assert (before[:3] != clean[:3]).all()
    assert torch.equal(before[3:], clean[3:])


def test_a_document_is_scored_as_if_it_were_alone(model):
    alone = rows_of([7, 8, 9, EOS], before=EOS)
    packed = losses(model, rows_of(ENDING, before=2), isolate_documents=True)
    torch.testing.assert_close(packed[7:11], losses(model, alone), rtol=1e-5, atol=1e-5)
