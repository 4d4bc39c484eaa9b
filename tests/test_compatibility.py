"""Every cell of the table objective x backbone x direction: it trains, or is refused with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dlm_dist import models
from dlm_dist.compatibility import DIRECTIONS, OBJECTIVES, refusal, table
from dlm_dist.config import ConfigError, load_config
from dlm_dist.diffusion import objectives
from dlm_dist.diffusion.model_inputs import model_inputs
from launcher.cli import main
from tests.diffusion.test_block_diffusion import rows

CELLS = [(o, b, d) for o in OBJECTIVES for b, directions in DIRECTIONS.items() for d in directions]
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16},
    "rwkv7": {"hidden_size": 32, "head_size": 16},
}


def configured(objective: str, backbone: str, direction: str) -> None:
    load_config(
        None,
        [
            "run.dir=unused",
            f"model.backbone={backbone}",
            f"model.direction={direction}",
            "model.hidden_size=32",
            "model.num_hidden_layers=2",
            *(["model.num_attention_heads=2"] if backbone == "qwen3" else ["model.head_size=16"]),
            f"objective.name={objective}",
            "data.train.0.path=unused",
            "train.max_steps=3",
            "train.global_batch_size=2",
            "train.micro_batch_size=1",
        ],
    )


@pytest.mark.parametrize(("objective", "backbone", "direction"), CELLS)
def test_a_cell_trains_or_says_why_not(objective: str, backbone: str, direction: str) -> None:
    reason = refusal(objective, backbone, direction)
    if reason is not None:
        with pytest.raises(ConfigError, match=r"model\.direction is .*: expected") as refused:
            configured(objective, backbone, direction)
        assert reason in str(refused.value)
        return
    configured(objective, backbone, direction)
    sizes = {"vocab_size": 31, "num_hidden_layers": 2, "mask_token_id": 30, "direction": direction, **SIZES[backbone]}
    model = models.build(backbone, **sizes)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data.add_(noise, alpha=0.1)
    extra = {"block_lengths": ((0, 4),)} if objective == "block" else {}
    vocabulary = objectives.Vocabulary(mask_id=30, eos_id=0, size=30)
    made = objectives.OBJECTIVES[objective](
        seed=1, vocabulary=vocabulary, isolate_documents=True, random_length_prob=0.5, **extra
    )
    batch = made.corrupt(rows(4, 12))
    loss = model(**model_inputs(batch, torch.device("cpu")), **made.head_settings())
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert np.isfinite(batch.weights).all()


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives"]) == 0
    assert capsys.readouterr().out.strip() == table().strip()
    assert set(OBJECTIVES) == set(objectives.OBJECTIVES)
