"""Each option of masked diffusion: it does what it says, and it is a function of the sample's position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.rows import Rows
from dlm_dist import randomness
from dlm_dist.diffusion.base import NoisyBatch, Vocabulary
from dlm_dist.diffusion.masked import MaskedDiffusion
from dlm_dist.diffusion.objectives import OBJECTIVES
from dlm_dist.settings import ConfigError

MASK, EOS, LENGTH, SIZE = 40, 39, 16, 41


def rows_at(positions) -> Rows:
    positions = np.asarray(positions, dtype=np.int64)
    tokens = np.stack([randomness.uint64(0, "tokens", int(p), LENGTH) % 40 for p in positions]).astype(np.int64)
    return Rows(
        tokens=tokens,
        document_ids=np.where(np.arange(LENGTH) < LENGTH // 2, 0, 1).astype(np.int32) * np.ones_like(tokens, np.int32),
        positions=positions,
        text_bytes=np.full(len(positions), 3 * LENGTH),
        before=positions % 40,
    )


ROWS = rows_at(np.arange(2048))


def objective(**settings) -> MaskedDiffusion:
    vocabulary = Vocabulary(MASK, EOS, np.arange(SIZE), SIZE, {"pad": 3})
    return MaskedDiffusion(seed=1, vocabulary=vocabulary, **settings)


def corrupted(**settings) -> NoisyBatch:
    return objective(**settings).corrupt(ROWS)


def hidden_of(batch: NoisyBatch) -> np.ndarray:
    return batch.inputs == MASK


BASE = corrupted()

# Every option with a value that differs from its default.
OPTIONS: dict[str, dict] = {
    "schedule": {"schedule": "cosine"},
    "schedule_parameters": {"schedule": "power", "schedule_parameters": {"exponent": 3.0}},
    "masking": {"masking": "bernoulli"},
    "times": {"times": "independent"},
    "t_min": {"t_min": 0.3},
    "t_max": {"t_max": 0.6},
    "min_masking_rate": {"min_masking_rate": 0.3},
    "weighting": {"weighting": "none"},
    "cart_p": {"weighting": "cart", "cart_p": 0.4},
    "soft_tail_p": {"weighting": "soft_tail", "soft_tail_p": 0.2},
    "soft_tail_beta": {"weighting": "soft_tail", "soft_tail_beta": 3.0},
    "reweight_cap": {"reweight_cap": 2.0},
    "normalization": {"normalization": "scored"},
    "noise_type": {"noise_type": "random_replace"},
    "mask_contiguous_region_prob": {"mask_contiguous_region_prob": 0.5},
    "two_segment_prob": {"two_segment_prob": 0.5},
    "one_block_length": {"one_block_length": 4},
    "block_lengths": {"block_lengths": ((64 * LENGTH, 2), (0, 8))},
    "protected_tokens": {"protected_tokens": ("eos", "7")},
    "draws_per_row": {"draws_per_row": 2},
    "complementary_prob": {"draws_per_row": 2, "complementary_prob": 0.5},
    "token_to_token_rate": {"token_to_token_rate": 0.2},
    "token_to_token_weight": {"token_to_token_rate": 0.2, "token_to_token_weight": 0.5},
    "shift": {"shift": True},
    "random_length_prob": {"random_length_prob": 0.5},
    "random_length_group": {"random_length_prob": 0.5, "random_length_group": 4},
    "isolate_documents": {"isolate_documents": True},
    "attention_annealing": {"attention_annealing": 1000},
}
IN_THE_HEAD = ("label_smoothing", "confidence_weight")
FIELDS = (
    *("inputs", "targets", "weights", "document_ids", "times", "lengths", "positions", "text_bytes", "counted"),
    "annealing",
)


def test_every_option_is_tested():
    fields = set(MaskedDiffusion.__dataclass_fields__) - {"seed", "vocabulary", "name"}
    assert fields == {*OPTIONS, *IN_THE_HEAD}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_changes_the_batch(option):
    settings = OPTIONS[option]
    without = {key: value for key, value in settings.items() if key != option}
    if option == "draws_per_row":
        assert len(corrupted(**settings).inputs) == 2 * len(ROWS)
        return
    before, after = corrupted(**without), corrupted(**settings)
    assert any(not np.array_equal(getattr(before, field), getattr(after, field)) for field in FIELDS)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cut", [1, 3])
def test_a_sample_is_corrupted_the_same_in_any_batch(option, cut):
    corrupter, positions = objective(**OPTIONS[option]), np.arange(100, 124)
    whole = corrupter.corrupt(rows_at(positions))
    parts = [corrupter.corrupt(rows_at(positions[i : i + cut])) for i in range(0, len(positions), cut)]
    for field in FIELDS:
        value = getattr(whole, field)
        # A batch without cut tails needs no document ids, so these may be None in some parts only.
        if value is not None and field != "document_ids":
            assert np.array_equal(np.concatenate([getattr(part, field) for part in parts]), value)


@pytest.mark.parametrize("option", OPTIONS)
def test_another_seed_draws_other_noise(option):
    if option == "isolate_documents":
        return
    first = objective(**OPTIONS[option])
    second = replace(first, seed=2)
    rows = ROWS[:64]
    assert not np.array_equal(first.corrupt(rows).inputs, second.corrupt(rows).inputs)


def test_times_are_independent_or_stratified():
    strata = np.sort((BASE.times.reshape(-1, 64) * 64).astype(int), axis=1)
    assert (strata == np.arange(64)).all()
    independent = corrupted(times="independent").times
    # The mean of 2048 numbers strays by 1 / sqrt(12 * 2048); that of stratified ones by far less.
    assert abs(independent.mean() - 0.5) < 4 / np.sqrt(12 * 2048)
    counts = np.bincount((independent * 2048).astype(int), minlength=2048)
    assert 0.33 < (counts == 0).mean() < 0.41  # exp(-1)


def test_a_bandwidth_and_a_least_rate():
    batch = corrupted(t_min=0.3, t_max=0.8)
    assert 0.3 <= batch.times.min() < 0.31
    assert 0.79 < batch.times.max() < 0.8
    shares = hidden_of(batch).sum(axis=1)
    assert (shares.min(), shares.max()) == (5, 13)
    assert np.allclose(batch.weights.max(axis=1), LENGTH / shares)
    least = corrupted(min_masking_rate=0.3)
    assert hidden_of(least).sum(axis=1).min() == 5
    assert np.isclose(least.weights.max(), 16 / 5)
    by_chance = corrupted(min_masking_rate=0.3, masking="bernoulli")
    assert np.isclose(by_chance.weights.max(), 1 / 0.3, rtol=1e-5)


def test_a_cap_cuts_weights_off():
    capped = corrupted(reweight_cap=2.0)
    assert np.allclose(capped.weights, np.minimum(BASE.weights, 2.0))


def test_random_replacement_hides_behind_other_tokens():
    batch = corrupted(noise_type="random_replace")
    assert np.array_equal(batch.weights, BASE.weights)
    assert not (batch.inputs == MASK).any()
    assert np.array_equal(batch.inputs[~BASE.masks], BASE.inputs[~BASE.masks])
    assert 0.95 < (batch.inputs != batch.targets)[BASE.masks].mean() < 0.995  # 1 - 1/40 hit another token


def test_spans_are_contiguous_and_as_many_tokens_as_else():
    for masking in ("exact", "bernoulli"):
        hidden = hidden_of(corrupted(mask_contiguous_region_prob=1.0, masking=masking))
        assert ((np.diff(hidden.astype(int), axis=1) == 1).sum(axis=1) + hidden[:, 0] == 1).all()
        assert hidden.any(axis=0).all()
    assert np.array_equal(hidden_of(corrupted(mask_contiguous_region_prob=1.0)).sum(axis=1), BASE.masks.sum(axis=1))
    same = (hidden_of(corrupted(mask_contiguous_region_prob=0.25)) == BASE.masks).all(axis=1)
    assert 0.75 < same.mean() < 0.87  # three quarters, and those whose set is a span by chance


def test_two_segments_have_rates_of_their_own():
    batch = corrupted(two_segment_prob=1.0)
    kinds = [len(np.unique(row[row > 0])) for row in batch.weights]
    assert set(kinds) <= {1, 2}
    assert np.mean(np.array(kinds) == 2) > 0.7
    half = corrupted(two_segment_prob=0.5)
    changed = (half.weights != BASE.weights).any(axis=1)
    assert 0.4 < changed.mean() < 0.55
    row = next(row for row, kind in zip(batch.weights, kinds, strict=True) if kind == 2)
    first, second = (np.flatnonzero(row == value) for value in dict.fromkeys(row[row > 0]))
    assert first.max() < second.min()


def test_one_block_is_noised_behind_what_precedes_it():
    batch = corrupted(one_block_length=4, random_length_prob=0.3)
    place, lengths = np.arange(LENGTH), batch.lengths
    block = batch.masks.argmax(axis=1) // 4
    assert (np.bincount(block[lengths == LENGTH], minlength=4) > 0.2 * (lengths == LENGTH).sum()).all()
    later = place >= 4 * (block[:, None] + 1)
    earlier = place < 4 * block[:, None]
    assert (batch.inputs[later] == MASK).all()
    assert np.array_equal(batch.inputs[earlier], ROWS.tokens[earlier])
    assert not batch.masks[later | earlier].any()
    sizes = np.minimum(4, lengths - 4 * block)
    assert np.allclose(batch.weights.max(axis=1), -(-lengths // 4) * sizes / batch.masks.sum(axis=1))
    assert batch.denominator == lengths.sum()


def test_protected_tokens_are_never_hidden():
    batch = corrupted(protected_tokens=("eos", "pad", "7"))
    protected = np.isin(ROWS.tokens, [EOS, 3, 7])
    assert protected.any()
    assert not batch.masks[protected].any()
    assert np.array_equal(batch.inputs[protected], ROWS.tokens[protected])
    sizes = (~protected).sum(axis=1)
    assert np.allclose(batch.weights.max(axis=1), sizes / batch.masks.sum(axis=1))
    assert batch.denominator == ROWS.tokens.size
    maskable = corrupted(protected_tokens=("eos", "pad", "7"), normalization="maskable")
    assert maskable.denominator == sizes.sum()
    everything = replace(objective(), protected_tokens=tuple(str(i) for i in range(40)))
    assert everything.corrupt(ROWS[:4]).weights.sum() == 0


def test_a_beginning_of_text_may_be_protected_where_the_tokenizer_names_one():
    from dlm_dist.training.objective import vocabulary

    class Source:
        mask_id, eos_id, token_bytes, vocab_size = MASK, EOS, None, SIZE

        def __init__(self, bos_id):
            self.bos_id, self.pad_id = bos_id, EOS

        def load_tokenizer(self):
            return self

    named = MaskedDiffusion(seed=1, vocabulary=vocabulary(Source(7)), protected_tokens=("bos",))
    assert not named.corrupt(ROWS).masks[ROWS.tokens == 7].any()
    with pytest.raises(ValueError, match=r"no token called bos \(it knows eos, pad\)"):
        MaskedDiffusion(seed=1, vocabulary=vocabulary(Source(None)), protected_tokens=("bos",))


def test_the_mean_may_be_over_what_is_scored():
    batch = corrupted(normalization="scored")
    assert batch.denominator == BASE.masks.sum()
    assert np.array_equal(batch.weights, BASE.weights)


def test_two_draws_of_a_row_share_its_cut_and_spread_their_times():
    batch = corrupted(draws_per_row=2, random_length_prob=0.5)
    first, second = (slice(start, None, 2) for start in (0, 1))
    assert np.array_equal(batch.positions, ROWS.positions.repeat(2))
    assert np.array_equal(batch.lengths[first], batch.lengths[second])
    assert np.array_equal(batch.times[first], BASE.times)
    assert np.allclose((batch.times[second] - batch.times[first]) % 1.0, 0.5)
    assert np.array_equal(batch.text_bytes[first], batch.text_bytes[second])
    assert (batch.masks[first] != batch.masks[second]).any(axis=1).mean() > 0.9
    assert batch.denominator == 2 * corrupted(random_length_prob=0.5).denominator


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
def test_complementary_masks_hide_every_token_once(masking):
    protected = np.isin(ROWS.tokens, [7])
    batch = corrupted(draws_per_row=2, complementary_prob=1.0, masking=masking, protected_tokens=("7",))
    hidden = hidden_of(batch)
    assert np.array_equal(hidden[0::2] ^ hidden[1::2], ~protected)
    mixed = hidden_of(corrupted(draws_per_row=2, complementary_prob=0.3, masking=masking))
    share = (mixed[0::2] ^ mixed[1::2]).all(axis=1).mean()
    assert abs(share - 0.3) < 4 * np.sqrt(0.21 / len(ROWS)) + 0.01


def test_token_to_token_training_replaces_visible_tokens_and_scores_them():
    batch = corrupted(token_to_token_rate=0.2, token_to_token_weight=0.5)
    scored = batch.masks & ~BASE.masks
    visible = ~BASE.masks
    assert np.array_equal(hidden_of(batch), BASE.masks)
    assert abs(scored[visible].mean() - 0.2) < 4 * np.sqrt(0.16 / visible.sum())
    assert (batch.weights[scored] == 0.5).all()
    assert np.array_equal(batch.weights[BASE.masks], BASE.weights[BASE.masks])
    assert 0.95 < (batch.inputs != batch.targets)[scored].mean() < 0.995
    assert np.array_equal(batch.inputs[visible & ~scored], ROWS.tokens[visible & ~scored])


def test_a_shifted_batch_predicts_each_token_one_place_earlier():
    batch = corrupted(shift=True, random_length_prob=0.5)
    plain = corrupted(random_length_prob=0.5)
    assert batch.inputs.shape == (len(ROWS), LENGTH + 1)
    assert np.array_equal(batch.inputs[:, 0], ROWS.before)
    assert np.array_equal(batch.inputs[:, 1:], plain.inputs)
    assert np.array_equal(batch.targets[:, :-1], ROWS.tokens)
    assert np.array_equal(batch.weights[:, :-1], plain.weights)
    assert not batch.weights[:, -1].any()
    assert np.array_equal(batch.document_ids[:, 1:], plain.document_ids)
    assert (batch.document_ids[:, 0] == 0).all()
    assert batch.denominator == plain.denominator


def test_cart_weights_see_only_the_tokens_own_document():
    together, apart = (corrupted(weighting="cart", isolate_documents=isolate).weights for isolate in (False, True))
    assert (apart <= together + 1e-6).all()
    assert (apart < together - 1e-3).any()


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({}, True),
        *[
            (OPTIONS[name], True)
            for name in ("schedule", "schedule_parameters", "masking", "times", "draws_per_row", "complementary_prob")
        ],
        *[(OPTIONS[name], True) for name in ("shift", "one_block_length", "random_length_prob", "isolate_documents")],
        ({"normalization": "maskable"}, True),
        ({"weighting": "inverse_rate"}, True),
        ({"weighting": "inverse_rate", "masking": "bernoulli"}, True),
        ({"weighting": "inverse_rate", "schedule": "cosine"}, False),
        ({"weighting": "inverse_rate", "draws_per_row": 2, "complementary_prob": 1.0}, False),
        ({"weighting": "inverse_rate", "masking": "bernoulli", "draws_per_row": 2, "complementary_prob": 1.0}, True),
        *[({"weighting": name}, False) for name in ("none", "one_minus_t", "snr", "cart", "soft_tail")],
        *[
            (OPTIONS[name], False)
            for name in ("t_min", "t_max", "min_masking_rate", "reweight_cap", "normalization", "noise_type")
        ],
        *[
            (OPTIONS[name], False)
            for name in (
                "mask_contiguous_region_prob",
                "two_segment_prob",
                "protected_tokens",
                "token_to_token_rate",
            )
        ],
        ({"label_smoothing": 0.1}, False),
        ({"confidence_weight": 0.1}, False),
    ],
)
def test_what_is_a_bound(settings, bound):
    made = objective(**settings)
    assert made.is_bound == bound
    assert (not made.not_a_bound()) == bound


def test_the_named_objectives():
    vocabulary = Vocabulary(MASK, EOS, size=SIZE)
    made = {name: OBJECTIVES[name](seed=1, vocabulary=vocabulary) for name in ("mdlm", "dllm", "soft_ce")}
    assert [(one.name, one.is_bound) for one in made.values()] == [("mdlm", True), ("dllm", True), ("soft_ce", False)]
    assert made["mdlm"].head_settings() == made["dllm"].head_settings() == {}
    assert made["soft_ce"].head_settings() == {"label_smoothing": 0.1}
    assert objective(confidence_weight=0.5).head_settings() == {"confidence_weight": 0.5}


def test_mistakes_are_one_sentence_each():
    for settings, sentence in (
        ({"masking": "some"}, "masking is 'some': expected one of exact, bernoulli"),
        ({"weighting": "min_snr"}, "weighting is 'min_snr': expected one of elbo, inverse_rate"),
        ({"t_min": 0.5, "t_max": 0.5}, "expected 0 <= t_min < t_max <= 1"),
        ({"complementary_prob": 0.5}, "draws_per_row is 1: complementary masks need 2"),
        ({"shift": True, "isolate_documents": True}, "the output before a document does not see it"),
        ({"protected_tokens": ("eos", "41")}, "There is no token 41: the ids of this tokenizer go to 40"),
        ({"protected_tokens": ("bos",)}, r"no token called bos \(it knows eos, pad\): give its id"),
        ({"protected_tokens": (str(MASK),)}, "protected_tokens holds 40, the mask token"),
    ):
        with pytest.raises(ValueError, match=sentence):
            objective(**settings)
    with pytest.raises(ValueError, match="how many ids the vocabulary has"):
        MaskedDiffusion(1, Vocabulary(MASK, EOS), noise_type="random_replace")
    with pytest.raises(ValueError, match="mask token has id 39, which is also the tokenizer's eos"):
        Vocabulary(EOS, EOS)
    with pytest.raises(ValueError, match="which is also the tokenizer's pad"):
        Vocabulary(MASK, EOS, named={"pad": MASK})
    rows = replace(ROWS, tokens=np.where(np.arange(LENGTH) == 3, MASK, ROWS.tokens))
    with pytest.raises(ConfigError, match="the row at position 5 holds the mask token's id 40 as text"):
        objective().corrupt(rows[5:7])


def test_blocks_grow_with_the_data():
    """Nano-LLaDA's wsd: one block of each row, whose length is a function of the tokens before the row."""
    vocabulary = Vocabulary(mask_id=MASK, eos_id=EOS, size=40)
    count = len(ROWS.positions)
    phases = ((count // 4 * LENGTH, 1), (count // 4 * LENGTH, 4), (0, 0))
    wsd = OBJECTIVES["wsd"](seed=1, vocabulary=vocabulary, block_lengths=phases, t_min=0.9, t_max=1.0)
    batch = wsd.corrupt(ROWS)
    sizes = np.repeat([1, 4, LENGTH], [count // 4, count // 4, count - 2 * (count // 4)])
    scored = batch.masks
    first, last = scored.argmax(axis=1), LENGTH - 1 - scored[:, ::-1].argmax(axis=1)
    some = scored.any(axis=1)
    assert (first // sizes == last // sizes)[some].all(), "what is scored lies in one block"
    for size in (1, 4, LENGTH):
        of_size = some & (sizes == size)
        assert len(np.unique(first[of_size] // size)) == LENGTH // size, "any block of the row"
    behind = np.arange(LENGTH) >= ((first // sizes + 1) * sizes)[:, None]
    assert (batch.inputs[some][behind[some]] == MASK).all()
    before = np.arange(LENGTH) < ((first // sizes) * sizes)[:, None]
    assert np.array_equal(batch.inputs[some][before[some]], ROWS.tokens[some][before[some]])
    with pytest.raises(ValueError, match="both given"):
        OBJECTIVES["wsd"](seed=1, vocabulary=vocabulary, one_block_length=4)


def test_nano_lladas_draws():
    vocabulary = Vocabulary(mask_id=MASK, eos_id=EOS, size=40)
    for name, schedule in (("iid_t", "linear"), ("wsd", "cosine_squared")):
        made = OBJECTIVES[name](seed=1, vocabulary=vocabulary)
        assert (made.name, made.schedule, made.masking, made.times) == (name, schedule, "bernoulli", "independent")
        assert made.not_a_bound() == ["t_min=0.001", "t_max=0.999", "protected_tokens=('eos',)"]
        whole = replace(made, t_min=0.0, t_max=1.0, protected_tokens=())
        assert whole.is_bound
        begun = OBJECTIVES[name](seed=1, vocabulary=replace(vocabulary, named={"bos": 7}))
        assert begun.protected_tokens == ("eos", "bos")
        assert not begun.corrupt(ROWS).masks[np.isin(ROWS.tokens, (EOS, 7))].any()
    iid_t = OBJECTIVES["iid_t"](seed=1, vocabulary=vocabulary)
    batch = iid_t.corrupt(ROWS)
    assert not batch.masks[ROWS.tokens == EOS].any()
    hidden = batch.masks
    assert np.allclose(
        batch.weights[hidden], np.broadcast_to(1 / batch.times[:, None], hidden.shape)[hidden], rtol=1e-5
    )
    assert batch.denominator == (ROWS.tokens != EOS).sum()
    # w = -alpha' / (1 - alpha) with alpha = cos^2(pi t / 2), times the number of blocks that the chosen one stands for.
    wsd = OBJECTIVES["wsd"](seed=1, vocabulary=vocabulary, block_lengths=((0, LENGTH // 2),)).corrupt(ROWS)
    t = wsd.times[:, None]
    weight = 2 * (np.pi / 2 * np.sin(np.pi * t)) / np.sin(np.pi * t / 2) ** 2
    assert np.allclose(wsd.weights[wsd.masks], np.broadcast_to(weight, wsd.masks.shape)[wsd.masks], rtol=1e-4)
