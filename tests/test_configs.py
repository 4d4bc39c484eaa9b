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
# hidden size, layers, query heads, key and value heads, width of the MLP, tied (Qwen3 technical report, arXiv
# 2505.09388); 128 channels per head and 151,936 embedding rows in all of them.
QWEN3 = {
    "qwen3-0.6b": (1024, 28, 16, 8, 3072, True),
    "qwen3-1.7b": (2048, 28, 16, 8, 6144, True),
    "qwen3-4b": (2560, 36, 32, 8, 9728, True),
    "qwen3-8b": (4096, 36, 32, 8, 12288, False),
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


@pytest.mark.parametrize("name", QWEN3)
def test_qwen3_has_its_published_dimensions(name: str) -> None:
    width, layers, heads, key_heads, mlp, tied = QWEN3[name]
    config = load_config(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        model = models.skeleton(models.configuration("qwen3", **config.model.sizes(), mask_token_id=151_669))
    norms = 2 * width + 2 * 128
    layer = 2 * width * (heads + key_heads) * 128 + 3 * width * mlp + norms
    expected = layers * layer + width + 151_936 * width * (1 if tied else 2)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    if name == "qwen3-0.6b":
        assert expected == 596_049_920
    built = model.config
    assert (built.rms_norm_eps, built.rope_parameters["rope_theta"], built.head_dim) == (1e-6, 1e6, 128)
    assert (built.num_attention_heads, built.num_key_value_heads, built.vocab_size) == (heads, key_heads, 151_936)
    assert (config.objective.name, model.direction) == ("mdlm", "bidirectional")
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert f"dlm convert --from qwen3 Qwen3-{name[6:].upper()} models/{name}" in text
    assert f"model.init_from=models/{name}" in text


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
