"""Qwen3 weights from and to transformers' layout: equal bits, equal logits, mistakes told by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from dlm_dist import models
from dlm_dist.models.conversion import read_folder, read_safetensors, write_folder
from dlm_dist.models.conversion_qwen3 import read_qwen3, write_qwen3
from dlm_dist.models.qwen3 import Qwen3ForDiffusion
from dlm_dist.models.rwkv7 import RWKV7Config

V = 97
# config.json of the published models, but for the sizes.
FIELDS: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 90,
    "eos_token_id": 91,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 40960,
    "max_window_layers": 3,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": V,
}


def theirs(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Path:
    """A random model in a folder as transformers writes it, with config.json as it is published."""
    fields = FIELDS | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = Qwen3ForCausalLM(Qwen3Config(**fields)).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def tokens(length: int = 21) -> Tensor:
    return torch.randint(0, V, (2, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("changes", "dtype", "shard"),
    [
        ({}, torch.float32, "5GB"),
        ({"tie_word_embeddings": True}, torch.float32, "5GB"),
        ({"num_key_value_heads": 1}, torch.float32, "20KB"),
        ({"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 5000.0}, torch.float32, "20KB"),
        ({}, torch.bfloat16, "20KB"),
    ],
)
def test_there_and_back_gives_the_same_bits_and_logits(
    changes: dict[str, Any], dtype: torch.dtype, shard: str, tmp_path: Path
) -> None:
    source = theirs(tmp_path / "theirs", dtype, shard, **changes)
    assert len(list(source.glob("*.safetensors"))) > (1 if shard == "20KB" else 0)
    write_folder(read_qwen3(source), tmp_path / "ours", mask_token_id=95)
    write_qwen3(read_folder(tmp_path / "ours"), tmp_path / "back")

    given, back = read_safetensors(source), read_safetensors(tmp_path / "back")
    assert set(given) == set(back)
    for name, tensor in given.items():
        assert tensor.dtype == back[name].dtype == dtype
        assert torch.equal(tensor, back[name]), name
    before, after = (Qwen3Config.from_pretrained(folder).to_dict() for folder in (source, tmp_path / "back"))
    assert before == after

    ours = models.load(tmp_path / "ours")
    assert isinstance(ours, Qwen3ForDiffusion)
    assert (ours.config.mask_token_id, ours.direction, ours.dtype) == (95, "causal", dtype)
    assert ours.config.use_cache is False
    ids = tokens()
    logits = ours(ids).logits
    for folder in (source, tmp_path / "back"):
        assert torch.equal(logits, Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype).eval()(ids).logits)
    ours.save_pretrained(tmp_path / "again")
    again = models.load(tmp_path / "again")
    assert torch.equal(logits, again(ids).logits)
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "ours" / "config.json").read_text()


def test_a_bidirectional_model_stays_one_in_transformers(tmp_path: Path) -> None:
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    model = models.build("qwen3", mask_token_id=95, direction="bidirectional", **sizes).eval()
    model.save_pretrained(tmp_path / "ours")
    write_qwen3(read_folder(tmp_path / "ours"), tmp_path / "theirs")
    peer = Qwen3ForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    ids = tokens()
    assert torch.equal(peer(ids).logits, model(ids).logits)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % V
    assert not torch.equal(peer(ids).logits[:, 0], peer(changed).logits[:, 0])
    assert read_qwen3(tmp_path / "theirs").config.direction == "bidirectional"


def test_layer_patterns_have_no_place_in_their_layout(tmp_path: Path) -> None:
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    models.build("qwen3", mask_token_id=95, layer_patterns=["window:4"], **sizes).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"layer_patterns \['window:4'\], and that layout has no place"):
        write_qwen3(read_folder(tmp_path / "ours"), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_a_tied_head_may_be_stored_but_has_to_be_the_embedding(tmp_path: Path) -> None:
    source = theirs(tmp_path / "theirs", tie_word_embeddings=True)
    file = source / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    write_folder(read_qwen3(source), tmp_path / "ours", 95)
    assert set(read_safetensors(tmp_path / "ours")) == {*tensors, "lm_head.weight"}
    ours = models.load(tmp_path / "ours")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert torch.equal(ours(tokens()).logits, Qwen3ForCausalLM.from_pretrained(source).eval()(tokens()).logits)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        read_qwen3(source)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "qwen3_moe", "model_type is 'qwen3_moe', expected 'qwen3': only dense"),
        ("model_type", "llama", "model_type is 'llama', expected 'qwen3'"),
        ("architectures", ["Qwen3ForSequenceClassification"], "architectures is .*, and only .'Qwen3ForCausalLM'."),
        ("use_sliding_window", True, "use_sliding_window is True"),
        ("layer_types", ["full_attention", "sliding_attention"] * 2, "layer_types holds .*'sliding_attention'"),
        ("attention_bias", True, "attention_bias is True, and only False"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_scaling is of type 'yarn'"),
        ("rope_scaling", {"type": "linear", "factor": 4.0}, "rope_scaling is of type 'linear'"),
        ("rope_parameters", {"rope_type": "llama3", "factor": 4.0}, "rope_parameters is of type 'llama3'"),
        ("rope_parameters", {"rope_theta": 1e6, "partial_rotary_factor": 0.5}, "rope_parameters has partial_rotary"),
        ("num_experts", 128, "num_experts is 128, and only 0"),
        ("hidden_act", "gelu", "hidden_act is 'gelu', and only 'silu'"),
        ("quantization_config", {"bits": 4}, "quantization_config is .*, and only none"),
        ("auto_map", {"AutoModel": "x.Y"}, "auto_map is .*, and only none"),
        ("num_key_value_heads", 3, "no multiple of"),
        ("hidden_size", None, "hidden_size is None, expected a whole number above 0"),
        ("num_hidden_layers", "3", "num_hidden_layers is '3', expected a whole number"),
        ("rms_norm_eps", "small", "rms_norm_eps"),
        ("num_hidden_layers", 2, r"model\.layers\.2\.\S+ \(shape \[\S+( \d+)?\]\) is none of this model's"),
        ("num_hidden_layers", 4, r"the tensor model\.layers\.3\.\S+ is missing; expected one of shape"),
        ("intermediate_size", 64, r"mlp\.gate_proj\.weight has shape \[48, 32\], expected \[64, 32\]"),
    ],
)
def test_a_field_that_our_model_cannot_represent_is_named(field: str, value: Any, message: str, tmp_path: Path) -> None:
    source = theirs(tmp_path / "theirs")
    (source / "config.json").write_text(json.dumps(FIELDS | {field: value}))
    with pytest.raises(ValueError, match=message) as caught:
        read_qwen3(source)
    assert str(source) in str(caught.value)


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    source = theirs(tmp_path / "theirs", shard="20KB")
    with pytest.raises(ValueError, match="exists already"):
        write_folder(read_qwen3(source), source, 95)
    next(source.glob("model-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        read_qwen3(source)
    for file in source.glob("model*"):
        file.unlink()
    with pytest.raises(ValueError, match="weights are missing"):
        read_qwen3(source)
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_qwen3(source)
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        read_qwen3(tmp_path)
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1, "mask_token_id": 1}
    models.build("rwkv7", **sizes).save_pretrained(tmp_path / "rwkv7")
    with pytest.raises(ValueError, match="type 'dlm_rwkv7', and the layout is one of Qwen3"):
        write_qwen3(read_folder(tmp_path / "rwkv7"), tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rwkv7", "theirs"]


@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_a_mask_that_stands_for_something_else_is_refused(field: str, tmp_path: Path) -> None:
    source = theirs(tmp_path / "theirs", **{field: 93})
    with pytest.raises(ValueError, match=f"mask_token_id 93 is also the {field}"):
        write_folder(read_qwen3(source), tmp_path / "ours", 93)
    assert not (tmp_path / "ours").exists()
    with pytest.raises(ValueError, match=f"mask_token_id 3 is also the {field}"):
        RWKV7Config(vocab_size=9, hidden_size=64, num_hidden_layers=1, mask_token_id=3, **{field: 3})
