from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.rows import Rows
from dlm_dist import randomness
from dlm_dist.diffusion.corruption import (
    bernoulli_masks,
    exact_count_masks,
    keyed_words,
    random_lengths,
    stratified_times,
)
from dlm_dist.diffusion.objectives import MaskedDiffusion, Vocabulary
from dlm_dist.diffusion.schedules import SCHEDULES

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


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_schedule_contract(schedule):
    s = SCHEDULES[schedule]
    t = np.linspace(0, 1, 1001)
    assert abs(s.rate(t)[[0, -1]] - [0, 1]).max() < 1e-15
    assert (np.diff(s.rate(t)) > 0).all()
    middle = t[1:-1]
    numeric = (s.rate(middle + 1e-6) - s.rate(middle - 1e-6)) / 2e-6
    assert abs(s.derivative(middle) - numeric).max() < 1e-8
    assert abs(s.inverse(s.rate(t)) - t).max() < 1e-7


def exact_bound(cost):
    """Sum over k of (1/k) * k * cost[k] nats of a row whose hidden tokens cost cost[k] each when k are hidden."""
    return sum(cost[k] for k in range(1, len(cost)))


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("masking", [exact_count_masks, bernoulli_masks])
def test_both_maskings_are_unbiased(schedule, masking):
    length, samples = 8, 60_000
    cost = np.concatenate([[0.0], np.linspace(0.2, 3.0, length)])
    # Independent times, so that the standard error is that of independent samples.
    times = randomness.uniform(1, "independent", 0, samples)
    words = randomness.uint64(2, "words", 0, samples * length).reshape(samples, length)
    masks, weights = masking(SCHEDULES[schedule], times, np.full(samples, length), words)
    hidden = masks.sum(axis=1)
    estimates = weights * hidden * cost[hidden]
    error = estimates.std() / np.sqrt(samples)
    assert abs(estimates.mean() - exact_bound(cost)) < 4 * error


def test_exact_masks_hide_exactly_and_evenly():
    length, samples = 12, 20_000
    positions = np.arange(samples)
    lengths = np.where(positions % 2 == 0, length, 5)
    times = stratified_times(0, positions)
    masks, weights = exact_count_masks(SCHEDULES["linear"], times, lengths, keyed_words(0, positions, length))
    hidden = masks.sum(axis=1)
    assert (hidden == np.clip(np.ceil(times * lengths), 1, lengths)).all()
    assert np.allclose(weights, lengths / hidden, rtol=1e-12)
    assert not masks[lengths == 5][:, 5:].any()
    share = masks[lengths == length].mean(axis=0)
    assert (abs(share - share.mean()) < 4 * 0.5 / np.sqrt(samples / 2)).all()


def test_stratified_exact_counts_lower_the_spread_of_a_batch_loss():
    # Analytic model: each hidden token costs cost(k / l); compare the spread of batch-of-8 losses.
    length, batches = 64, 4000
    positions = np.arange(8 * batches)
    lengths = np.full(len(positions), length)
    cost = 0.3 + 4.0 * (np.arange(length + 1) / length) ** 2
    words = keyed_words(4, positions, length)

    def spread(masking, times):
        masks, weights = masking(SCHEDULES["linear"], times, lengths, words)
        hidden = masks.sum(axis=1)
        return (weights * hidden * cost[hidden] / length).reshape(-1, 8).mean(axis=1).std()

    ours = spread(exact_count_masks, stratified_times(4, positions))
    theirs = spread(bernoulli_masks, randomness.uniform(5, "independent", 0, len(positions)))
    assert theirs > 4 * ours


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
