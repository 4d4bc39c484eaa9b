"""Block diffusion: what is hidden block by block, and that its loss is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.rows import Rows
from dlm_dist import models
from dlm_dist.diffusion.block_diffusion import BlockDiffusion, BlockLengths, ClipRange
from dlm_dist.diffusion.model_inputs import model_inputs
from dlm_dist.diffusion.objectives import MaskedDiffusion, Vocabulary

VOCABULARY = Vocabulary(mask_id=30, eos_id=0)


def rows(count: int, length: int, first: int = 0) -> Rows:
    generator = np.random.default_rng(3)
    tokens = generator.integers(1, 30, (first + count, length))[first:]
    return Rows(
        tokens=tokens,
        document_ids=np.zeros((count, length), dtype=np.int32),
        positions=np.arange(first, first + count),
        text_bytes=np.full(count, length),
        before=np.zeros(count, dtype=np.int64),
    )


def blocks(*phases: tuple[int, int], **changes: Any) -> BlockDiffusion:
    return BlockDiffusion(seed=1, vocabulary=VOCABULARY, block_lengths=phases, **changes)


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
def test_each_block_is_a_sample_of_its_own(masking: str) -> None:
    batch = blocks((0, 4), masking=masking).corrupt(rows(4096, 16))
    assert batch.clean is not None
    assert np.array_equal(batch.clean, batch.targets)
    assert np.array_equal(batch.block_ids, np.arange(16)[None].repeat(4096, 0) // 4)
    hidden = batch.inputs == 30
    assert np.array_equal(hidden, batch.weights > 0)
    counts = hidden.reshape(-1, 4, 4).sum(axis=2)
    if masking == "exact":
        assert counts.min() == 1
        # Times are stratified over the blocks: the four of a row have one count of each kind, in any order.
        assert np.array_equal(np.sort(counts, axis=1), np.arange(1, 5)[None].repeat(4096, 0))
        assert len(np.unique(counts, axis=0)) >= 8
    first = counts[:, 0]
    assert abs(first.mean() - (2.5 if masking == "exact" else 2.0)) < 4 * first.std() / 64
    # What makes it a bound: the weights of a block sum to its length in expectation.
    sums = batch.weights.reshape(-1, 4).sum(axis=1)
    assert abs(sums.mean() - 4) < 4 * max(sums.std(), 1e-6) / np.sqrt(len(sums)) + 1e-5


def test_noise_is_a_function_of_the_position() -> None:
    objective = blocks((64 * 16, 4), (0, 8), random_length_prob=0.3)
    whole = objective.corrupt(rows(100, 16))
    parts = [objective.corrupt(rows(n, 16, first)) for first, n in ((0, 7), (7, 60), (67, 33))]
    for name in ("inputs", "weights", "times", "lengths", "block_ids", "clean"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts])), name
    assert whole.block_ids[63].max() == 3
    assert whole.block_ids[64].max() == 1, "64 rows of 16 tokens are through: the next phase begins"
    cut = np.flatnonzero(whole.lengths < 16)
    assert len(cut)
    for i in cut:
        assert not whole.weights[i, whole.lengths[i] :].any()
        assert whole.document_ids[i, whole.lengths[i] :].max() == -1


def test_block_lengths_are_a_function_of_the_tokens_before() -> None:
    lengths = BlockLengths(((100, 1), (200, 4), (0, 0)))
    assert lengths.at(np.array([0, 9, 10, 29, 30, 10_000]), 10).tolist() == [1, 1, 4, 4, 10, 10]
    with pytest.raises(ValueError, match="block length 4 does not divide rows of 10"):
        lengths.check(10)
    with pytest.raises(ValueError, match="expected pairs"):
        BlockLengths(())
    with pytest.raises(ValueError, match="t_min < t_max"):
        blocks((0, 4), t_min=0.5, t_max=0.5)


def test_one_block_is_masked_diffusion_without_a_clean_stream() -> None:
    batch = blocks((0, 0)).corrupt(rows(8, 16))
    assert batch.clean is None
    assert batch.block_ids is None
    masked = MaskedDiffusion(seed=1, vocabulary=VOCABULARY).corrupt(rows(8, 16))
    # Other draws, the same law: one of the counts 2, 4, ... 16 of sixteenths each in eight stratified samples.
    for drawn in (batch, masked):
        counts = np.sort((drawn.weights > 0).sum(axis=1))
        assert (np.abs(counts - np.arange(1, 16, 2) - 0.5) <= 1).all()
        assert drawn.weights.max(axis=1) == pytest.approx(16 / (drawn.weights > 0).sum(axis=1))


def test_clipped_times_are_no_bound() -> None:
    clipped = blocks((0, 4), t_min=0.3, t_max=0.8, masking="bernoulli")
    assert not clipped.is_bound
    assert blocks((0, 4)).is_bound
    times = blocks((0, 1), t_min=0.3, t_max=0.8).corrupt(rows(64, 16)).times
    assert times.min() >= 0.3
    assert times.max() <= 0.8


def test_the_confidence_term_of_blocks_is_no_bound() -> None:
    sharpened = blocks((0, 4), confidence_weight=0.5)
    assert sharpened.head_settings() == {"confidence_weight": 0.5}
    assert sharpened.not_a_bound() == ["confidence_weight=0.5"]
    assert blocks((0, 4)).head_settings() == {}


def test_a_chosen_range_holds_from_its_position_on_for_blocks_of_its_length() -> None:
    chosen = (ClipRange(20, 4, 0.5, 0.75), ClipRange(30, 8, 0.0, 0.1), ClipRange(60, 4, 0.25, 1.0))
    objective = blocks((40 * 16, 4), (10 * 16, 8), (0, 4), t_max=0.5, clip_search=True, clip_ranges=chosen)
    assert objective.not_a_bound() == ["t_max=0.5", "clip_search=True"]
    batch = objective.corrupt(rows(100, 16))
    assert batch.block_times is not None
    for first, end, low, high in (
        (0, 20, 0, 0.5),
        (20, 40, 0.5, 0.75),
        (40, 50, 0, 0.1),
        (50, 60, 0.5, 0.75),
        (60, 100, 0.25, 1),
    ):
        times = batch.block_times[first:end]
        assert low <= times.min() < low + 0.2 * (high - low), first
        assert high >= times.max() > high - 0.2 * (high - low), first
    parts = [objective.corrupt(rows(n, 16, first)) for first, n in ((0, 25), (25, 40), (65, 35))]
    for name in ("inputs", "weights", "times", "block_times"):
        assert np.array_equal(getattr(batch, name), np.concatenate([getattr(part, name) for part in parts])), name
    # What is not chosen yet is as if there were no search.
    before = blocks((40 * 16, 4), (10 * 16, 8), (0, 4), t_max=0.5).corrupt(rows(100, 16))
    assert np.array_equal(batch.inputs[:20], before.inputs[:20])
    assert not np.array_equal(batch.inputs[20:30], before.inputs[20:30])


SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16},
    "rwkv7": {"hidden_size": 32, "head_size": 16},
}


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("backbone", ["qwen3", "rwkv7"])
def test_blocks_of_one_token_give_the_exact_likelihood(backbone: str, direction: str) -> None:
    """Every token hidden, behind its clean past: the chain rule, token by token."""
    sizes = {"vocab_size": 31, "num_hidden_layers": 2, "mask_token_id": 30, "direction": direction, **SIZES[backbone]}
    model = models.build(backbone, seed=2, **sizes)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data.add_(noise, alpha=0.2)
    data = rows(3, 6)
    batch = blocks((0, 1)).corrupt(data)
    assert (batch.inputs == 30).all()
    assert (batch.weights == 1).all()
    with torch.no_grad():
        loss = model(**model_inputs(batch, torch.device("cpu")))
        nats = 0.0
        for row in torch.from_numpy(data.tokens):
            for place in range(6):
                ids = torch.cat([row[:place], torch.tensor([30])])[None]
                logits = model(ids, block_ids=torch.arange(place + 1)[None]).logits[0, -1]
                nats -= torch.log_softmax(logits, -1)[row[place]].item()
    assert loss.item() == pytest.approx(nats, rel=1e-5)


def test_a_length_that_does_not_divide_the_rows_is_refused_before_any_work() -> None:
    from dlm_dist.config import ConfigError, load_config
    from dlm_dist.training.objective import make_objective

    class Source:
        sequence_length, mask_id, eos_id, vocab_size, token_bytes = 64, 30, 0, 30, None

        def load_tokenizer(self) -> Any:
            return type("Tokenizer", (), {"pad_id": 0, "bos_id": None})

    def made(lengths: str) -> Any:
        keys = ["run.dir=unused", "model.backbone=rwkv7", "model.hidden_size=64", "model.num_hidden_layers=1"]
        keys += [
            "data.train.0.path=unused",
            "train.max_steps=1",
            "train.global_batch_size=1",
            "train.micro_batch_size=1",
        ]
        config = load_config(None, [*keys, "objective.name=block", f"objective.block_lengths={lengths}"])
        return make_objective(config, Source())  # type: ignore[arg-type]

    assert made("[[1e3, 1], [0, 16]]").is_bound
    with pytest.raises(ConfigError, match="block length 24 does not divide rows of 64"):
        made("[[1e3, 1], [0, 24]]")


def test_a_checkpoint_is_evaluated_with_the_length_that_training_was_at(tmp_path: Path) -> None:
    from launcher.trained_as import block_length

    state = {"data_pos": 10, "skipped_ranges": [[0, 2]], "identity": {"objective.block_lengths": [[120, 1], [0, 4]]}}
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps(state))
    # Two positions are skipped: the next sample is at position 12, where 120 tokens lie behind rows of ten.
    assert block_length(tmp_path, None, 10) == 4
    path.write_text(json.dumps(state | {"data_pos": 9}))
    assert block_length(tmp_path, None, 10) == 1
    assert block_length(tmp_path, 2, 10) == 2
    assert block_length(tmp_path / "elsewhere", None, 10) == 1, "the model/ folder of the checkpoint"
    path.unlink()
    assert block_length(tmp_path, None, 10) == 0
