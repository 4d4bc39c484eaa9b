"""Noise on the embedding of masks: how much, where, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.rows import Rows
from dlm_dist import models
from dlm_dist.diffusion.base import Objective
from dlm_dist.diffusion.mask_noise import WithMaskNoise
from dlm_dist.diffusion.model_inputs import model_inputs
from dlm_dist.diffusion.objectives import OBJECTIVES, Vocabulary
from dlm_dist.models.mask_noise import add_mask_noise

MASK, EOS = 30, 0
IDS = Vocabulary(MASK, EOS)
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16},
    "rwkv7": {"hidden_size": 32, "head_size": 16},
}


def rows(count: int, first: int = 0, length: int = 16) -> Rows:
    tokens = np.random.default_rng(3).integers(1, 30, (first + count, length))[first:]
    zeros = np.zeros(count, dtype=np.int64)
    return Rows(tokens, np.zeros(tokens.shape, np.int32), np.arange(first, first + count), zeros + 16, zeros)


def noisy(name: str = "mdlm", std: float = 0.5, samples: int = 100, **settings: Any) -> WithMaskNoise:
    return WithMaskNoise(OBJECTIVES[name](seed=1, vocabulary=IDS, **settings), seed=1, std=std, samples=samples)


def test_the_noise_falls_to_nothing_and_hangs_on_the_position() -> None:
    objective = noisy()
    whole = objective.corrupt(rows(140))
    assert whole.mask_noise_keys is not None
    assert whole.mask_noise_scales is not None
    np.testing.assert_allclose(whole.mask_noise_scales, 0.5 * np.clip(1 - np.arange(140) / 100, 0, None), rtol=1e-6)
    assert len(set(whole.mask_noise_keys.tolist())) == 140
    for first, count in ((0, 7), (7, 60), (67, 73)):
        part = objective.corrupt(rows(count, first))
        assert np.array_equal(part.mask_noise_keys, whole.mask_noise_keys[first : first + count])
        assert np.array_equal(part.mask_noise_scales, whole.mask_noise_scales[first : first + count])
    behind = objective.corrupt(rows(40, 100))
    assert behind.mask_noise_keys is None
    assert "mask_noise_keys" not in model_inputs(behind, torch.device("cpu"))
    assert not np.array_equal(WithMaskNoise(objective.objective, 2, 0.5, 100).corrupt(rows(3)).mask_noise_keys, 0)
    other_seed = WithMaskNoise(objective.objective, 2, 0.5, 100).corrupt(rows(140)).mask_noise_keys
    assert not set(other_seed.tolist()) & set(whole.mask_noise_keys.tolist())


def test_the_rest_of_the_batch_and_of_the_objective_is_as_without() -> None:
    objective = noisy("soft_ce", confidence_weight=0.5)
    plain: Objective = objective.objective
    assert (objective.name, objective.is_bound, objective.not_a_bound()) == ("soft_ce", False, plain.not_a_bound())
    assert objective.head_settings() == plain.head_settings() != {}
    with_noise, without = objective.corrupt(rows(20)), plain.corrupt(rows(20))
    for name in ("inputs", "targets", "weights", "times", "lengths", "positions"):
        assert np.array_equal(getattr(with_noise, name), getattr(without, name))
    assert noisy("mdlm").is_bound


def test_each_draw_of_a_row_has_noise_of_its_own() -> None:
    keys = noisy(draws_per_row=2).corrupt(rows(20)).mask_noise_keys
    assert len(set(keys.tolist())) == 40
    cut = noisy(draws_per_row=2).corrupt(rows(5, 15)).mask_noise_keys
    assert np.array_equal(cut, keys[30:])


def test_the_noise_has_its_deviation_at_masks_and_nowhere_else() -> None:
    embedded = torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(2, (3, 64), generator=torch.Generator().manual_seed(1))
    is_mask = ids == 1
    keys = torch.tensor([2**61 + 12345, -(2**60) - 999, 77])
    scales = torch.tensor([0.5, 0.02, 0.0])
    changed = add_mask_noise(embedded, ids, 1, keys, scales) - embedded
    assert not changed[~is_mask].any()
    assert not changed[2].any()
    for row in (0, 1):
        drawn = changed[row][is_mask[row]] / scales[row]
        assert abs(drawn.std() - 1) < 4 / math.sqrt(2 * drawn.numel())
        assert abs(drawn.mean()) < 4 / math.sqrt(drawn.numel())
    assert abs((changed[0] * changed[1])[is_mask[0] & is_mask[1]].mean()) < 4 * 0.5 * 0.02 / math.sqrt(16 * 128)
    assert add_mask_noise(embedded, ids, 1, None, None) is embedded


def _model(backbone: str, **changes: Any) -> Any:
    sizes = {"vocab_size": 31, "num_hidden_layers": 2, "mask_token_id": MASK, **SIZES[backbone], **changes}
    model = models.build(backbone, seed=2, **sizes)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data.add_(drawn, alpha=0.2)
    return model


def _loss(model: Any, batch: Any, **changes: Tensor) -> Tensor:
    with torch.no_grad():
        loss: Tensor = model(**model_inputs(batch, torch.device("cpu")) | changes, per_row=True)[1]
    return loss


@pytest.mark.parametrize("name", ["mdlm", "block", "card"])
@pytest.mark.parametrize("backbone", ["qwen3", "rwkv7"])
def test_models_embed_masks_with_noise(backbone: str, name: str) -> None:
    """What a model reads with noise is what it reads from an embedding of the same values."""
    model = _model(backbone, direction="causal" if name == "card" else "bidirectional")
    settings = {"block_lengths": ((0, 4),)} if name == "block" else {}
    batch = noisy(name, **settings).corrupt(rows(4))
    without = noisy(name, **settings).objective.corrupt(rows(4))
    plain, with_noise = _loss(model, without), _loss(model, batch)
    assert (plain != with_noise).any()
    zero = torch.zeros(4)
    assert torch.equal(_loss(model, batch, mask_noise_scales=zero), plain), "nothing is left of a scale of 0"
    # In a batch of any cut.
    parts = [noisy(name, **settings).corrupt(rows(2, first)) for first in (0, 2)]
    torch.testing.assert_close(torch.cat([_loss(model, part) for part in parts]), with_noise, rtol=1e-4, atol=1e-5)
    # The same by hand: an embedding whose outputs at masks are replaced.
    embedding = model.get_input_embeddings()
    tensors = model_inputs(batch, torch.device("cpu"))

    def replaced(module: Any, arguments: Any, output: Tensor) -> Tensor | None:
        (ids,) = arguments
        if not torch.equal(ids, tensors["input_ids"]):
            return None
        noise = add_mask_noise(output, ids, MASK, tensors["mask_noise_keys"], tensors["mask_noise_scales"])
        assert (noise != output).any(-1).equal(ids == MASK)
        return noise

    handle = embedding.register_forward_hook(replaced)
    assert torch.equal(_loss(model, without), with_noise)
    handle.remove()


def test_gradients_reach_the_embedding_of_the_mask() -> None:
    model = _model("rwkv7")
    batch = noisy().corrupt(rows(4))
    model(**model_inputs(batch, torch.device("cpu"))).backward()
    assert model.emb.weight.grad[MASK].abs().max() > 0
