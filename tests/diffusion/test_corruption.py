from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.rows import Rows
from dlm_dist import randomness
from dlm_dist.diffusion.corruption import (
    hide_counted,
    hide_independently,
    hide_span,
    keyed_words,
    random_ids,
    random_lengths,
    stratified_times,
)
from dlm_dist.diffusion.objectives import MaskedDiffusion, Vocabulary

MASK, EOS = 99, 50


def rows_at(positions, length=16, vocabulary=50):
    positions = np.asarray(positions, dtype=np.int64)
    tokens = np.stack([randomness.uint64(0, "tokens", int(p), length) % vocabulary for p in positions])
    return Rows(
        tokens=tokens.astype(np.int64),
        document_ids=np.where(np.arange(length) < length // 2, 0, 1) * np.ones((len(positions), 1), dtype=np.int32),
        positions=positions,
        text_bytes=np.full(len(positions), 3 * length, dtype=np.int64),
        before=np.full(len(positions), vocabulary, dtype=np.int64),
    )


def test_times_golden_vectors():
    positions = np.array([0, 1, 2, 3, 65536, 10**12])
    assert stratified_times(5, positions).tolist() == [
        0.0029742950423502007,
        0.5693379876678926,
        0.8159372904062726,
        0.3255636058481733,
        0.17751316782254217,
        0.15638132138449892,
    ]


@pytest.mark.parametrize("bits", [0, 1, 3, 8, 12, 16])
def test_times_have_one_in_each_stratum_of_any_aligned_block(bits):
    start = 5 * 65536
    times = stratified_times(3, np.arange(start, start + 2 * 65536)).reshape(-1, 2**bits)
    strata = np.sort((times * 2**bits).astype(int), axis=1)
    assert (strata == np.arange(2**bits)).all()


def test_time_of_one_position_is_uniform_over_seeds():
    times = np.array([stratified_times(seed, np.array([11]))[0] for seed in range(2000)])
    counts = np.bincount((times * 10).astype(int), minlength=10)
    assert (abs(counts - 200) < 4 * np.sqrt(200 * 0.9)).all()


def test_windows_and_batches_do_not_repeat_a_pattern():
    times = stratified_times(0, np.arange(3 * 65536)).reshape(3, 65536)
    assert abs(np.corrcoef(times[0], times[1])[0, 1]) < 4 / 256
    # Within an aligned pair the two times lie in different halves; which comes first must be a coin toss.
    first_low = (times[0].reshape(-1, 2)[:, 0] < 0.5).mean()
    assert abs(first_low - 0.5) < 4 * 0.5 / np.sqrt(32768)
    batches = stratified_times(0, np.arange(64 * 1024)).reshape(-1, 64)
    ranks = batches.argsort(axis=1).argsort(axis=1)
    assert len(np.unique(ranks, axis=0)) == len(ranks)


def test_random_lengths_rate_and_spread():
    positions = np.arange(40_000)
    lengths = random_lengths(7, positions, 10, 0.25)
    cut = lengths < 10
    # A cut sample keeps full length with probability 1/10, so 0.25 * 0.9 of all are shorter.
    assert abs(cut.mean() - 0.225) < 4 * np.sqrt(0.225 * 0.775 / len(positions))
    counts = np.bincount(lengths[cut], minlength=10)[1:]
    assert (abs(counts - 1000) < 4 * np.sqrt(1000)).all()
    assert (random_lengths(7, positions[:50], 10, 0.0) == 10).all()


def test_lengths_are_drawn_for_aligned_groups():
    positions = np.arange(4000)
    lengths = random_lengths(7, positions, 1000, 0.5, group=4).reshape(-1, 4)
    assert (lengths == lengths[:, :1]).all()
    assert abs((lengths[:, 0] < 1000).mean() - 0.5) < 4 * 0.5 / np.sqrt(len(lengths))
    assert (random_lengths(7, positions[6:9], 1000, 0.5, group=4) == lengths.reshape(-1)[6:9]).all()


def test_counted_masks_hide_exactly_and_evenly():
    length, samples = 12, 20_000
    positions = np.arange(samples)
    eligible = np.ones((samples, length), dtype=bool)
    eligible[1::2, 5:] = False
    counts = np.clip(positions % 13, 0, eligible.sum(axis=1))
    masks = hide_counted(eligible, counts, keyed_words(0, positions, length))
    assert (masks.sum(axis=1) == counts).all()
    assert not (masks & ~eligible).any()
    share = masks[0::2].mean(axis=0)
    assert (abs(share - share.mean()) < 4 * 0.5 / np.sqrt(samples / 2)).all()


def test_independent_masks_hide_at_their_rates():
    positions = np.arange(20_000)
    eligible = np.ones((len(positions), 4), dtype=bool)
    eligible[:, 2] = False
    rates = np.where(positions % 2 == 0, 0.2, 0.9)
    masks = hide_independently(eligible, rates, keyed_words(0, positions, 4))
    assert not masks[:, 2].any()
    for start, rate in ((0, 0.2), (1, 0.9)):
        found = masks[start::2][:, [0, 1, 3]]
        assert (abs(found.mean(axis=0) - rate) < 4 * np.sqrt(rate * (1 - rate) / len(found))).all()


def test_spans_lie_anywhere_and_step_over_what_may_not_be_hidden():
    eligible = np.ones((6, 7), dtype=bool)
    eligible[:, 3] = False
    masks = hide_span(eligible, np.full(6, 2), np.arange(6) / 6 + 0.01)
    assert [np.flatnonzero(row).tolist() for row in masks] == [[0, 1], [0, 1], [1, 2], [2, 4], [4, 5], [5, 6]]


def test_random_ids_are_all_but_the_mask():
    ids = random_ids(1, np.arange(3000), 3, "replace", vocab_size=5, mask_id=2)
    counts = np.bincount(ids.reshape(-1), minlength=5)
    assert counts[2] == 0
    assert (abs(counts[[0, 1, 3, 4]] - 2250) < 4 * np.sqrt(9000 * 0.25 * 0.75)).all()
    beyond = random_ids(1, np.arange(200), 3, "replace", vocab_size=5, mask_id=5)
    assert set(np.unique(beyond)) == {0, 1, 2, 3, 4}


def objective(**settings):
    return MaskedDiffusion(seed=1, vocabulary=Vocabulary(MASK, EOS, np.arange(50)), **settings)


FIELDS = ("inputs", "targets", "weights", "times", "lengths", "positions")


@pytest.mark.parametrize("cut", [1, 3, 8])
@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
def test_a_sample_is_corrupted_the_same_in_any_batch(cut, masking):
    positions = np.arange(100, 124)
    corrupter = objective(masking=masking, random_length_prob=0.3)
    whole = corrupter.corrupt(rows_at(positions))
    parts = [corrupter.corrupt(rows_at(positions[i : i + cut])) for i in range(0, len(positions), cut)]
    for field in FIELDS:
        assert (np.concatenate([getattr(part, field) for part in parts]) == getattr(whole, field)).all()


def test_what_the_model_sees():
    rows = rows_at(np.arange(200))
    batch = objective(random_length_prob=0.5).corrupt(rows)
    there = np.arange(16) < batch.lengths[:, None]
    assert ((batch.inputs == MASK) == (batch.masks | ~there)).all()
    assert (batch.inputs[there & ~batch.masks] == rows.tokens[there & ~batch.masks]).all()
    assert (batch.targets == rows.tokens).all()
    assert not batch.masks[~there].any()
    assert ((batch.document_ids == -1) == ~there).all()
    assert set(np.unique(batch.document_ids[there])) == {0}
    assert batch.denominator == batch.lengths.sum() < 200 * 16
    whole = batch.lengths == 16
    known = np.where(there, rows.tokens, 0).sum(axis=1)
    assert (batch.text_bytes == known)[~whole].all()


def test_documents_are_kept_apart_only_on_demand():
    rows = rows_at(np.arange(4))
    assert objective().corrupt(rows).document_ids is None
    assert (objective(isolate_documents=True).corrupt(rows).document_ids == rows.document_ids).all()


def test_every_epoch_and_every_seed_draws_other_noise():
    rows = rows_at(np.arange(64))
    again = replace(rows, positions=rows.positions + 64)
    first, second = objective().corrupt(rows), objective().corrupt(again)
    other_seed = MaskedDiffusion(seed=2, vocabulary=Vocabulary(MASK, EOS)).corrupt(rows)
    for batch in (second, other_seed):
        assert not (batch.times == first.times).any()
        assert (batch.masks != first.masks).mean() > 0.2
