"""Every configuration that is shipped: it loads, and its model has the size that it is named after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dlm_dist import models
from dlm_dist.config import RunConfig, load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Parameters of the published models (RWKV-7 paper, arXiv 2503.14456, without the v0, v1, v2 that layer 0 does not use);
# of the larger ones only what their names say.
PUBLISHED = {
    "rwkv7-191m-minipile": 191_034_624,
    "rwkv7-0.1b": 191_034_624,
    "rwkv7-0.4b": 450_767_872,
    "rwkv7-1.5b": 1_527_404_544,
    "rwkv7-2.9b": 2_947_735_040,
    "rwkv7-7.2b": 7.2e9,
    "rwkv7-13.3b": 13.3e9,
}


def causal_size(config: RunConfig) -> int:
    """Parameters of the model with one scan a layer."""
    sizes = config.model.sizes() | {"direction": "causal", "mask_token_id": 65535}
    with torch.device("meta"):
        model = models.skeleton(models.configuration(config.model.backbone, **sizes))
    unused = {f"blocks.0.att.v{i}" for i in range(3)}
    return sum(p.numel() for name, p in model.named_parameters() if name not in unused)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_configuration_loads(path: Path) -> None:
    assert load_config(path).run.dir.parts[0] == "runs"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_has_its_parameters(name: str) -> None:
    size = causal_size(load_config(CONFIGS / f"{name}.yaml"))
    assert size == pytest.approx(PUBLISHED[name], rel=1e-9 if isinstance(PUBLISHED[name], int) else 0.01)


def test_the_minipile_recipe_is_his() -> None:
    causal = load_config(CONFIGS / "rwkv7-191m-minipile.yaml")
    assert (causal.optimizer.betas, causal.optimizer.eps) == ((0.9, 0.99), 1e-18)
    assert (causal.objective.name, causal.data.order) == ("ar", "cubic_prime")
    assert causal.train.max_steps == -(-1_498_226_207 // (16 * 512))
    diffusion = load_config(CONFIGS / "rwkv7-191m-minipile-diffusion.yaml")
    assert diffusion.objective.name == "mdlm"
    for section, names in {
        "data": ("train", "order", "sequence_length", "tokenizer"),
        "model": ("vocab_size", "hidden_size", "num_hidden_layers", "head_size"),
        "train": ("max_steps", "global_batch_size", "precision"),
    }.items():
        for name in names:
            assert getattr(getattr(causal, section), name) == getattr(getattr(diffusion, section), name)
    assert causal.optimizer == diffusion.optimizer
