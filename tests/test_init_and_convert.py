"""`dlm init` and `dlm convert` as a person uses them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.build import BuildOptions, build_dataset
from data_pipeline.shards import ShardedSource
from data_pipeline.tokenizers import Tokenizer
from dlm_dist import models
from tests.commands import dlm, mistake

CONFIG = """
run: {dir: unused, seed: 3}
model: {backbone: rwkv7, hidden_size: 64, num_hidden_layers: 2, direction: causal}
data: {train: [{path: DATA}]}
train: {max_steps: 1, global_batch_size: 1, micro_batch_size: 1}
optimizer: {lr: 1e-3}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run configuration over a data set of bytes, 258 ids in a vocabulary of 320."""
    folder = tmp_path_factory.mktemp("init")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"line {i} of text"}) + "\n" for i in range(20)))
    inputs, output = (str(folder / "text.jsonl"),), str(folder / "data")
    build_dataset(BuildOptions(inputs, output, tokenizer="bytes", sequence_length=16))
    (folder / "run.yaml").write_text(CONFIG.replace("DATA", str(folder / "data" / "train")))
    return folder / "run.yaml"


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_init_writes_the_model_of_step_0(
    direction: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    override = f"model.direction={direction}"
    assert dlm("init", config, tmp_path / "start", override) == 0
    line = capsys.readouterr().out
    source = ShardedSource.open(config.parent / "data" / "train")
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "direction": direction}
    model = models.build("rwkv7", seed=3, mask_token_id=source.mask_id, tie_directions=False, **sizes)
    saved = load_file(tmp_path / "start" / "model.safetensors")
    assert set(saved) == set(model.state_dict())
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    opened = models.load(tmp_path / "start")
    assert (opened.config.vocab_size, opened.config.mask_token_id) == (model.config.vocab_size, source.mask_id)
    assert Tokenizer.load(tmp_path / "start" / "tokenizer").fingerprint == source.load_tokenizer().fingerprint
    total = sum(p.numel() for p in model.parameters())
    assert line.startswith(f"{tmp_path / 'start'}: {total / 1000:.4g} k parameters, {total * 4 / 1e6:.1f} MB fp32 (")
    assert all(role in line for role in ("matrix", "embedding", "head", "lora", "vector", "decay_base"))
    assert line.count("\n") == 1


def test_init_writes_blinkdls_layout(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dlm("init", config, tmp_path / "folder") == 0
    assert dlm("init", config, tmp_path / "init.pth") == 0
    assert dlm("init", config, tmp_path / "half.pth", "--dtype", "bf16") == 0
    folder = load_file(tmp_path / "folder" / "model.safetensors")
    file = torch.load(tmp_path / "init.pth", weights_only=True)
    half = torch.load(tmp_path / "half.pth", weights_only=True)
    assert set(file) == set(half) == set(folder)
    assert all(torch.equal(tensor, folder[name]) for name, tensor in file.items())
    assert all(torch.equal(tensor, folder[name].bfloat16()) for name, tensor in half.items())
    text = mistake(capsys, "init", config, tmp_path / "both.pth", "model.direction=bidirectional")
    assert "holds a causal RWKV-7" in text
    assert "exists already" in mistake(capsys, "init", config, tmp_path / "init.pth")
    assert "exists already" in mistake(capsys, "init", config, tmp_path / "folder")
    assert "model.hiden_size" in mistake(capsys, "init", config, tmp_path / "new", "model.hiden_size=64")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "half.pth", "init.pth"]


def test_convert_there_and_back_through_both_layouts(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dlm("init", config, tmp_path / "a.pth") == 0
    assert dlm("convert", "--from", "blinkdl", tmp_path / "a.pth", tmp_path / "ours", "--mask-token-id", "257") == 0
    assert dlm("convert", "--to", "fla", tmp_path / "ours", tmp_path / "fla") == 0
    assert dlm("convert", "--from", "fla", tmp_path / "fla", tmp_path / "back", "--mask-token-id", 9) == 0
    assert dlm("convert", "--to", "blinkdl", tmp_path / "back", tmp_path / "b.pth") == 0
    assert dlm("convert", "--to", "blinkdl", tmp_path / "back", tmp_path / "half.pth", "--dtype", "bf16") == 0
    first, last, half = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("a", "b", "half"))
    assert set(first) == set(last) == set(half)
    for name, tensor in first.items():
        assert tensor.dtype == last[name].dtype == torch.float32
        assert torch.equal(tensor, last[name]), name
        assert torch.equal(tensor.bfloat16(), half[name]), name
    assert models.load(tmp_path / "ours").config.mask_token_id == 257
    lines = capsys.readouterr().out.splitlines()
    line = r"ours: 2 layers, width 64, heads of 64, vocabulary 320, low-rank .* g 32; .* float32; mask id 257$"
    assert re.search(line, lines[1])

    (tmp_path / "step-1").mkdir()
    models.load(tmp_path / "ours").save_pretrained(tmp_path / "step-1" / "model")
    assert dlm("convert", "--to", "blinkdl", tmp_path / "step-1", tmp_path / "step.pth") == 0
    again = torch.load(tmp_path / "step.pth", weights_only=True)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_a_damaged_checkpoint_is_not_exported(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = tmp_path / "step-1"
    assert dlm("init", config, step / "model") == 0
    files = {}
    (step / "trainer_state.json").write_text("{}")
    for file in [path for path in step.rglob("*") if path.is_file()]:
        content = file.read_bytes()
        files[file.relative_to(step).as_posix()] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (step / "manifest.json").write_text(json.dumps({"format_version": 1, "files": files}))
    assert dlm("convert", "--to", "blinkdl", step, tmp_path / "whole.pth") == 0
    weights = bytearray((step / "model" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (step / "model" / "model.safetensors").write_bytes(weights)
    text = mistake(capsys, "convert", "--to", "blinkdl", step, tmp_path / "damaged.pth")
    assert f"{step} is damaged: {step / 'model' / 'model.safetensors'}" in text
    assert not (tmp_path / "damaged.pth").exists()


def test_the_mask_id_of_the_world_vocabulary_is_known_and_others_are_asked_for(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("model.hidden_size=8", "model.head_size=8", "model.num_hidden_layers=1")
    assert dlm("init", config, tmp_path / "world.pth", *small, "model.vocab_size=65536", "--dtype", "bf16") == 0
    assert dlm("convert", "--from", "blinkdl", tmp_path / "world.pth", tmp_path / "world") == 0
    assert models.load(tmp_path / "world").config.mask_token_id == 65535
    assert Tokenizer.load(tmp_path / "world" / "tokenizer").name == "rwkv-world"
    assert dlm("init", config, tmp_path / "bytes.pth", *small) == 0
    convert = ("convert", "--from", "blinkdl", tmp_path / "bytes.pth", tmp_path / "bytes")
    text = mistake(capsys, *convert)
    assert "a vocabulary of 320 ids, not the 65536 of RWKV World: say with --mask-token-id" in text
    assert "outside the vocabulary" in mistake(capsys, *convert, "--mask-token-id", 320)
    assert not (tmp_path / "bytes").exists()


def test_mistakes_of_convert_are_one_sentence(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dlm("init", config, tmp_path / "a.pth") == 0
    here = tmp_path / "a.pth"
    assert "exists already" in mistake(capsys, "convert", "--from", "blinkdl", tmp_path / "none.pth", here)
    assert "no such file" in mistake(capsys, "convert", "--from", "blinkdl", tmp_path / "none.pth", tmp_path / "x")
    assert "no config.json" in mistake(capsys, "convert", "--from", "fla", tmp_path, tmp_path / "x")
    assert "dlm convert --from blinkdl" in mistake(capsys, "convert", "--to", "fla", here, tmp_path / "x")
    arguments = ("convert", "--to", "fla", here, tmp_path / "x", "--mask-token-id", 1)
    assert "--mask-token-id goes with --from" in mistake(capsys, *arguments)
    assert dlm("convert", "--from", "blinkdl", here, tmp_path / "ours", "--mask-token-id", 1) == 0
    assert "does not end with .pth" in mistake(capsys, "convert", "--to", "blinkdl", tmp_path / "ours", tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "ours"]
