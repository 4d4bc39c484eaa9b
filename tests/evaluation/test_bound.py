"""The held-out bound against enumerated truth, and the unigram model against a hand computation."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.shards import ShardedSource, write_source
from data_pipeline.tokenizers import load
from dlm_dist import models
from dlm_dist.evaluation.bound import HeldOutBound, _summary, evaluate_bound, unigram_nats_per_token

CPU = torch.device("cpu")


def source_of(folder: Path, rows: list[str]) -> ShardedSource:
    """A data set of bytes with these rows, which must be of one length."""
    tokenizer = load("bytes")
    write_source(folder, np.stack([tokenizer.encode(row) for row in rows]), tokenizer, rows_per_shard=5)
    return ShardedSource.open(folder)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> ShardedSource:
    """16 rows of 4 bytes."""
    return source_of(tmp_path_factory.mktemp("four"), [f"{i:04d}" for i in range(16)])


class Known(torch.nn.Module):
    """A model whose cross entropy at place i is a table's entry: losses[hidden places as a bit set, i]."""

    def __init__(self, losses: torch.Tensor, mask_id: int) -> None:
        super().__init__()
        self.losses, self.mask_id, self.calls = losses, mask_id, 0

    def forward(self, input_ids, supervised, targets, weights, per_row):
        assert per_row
        assert not self.training
        self.calls += 1
        length = input_ids.shape[1]
        bits = ((input_ids == self.mask_id) * 2 ** torch.arange(length)).sum(dim=1)
        rows = self.losses[bits[supervised // length], supervised % length]
        return (rows * weights).sum(), rows


def by_count(losses: list[float]) -> torch.Tensor:
    """The table of a model that loses losses[k - 1] nats at each of k hidden tokens."""
    length = len(losses)
    counts = torch.tensor([bin(bits).count("1") for bits in range(2**length)])
    return torch.cat([torch.zeros(1), torch.tensor(losses)])[counts][:, None].expand(-1, length)


def test_a_loss_that_knows_only_the_count_gives_its_mean_over_counts(four):
    losses = [0.5, 1.5, 4.0, 7.0]
    # 16 stratified times hit each count exactly four times; each then weighs T / k over k tokens.
    bound = evaluate_bound(Known(by_count(losses), four.mask_id), four, CPU, num_rows=16)
    assert bound.nats_per_token == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert bound.bits_per_byte == pytest.approx(sum(losses) / 4 / math.log(2), rel=1e-6)
    assert (bound.rows, bound.draws) == (16, 1)


def test_the_loss_by_time_is_that_of_the_samples_with_such_times(four):
    losses = [0.5, 1.5, 4.0, 7.0]
    bound = evaluate_bound(Known(by_count(losses), four.mask_id), four, CPU, num_rows=16, draws=5)
    assert bound.by_time is not None
    assert not bound.exact
    assert [(part.first, part.last) for part in bound.by_time] == [(i / 10, (i + 1) / 10) for i in range(10)]
    assert sum(part.draws for part in bound.by_time) == 80
    # Times are stratified, so each tenth gets about eight of them; ceil(4 t) tokens are hidden.
    for part, expected in zip(bound.by_time, (0.5, 0.5, None, 1.5, 1.5, 4.0, 4.0, None, 7.0, 7.0), strict=True):
        assert abs(part.draws - 8) <= 2
        if expected is not None:
            assert part.nats_per_token == pytest.approx(expected, rel=1e-6)
            assert part.standard_error == pytest.approx(0.0, abs=1e-6)
    assert 0.5 < bound.by_time[2].nats_per_token < 1.5
    assert bound.by_time[2].standard_error > 0.0
    weighted = sum(part.nats_per_token * part.draws for part in bound.by_time)
    assert weighted / 80 == pytest.approx(bound.nats_per_token, rel=1e-9)
    alone = evaluate_bound(Known(by_count(losses), four.mask_id), four, CPU, num_rows=1).by_time
    assert [part.draws for part in alone].count(1) == 1
    assert {part.nats_per_token is None for part in alone if part.draws == 0} == {True}
    assert {part.standard_error for part in alone} == {None}


def test_every_block_counts_at_its_own_time(four):
    """Blocks of two: one hidden token up to t = 1/2, both above, whatever the row's mean time is."""

    class Blocks(torch.nn.Module):
        def forward(self, input_ids, supervised, targets, weights, per_row, clean_ids, block_ids):
            assert block_ids[0].tolist() == [0, 0, 1, 1]
            hidden = (input_ids == four.mask_id).reshape(len(input_ids), 2, 2).sum(dim=2)
            rows = torch.tensor([0.0, 2.0, 5.0])[hidden[supervised // 4, supervised % 4 // 2]]
            return (rows * weights).sum(), rows

    bound = evaluate_bound(Blocks(), four, CPU, num_rows=16, draws=5, objective="block", block_length=2)
    assert bound.nats_per_token == pytest.approx(3.5, rel=1e-6)
    assert [part.nats_per_token for part in bound.by_time] == [pytest.approx(2.0)] * 5 + [pytest.approx(5.0)] * 5
    assert sum(part.draws for part in bound.by_time) == 16 * 5 * 2


def test_blocks_of_one_token_are_exact(four):
    class One(torch.nn.Module):
        def forward(self, input_ids, supervised, targets, weights, per_row, clean_ids, block_ids):
            assert (input_ids == four.mask_id).all()
            rows = torch.full((len(supervised),), 1.25)
            return (rows * weights).sum(), rows

    bound = evaluate_bound(One(), four, CPU, num_rows=3, objective="block", block_length=1)
    assert (bound.nats_per_token, bound.exact, bound.by_time) == (1.25, True, None)


def test_a_shifted_model_is_scored_one_place_earlier(four):
    """Read behind the byte before each row, the losses of place i + 1 are asked for at place i."""

    class Behind(Known):
        def forward(self, input_ids, supervised, targets, weights, per_row):
            assert input_ids.shape[1] == 5
            assert (supervised % 5 < 4).all()
            supervised = supervised // 5 * 4 + supervised % 5
            return super().forward(input_ids[:, 1:], supervised, targets, weights, per_row)

    losses = torch.rand(16, 4, generator=torch.Generator().manual_seed(0))
    plain = evaluate_bound(Known(losses, four.mask_id), four, CPU, num_rows=16, draws=2)
    shifted = evaluate_bound(Behind(losses, four.mask_id), four, CPU, num_rows=16, draws=2, shift=True)
    assert shifted == plain


class Bigram(torch.nn.Module):
    """A causal model that loses table[previous token, token] nats."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids, supervised, targets, weights, per_row):
        rows = self.table[input_ids.flatten()[supervised], targets]
        return (rows * weights).sum(), rows


def test_the_likelihood_of_ar_is_exact_and_counts_the_token_before_each_row(tmp_path):
    source = source_of(tmp_path, [f"{i:02d}ab" for i in range(12)])
    table = torch.rand(258, 258, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = evaluate_bound(Bigram(table), source, CPU, num_rows=7, batch_size=3, objective="ar")
    stream = [source.eos_id, *source.read(range(7)).tokens.flatten().tolist()]
    nats = torch.stack([table[a, b] for a, b in itertools.pairwise(stream)]).reshape(7, 4).sum(dim=1)
    assert found.nats_per_token == pytest.approx(nats.sum().item() / 28, rel=1e-9)
    assert found.bits_per_byte == pytest.approx(found.nats_per_token / math.log(2), rel=1e-9)  # a token is a byte
    assert found.standard_error == pytest.approx(nats.std().item() / math.sqrt(7) / 4, rel=1e-9)
    assert (found.rows, found.draws, found.exact, found.by_time) == (7, 1, True, None)
    with pytest.raises(ValueError, match="draws is 2: the objective ar"):
        evaluate_bound(Bigram(table), source, CPU, num_rows=7, draws=2, objective="ar")


def test_the_bound_is_the_mean_over_all_masks(four):
    length = 4
    losses = torch.rand(2**length, length, generator=torch.Generator().manual_seed(1)) * 5
    # -log p(x) <= sum over k of 1/T * mean over sets S of size k of T/k * sum over i in S of loss(i | rest).
    truth = 0.0
    for k in range(1, length + 1):
        sets = list(itertools.combinations(range(length), k))
        for hidden in sets:
            bits = sum(2**i for i in hidden)
            truth += sum(float(losses[bits, i]) for i in hidden) / k / len(sets)
    bound = evaluate_bound(Known(losses, four.mask_id), four, CPU, num_rows=16, draws=512, batch_size=512)
    assert bound.standard_error is not None
    assert bound.standard_error < 0.02
    assert abs(bound.nats_per_token - truth / length) < 4 * bound.standard_error


def test_isolated_documents_are_named_to_the_model(tmp_path):
    tokenizer = load("bytes")
    rows = np.array([[65, tokenizer.eos_id, 66, 67]])
    write_source(tmp_path, rows, tokenizer)
    seen = []

    class Recorder(Known):
        def forward(self, document_ids=None, **inputs):
            seen.append(document_ids)
            return super().forward(**inputs)

    model = Recorder(by_count([1.0] * 4), tokenizer.mask_id)
    source = ShardedSource.open(tmp_path)
    evaluate_bound(model, source, CPU, num_rows=1)
    evaluate_bound(model, source, CPU, num_rows=1, isolate_documents=True)
    assert seen[0] is None
    assert seen[1][0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("backbone", ["qwen3", "rwkv7"])
def test_the_batch_size_does_not_matter(backbone, tmp_path):
    source = source_of(tmp_path, [f"row {i:02d} of text!!" for i in range(11)])
    sizes = {"qwen3": {"num_attention_heads": 2, "head_dim": 16}, "rwkv7": {"head_size": 16}}[backbone]
    model = models.build(
        backbone, vocab_size=320, hidden_size=32, num_hidden_layers=1, mask_token_id=source.mask_id, **sizes
    )
    model.train()
    steps: list[int] = []
    results = [
        evaluate_bound(model, source, CPU, num_rows=9, draws=3, batch_size=size, advance=steps.append)
        for size in (1, 4, 64)
    ]
    assert model.training
    assert sum(steps) == 3 * 27
    for result in results:
        assert result.nats_per_token == pytest.approx(results[0].nats_per_token, rel=1e-5)
        assert result.standard_error == pytest.approx(results[0].standard_error, rel=1e-4)
        assert (result.rows, result.draws) == (9, 3)
    # Untrained: about uniform over the vocabulary.
    assert results[0].nats_per_token == pytest.approx(math.log(320), rel=0.2)


def test_the_noise_does_not_depend_on_how_many_rows_are_asked_for(four):
    table = torch.rand(16, 4, generator=torch.Generator().manual_seed(2))
    few, many = (evaluate_bound(Known(table, four.mask_id), four, CPU, num_rows=n, draws=2) for n in (1, 3))
    again = evaluate_bound(Known(table, four.mask_id), four, CPU, num_rows=3, draws=2)
    assert again == many
    assert few.nats_per_token != many.nats_per_token
    assert few.standard_error is None


def summary(nats, tokens) -> HeldOutBound:
    return _summary(np.stack([nats, tokens, np.full(len(nats), -1.0)], axis=1), draws=1, exact=True)


def test_standard_error_of_rows_of_one_length_is_that_of_a_mean():
    nats = np.random.default_rng(0).gamma(2.0, 8.0, size=40)
    bound = summary(nats, np.full(40, 16.0))
    assert bound.standard_error == pytest.approx(nats.std(ddof=1) / math.sqrt(40) / 16)
    assert bound.bits_per_byte is None


def test_standard_error_is_the_spread_of_repeated_measurements():
    random = np.random.default_rng(1)
    found = []
    for _ in range(2000):
        tokens = random.integers(8, 65, size=50).astype(np.float64)
        found.append(summary(tokens * 2.0 + random.normal(0, 3, 50) * np.sqrt(tokens), tokens))
    spread = np.std([bound.nats_per_token for bound in found])
    # The spread of 2000 numbers is known to 1/sqrt(4000) of itself; four of these.
    assert np.mean([bound.standard_error for bound in found]) == pytest.approx(spread, rel=4 / math.sqrt(4000))


def test_unigram_by_hand(tmp_path):
    train = source_of(tmp_path / "train", ["aaab", "abbc"])
    held_out = source_of(tmp_path / "validation", ["abcd", "aaaa", "zzzz"])
    size = 8 + train.vocab_size
    expected = -(math.log(5 / size) + math.log(4 / size) + math.log(2 / size) + math.log(1 / size)) / 4
    assert unigram_nats_per_token(train, held_out, 1) == pytest.approx(expected, rel=1e-12)
    expected = (4 * expected - 4 * math.log(5 / size)) / 8
    assert unigram_nats_per_token(train, held_out, 2) == pytest.approx(expected, rel=1e-12)
    everything = unigram_nats_per_token(train, held_out, 99)
    assert everything == pytest.approx((8 * expected - 4 * math.log(1 / size)) / 12, rel=1e-12)


def test_unigram_reads_in_parts(tmp_path, monkeypatch):
    train = source_of(tmp_path / "train", [f"{i:04d}" for i in range(13)])
    whole = unigram_nats_per_token(train, train, 13)
    monkeypatch.setattr("dlm_dist.evaluation.bound._ROWS_AT_ONCE", 3)
    assert unigram_nats_per_token(train, train, 13) == whole
