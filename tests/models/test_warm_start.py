"""Starting from other weights: what fits, what the given weights decide, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dlm_dist import models
from dlm_dist.config import ConfigError, RunConfig, load_config
from dlm_dist.models.warm_start import NEARLY_FORWARD, initialize_from
from dlm_dist.training.starting_model import initial_model, mask_notes, resolve_sizes

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "mask_token_id": 63}


class Rows:
    """What resolve_sizes asks of a data set."""

    sequence_length = 16


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    """Causal weights with heads and ranks that no default would give."""
    ranks = {"decay_low_rank_dim": 8, "a_low_rank_dim": 4, "v_low_rank_dim": 12, "gate_low_rank_dim": 20}
    model = models.build("rwkv7", seed=1, head_size=16, **SIZES, **ranks)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model.save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


def resolved(source: Path, *overrides: str, checkpoint: Path | None = None) -> RunConfig:
    config = load_config(
        None,
        [
            "run.dir=unused",
            "model.backbone=rwkv7",
            "model.hidden_size=32",
            "model.num_hidden_layers=2",
            "model.vocab_size=64",
            f"model.init_from={source}",
            "data.train.0.path=unused",
            "train.max_steps=3",
            "train.global_batch_size=2",
            "train.micro_batch_size=1",
            *overrides,
        ],
    )
    return resolve_sizes(config, Rows(), checkpoint)  # type: ignore[arg-type]


def test_the_given_weights_decide_heads_and_ranks(causal: Path) -> None:
    config = resolved(causal, "model.direction=causal")
    assert (config.model.head_size, config.model.decay_low_rank_dim, config.model.gate_low_rank_dim) == (16, 8, 20)
    model, report = initial_model(config, mask_token_id=63)
    assert report is not None
    assert not report["skipped"]
    ids = torch.randint(0, 63, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, models.load(causal)(ids).logits)
    assert resolved(causal, "model.direction=causal", "model.low_rank_rule=current").model.decay_low_rank_dim is None
    assert resolved(causal, "model.direction=causal", "model.v_low_rank_dim=6").model.v_low_rank_dim == 6


def test_another_head_size_is_refused(causal: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.head_size is 32, but the given weights have heads of 16"):
        resolved(causal, "model.head_size=32")


def test_a_resumed_run_takes_them_from_its_checkpoint(causal: Path, tmp_path: Path) -> None:
    """The weights that it once started from may be gone."""
    first = resolved(causal)
    again = resolved(tmp_path / "gone", f"model.init_from={causal}", checkpoint=causal)
    assert first.model.model_dump(exclude={"init_from"}) == again.model.model_dump(exclude={"init_from"})
    away = resolved(tmp_path / "gone", checkpoint=causal)
    assert away.model.head_size == 16


@pytest.mark.parametrize("tied", [True, False])
def test_a_bidirectional_model_starts_nearly_as_the_causal_one(causal: Path, tied: bool) -> None:
    config = resolved(causal, f"model.tie_directions={str(tied).lower()}")
    assert config.model.direction_gate_init == NEARLY_FORWARD
    model, report = initial_model(config, mask_token_id=63)
    assert report is not None
    assert all("direction_gate" in name for name in report["skipped"])
    if not tied:
        forward, backward = model.blocks[1].att, model.blocks[1].att.backward_mix
        assert torch.equal(forward.key.weight, backward.key.weight)
        assert torch.equal(forward.w0, backward.w0)
    ids = torch.randint(0, 63, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = models.load(causal)(ids).logits
        near = (model(ids).logits - want).norm() / want.norm()
        fresh = models.build("rwkv7", direction="bidirectional", head_size=16, **SIZES)
        initialize_from(fresh, str(causal))
        far = (fresh(ids).logits - want).norm() / want.norm()
    assert near < 0.1 < far
    assert resolved(causal, "model.direction_gate_init=1").model.direction_gate_init == 1.0


def qwen3(folder: Path, **sizes: Any) -> Path:
    """Qwen3 weights with sizes and fields that no default would give."""
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 40}
    rope = {"rope_type": "default", "rope_theta": 5e6}
    model = models.build("qwen3", **(SIZES | fields | {"rope_parameters": rope, "rms_norm_eps": 1e-5} | sizes))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_what_no_shape_shows_comes_with_the_weights_of_qwen3(tied: bool, tmp_path: Path) -> None:
    source = qwen3(tmp_path / "given", direction="causal", tie_word_embeddings=tied)
    keys = ("model.backbone=qwen3", "model.num_attention_heads=4")
    config = resolved(source, *keys, "model.direction=causal")
    assert (config.model.rope_theta, config.model.rms_norm_eps) == (5e6, 1e-5)
    model, report = initial_model(config, mask_token_id=63)
    assert report is not None
    assert not report["skipped"]
    ids = torch.randint(0, 63, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, models.load(source)(ids).logits)
    named = resolved(source, *keys, "model.rope_theta=1e4", "model.num_key_value_heads=4")
    assert (named.model.rope_theta, named.model.num_key_value_heads) == (1e4, 4)
    assert named.model.sizes()["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(ConfigError, match=r"model.head_dim is 8, but the given weights have heads of 4"):
        resolved(source, *keys, "model.head_dim=8")


def test_layer_patterns_come_with_weights_of_the_same_direction(tmp_path: Path) -> None:
    source = qwen3(tmp_path / "given", direction="causal", layer_patterns=["window:3", "causal"])
    keys = ("model.backbone=qwen3", "model.num_attention_heads=4")
    assert resolved(source, *keys, "model.direction=causal").model.layer_patterns == ("window:3", "causal")
    assert resolved(source, *keys, "model.direction=bidirectional").model.layer_patterns is None
    named = resolved(source, *keys, "model.direction=causal", "model.layer_patterns=[causal]")
    assert initial_model(named, mask_token_id=63)[0].config.layer_patterns == ["causal"]


def test_weights_of_another_backbone_decide_nothing(causal: Path, tmp_path: Path) -> None:
    assert resolved(causal, "model.backbone=qwen3", "model.num_attention_heads=4").model.head_dim is None
    assert resolved(qwen3(tmp_path / "given"), "model.head_size=8").model.head_size == 8


def test_another_mask_id_than_the_datas_is_told(causal: Path) -> None:
    class Data(Rows):
        mask_id = 62

    (note,) = mask_notes(resolved(causal), Data())  # type: ignore[arg-type]
    assert "has mask id 63, the data 62" in note
    Data.mask_id = 63
    assert mask_notes(resolved(causal), Data()) == []  # type: ignore[arg-type]
