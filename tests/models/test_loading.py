"""Building by name and loading from every kind of folder, with a sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, Qwen2Config, Qwen3Config

from dlm_dist.models import BACKBONES, build, load

SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_attention_heads": 2, "head_dim": 16, "intermediate_size": 48},
    "rwkv7": {},
}


def _build(backbone: str, **changes: Any) -> torch.nn.Module:
    shared = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "mask_token_id": 63}
    return build(backbone, **{**shared, **SIZES[backbone], **changes})


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_a_model_loads_from_a_checkpoint_its_model_folder_and_any_saved_folder(backbone: str, tmp_path: Path) -> None:
    model = _build(backbone).eval()
    step = tmp_path / "checkpoints" / "step-7"
    model.save_pretrained(step / "model")
    (step / "trainer_state.json").write_text("{}")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for path in (step, step / "model", str(step)):
            loaded = load(path)
            assert not loaded.training
            assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert load(step, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert type(AutoConfig.from_pretrained(step / "model")) is type(model.config)
    assert type(AutoModel.from_pretrained(step / "model")) is type(model)


def test_the_stored_dtype_is_kept(tmp_path: Path) -> None:
    _build("qwen3").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_no_such_folder_and_no_model_in_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        load(tmp_path / "step-3")
    with pytest.raises(ValueError, match=r"holds a config\.json"):
        load(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    _build("qwen3").config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="weights are missing"):
        load(tmp_path)


def test_a_foreign_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    Qwen3Config(vocab_size=8, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'qwen3', which is none of ours: convert it with `dlm convert --from qwen3"):
        load(tmp_path)
    Qwen2Config(vocab_size=8, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'qwen2', which is none of ours .*cannot be loaded"):
        load(tmp_path)


def test_an_unknown_model_type_and_a_broken_config_are_named(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    for text in ('{"model_type": "no_such_model"}', "{}", "[]", "{not json"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            load(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _build("qwen3").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys model\.norm\.weight"):
        load(tmp_path)
    save_file({**tensors, "model.norm.weight": norm, "more": norm.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unexpected_keys more"):
        load(tmp_path)
    save_file({**tensors, "model.norm.weight": norm[:5].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"mismatched_keys .*model\.norm\.weight"):
        load(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:40])
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path)


def test_a_checkpoint_of_several_files_loads(tmp_path: Path) -> None:
    model = _build("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(files.values())) > 1
    assert torch.equal(load(tmp_path).lm_head.weight, model.lm_head.weight)
    (tmp_path / next(iter(files.values()))).unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path)


def test_a_revision_makes_it_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _build("qwen3")
    model.save_pretrained(tmp_path)
    asked: list[tuple[str, str]] = []

    def fetch(hub_id: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, revision))
        if hub_id == "someone/else":
            raise LocalEntryNotFoundError("no connection")
        return str(tmp_path)

    monkeypatch.setattr("dlm_dist.models.snapshot_download", fetch)
    assert torch.equal(load("some/model", revision="v1").lm_head.weight, model.lm_head.weight)
    assert asked == [("some/model", "v1")]
    with pytest.raises(ValueError, match="'someone/else' at revision 'v1' cannot be fetched: no connection"):
        load("someone/else", revision="v1")
    with pytest.raises(ValueError, match="an id on the hub needs a revision"):
        load("some/model")


def test_build_names_mistakes() -> None:
    with pytest.raises(ValueError, match="Unknown backbone 'qwen'"):
        build("qwen")
    with pytest.raises(ValueError, match="no configuration field 'hiden_size': did you mean 'hidden_size'"):
        _build("qwen3", hiden_size=8)
    with pytest.raises(ValueError, match="needs a value for vocab_size, hidden_size"):
        build("qwen3", num_hidden_layers=2, mask_token_id=1, num_attention_heads=1)
    with pytest.raises(ValueError, match="needs a value for num_attention_heads"):
        _build("qwen3", num_attention_heads=None)
    with pytest.raises(ValueError, match="'vocab_size'"):
        _build("qwen3", vocab_size="64")


def test_importing_the_package_alone_stays_light() -> None:
    code = "import sys, dlm_dist; assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
