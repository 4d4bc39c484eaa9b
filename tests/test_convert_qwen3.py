"""`dlm convert --from|--to qwen3` and `--compare` as a person uses them: the mask id, the tokenizer, the table."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from data_pipeline import tokenizers
from data_pipeline.build import BuildOptions, build_dataset
from data_pipeline.reserved_ids import ids_in_use, refuse_in_data
from data_pipeline.shards import ShardedSource
from data_pipeline.tokenizer_backends.byte_alphabet import BYTE_OF_CHARACTER
from dlm_dist import models
from tests.commands import dlm, mistake

# Bytes 0..255, "th" 256, two special tokens of tokenizer.json, and a third that only tokenizer_config.json lists.
V, LISTED, ELSEWHERE, FREE = 320, (257, 258), 260, 259


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 folder without tokenizer files."""
    folder = tmp_path_factory.mktemp("weights")
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 258, "bos_token_id": 257}
    with torch.random.fork_rng():
        Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).save_pretrained(folder)
    return folder


@pytest.fixture
def source(weights: Path, tmp_path: Path) -> Path:
    """The same with a tokenizer, in the files of the published models."""
    folder = shutil.copytree(weights, tmp_path / "theirs")
    vocabulary = {character: i for i, character in enumerate([*sorted(BYTE_OF_CHARACTER), "th"])}
    tokenizer = hf.Tokenizer(hf.models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"added_tokens_decoder": {str(ELSEWHERE): {"content": "<think>"}}, "chat_template": "{{ x }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"eos_token_id": 258}')
    return folder


def test_the_mask_takes_a_free_id_and_the_tokenizer_travels(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dlm("convert", "--from", "qwen3", source, tmp_path / "ours") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{tmp_path / 'ours'}: 2 layers, width 16, 2 heads of 8, 1 of keys, vocabulary 320, emb")
    assert line.endswith(f"float32; mask id {FREE}")
    assert models.load(tmp_path / "ours").config.mask_token_id == FREE
    saved = tokenizers.load(tmp_path / "ours" / "tokenizer")
    assert saved.fingerprint == tokenizers.load(source).fingerprint
    assert saved.mask_id == FREE

    assert dlm("convert", "--to", "qwen3", tmp_path / "ours", tmp_path / "back") == 0
    assert sorted(file.name for file in source.iterdir()) == sorted(file.name for file in (tmp_path / "back").iterdir())
    for file in source.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes(), file.name
    assert dlm("convert", "--compare", source, tmp_path / "back", "--values") == 0
    half = load_file(source / "model.safetensors")
    assert dlm("convert", "--from", "qwen3", source, tmp_path / "half", "--dtype", "bf16") == 0
    for name, tensor in load_file(tmp_path / "half" / "model.safetensors").items():
        assert torch.equal(tensor, half[name].bfloat16()), name


def test_a_tied_head_that_is_stored_counts_once(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    assert dlm("convert", "--from", "qwen3", source, tmp_path / "ours") == 0
    total = sum(parameter.numel() for parameter in models.load(tmp_path / "ours").parameters())
    assert f"embeddings tied, causal; {total / 1000:.4g} k parameters" in capsys.readouterr().out


def test_a_chosen_mask_id_goes_into_model_tokenizer_and_data(source: Path, tmp_path: Path) -> None:
    assert dlm("convert", "--from", "qwen3", source, tmp_path / "ours", "--mask-token-id", 300) == 0
    tokenizer = tokenizers.load(tmp_path / "ours" / "tokenizer")
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (300, 301)
    assert models.load(tmp_path / "ours").config.mask_token_id == 300
    assert tokenizer.fingerprint != tokenizers.load(source).fingerprint
    (tmp_path / "text.txt").write_text("the other thing " * 20)
    inputs, output, saved = (str(tmp_path / name) for name in ("text.txt", "data", "ours/tokenizer"))
    build_dataset(BuildOptions((inputs,), output, tokenizer=saved, sequence_length=16))
    assert ShardedSource.open(tmp_path / "data" / "train").mask_id == 300
    assert ShardedSource.open(tmp_path / "data" / "train").load_tokenizer().mask_id == 300


@pytest.mark.parametrize(
    ("mask_id", "message"),
    [
        (256, "256 is taken by 'th' of tokenizer.json"),
        (257, "257 is taken by '<|endoftext|>' of tokenizer.json"),
        (ELSEWHERE, "260 is taken by '<think>' of tokenizer_config.json"),
        (V, "320 lies outside the vocabulary of 320 ids"),
        (-1, "-1 lies outside the vocabulary"),
    ],
)
def test_an_id_that_is_not_free_is_refused(
    mask_id: int, message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert = ("convert", "--from", "qwen3", source, tmp_path / "ours", f"--mask-token-id={mask_id}")
    assert message in mistake(capsys, *convert)
    assert not (tmp_path / "ours").exists()


def test_the_first_free_id_behind_all_that_any_file_uses(source: Path, tmp_path: Path) -> None:
    settings = {"added_tokens_decoder": {str(i): {"content": f"<{i}>"} for i in range(259, 290)}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "added_tokens.json").write_text('{"<290>": 290}')
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"pad_token_id": 291}))
    assert dlm("convert", "--from", "qwen3", source, tmp_path / "ours") == 0
    assert models.load(tmp_path / "ours").config.mask_token_id == 292
    assert tokenizers.load(tmp_path / "ours" / "tokenizer").mask_id == 292


def test_no_id_is_free_or_nobody_knows_which(
    source: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert = ("convert", "--from", "qwen3")
    (source / "added_tokens.json").write_text(json.dumps({f"<{i}>": i for i in range(259, V)}))
    assert "leaves no id free" in mistake(capsys, *convert, source, tmp_path / "ours")
    (source / "added_tokens.json").write_text('["<x>"]')
    assert "does not look like a tokenizer's added_tokens.json" in mistake(capsys, *convert, source, tmp_path / "ours")
    assert dlm(*convert, weights, tmp_path / "ours") == 2
    assert "is not Qwen's: say with --mask-token-id" in capsys.readouterr().err
    assert dlm(*convert, weights, tmp_path / "ours", "--mask-token-id", 319) == 0
    assert "has no tokenizer files" in capsys.readouterr().out
    assert not (tmp_path / "ours" / "tokenizer").exists()
    assert dlm(*convert, weights, tmp_path / "ours2", "--mask-token-id", 258) == 2
    assert "258 is taken by eos_token_id of config.json" in capsys.readouterr().err


def test_data_that_holds_the_mask_id_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some bytes of text " * 40)
    inputs, output = (str(tmp_path / "text.txt"),), str(tmp_path / "data")
    build_dataset(BuildOptions(inputs, output, tokenizer="bytes", sequence_length=16))
    convert = ("convert", "--from", "qwen3", source, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"token 6 of row 0 is the id 121, which is not free"):
        refuse_in_data(tmp_path / "data", ord("y"))
    assert dlm("data", "export", tmp_path / "data", "--to", "megatron", "--output", tmp_path / "tokens") == 0
    files = sorted(tmp_path.rglob("*.bin"))
    with pytest.raises(ValueError, match=r"\.bin: token 6 is the id 121, which is not free"):
        refuse_in_data(files[0], ord("y"))
    planted = np.fromfile(files[0], dtype="<u2")
    planted[5] = FREE
    planted.tofile(files[0])
    text = mistake(capsys, *convert, "--check-data", tmp_path / "data", "--check-data", files[0])
    assert f"{files[0]}: token 5 is the id {FREE}, which is not free" in text
    assert not (tmp_path / "ours").exists()
    assert dlm(*convert, "--check-data", tmp_path / "data") == 0


def test_qwens_own_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its real vocabulary, with the special tokens where Qwen3 lists them."""
    files = Path(os.environ.get("DLM_DIST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "tok_qwen"
    if not files.is_dir():
        pytest.skip(f"real data is missing: {files} (set DLM_DIST_DATA)")
    sizes = {"vocab_size": 151936, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": True}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, bos_token_id=151643, eos_token_id=151645)).save_pretrained(
        tmp_path / "bare"
    )
    theirs = shutil.copytree(tmp_path / "bare", tmp_path / "theirs")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(files / name, theirs / name)
    settings = {"added_tokens_decoder": {str(i): {"content": f"<{i}>"} for i in range(151643, 151669)}}
    (theirs / "tokenizer_config.json").write_text(json.dumps(settings))
    convert = ("convert", "--from", "qwen3", theirs)
    assert dlm(*convert, tmp_path / "ours") == 0
    assert models.load(tmp_path / "ours").config.mask_token_id == 151_669
    saved = tokenizers.load(tmp_path / "ours" / "tokenizer")
    assert (saved.mask_id, saved.vocab_size, saved.name) == (151_669, 151_936, "qwen")
    assert saved.fingerprint == tokenizers.load(files).fingerprint
    assert dlm(*convert, tmp_path / "other", "--mask-token-id", 151_935) == 0
    assert tokenizers.load(tmp_path / "other" / "tokenizer").mask_id == 151_935
    assert "151668 is taken by '<151668>' of tokenizer_config.json" in mistake(
        capsys, *convert, tmp_path / "x", "--mask-token-id", 151_668
    )
    assert dlm("convert", "--from", "qwen3", tmp_path / "bare", tmp_path / "bare-ours") == 0
    assert models.load(tmp_path / "bare-ours").config.mask_token_id == 151_669


def test_ids_in_use_of_qwens_files(tmp_path: Path) -> None:
    """The published layout in small: entries, added tokens of each file, a unigram model's list."""
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    definition = {"model": {"vocab": [["x", -1.0], ["y", -2.0], ["z", -3.0]]}, "added_tokens": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"9": {"content": "<t>"}}}')
    used = ids_in_use(tmp_path)
    assert set(used) == {0, 1, 2, 9}
    assert (used[2], used[9]) == ("'z' of tokenizer.json", "'<t>' of tokenizer_config.json")
    assert ids_in_use(tmp_path / "nothing") == {}


def test_compare_prints_both_sides(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dlm("convert", "--from", "qwen3", source, tmp_path / "ours") == 0
    capsys.readouterr()
    assert dlm("convert", "--compare", source, tmp_path / "ours") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "a:", str(source), "b:", str(tmp_path / "ours")]
    row = next(line for line in lines if line.startswith("model.layers.1.self_attn.k_proj.weight"))
    assert row.split()[-1] == "equal"
    assert row.count("[8, 16] float32") == 2
    assert lines[-1] == "25 tensors: 25 equal (names, shapes and dtypes)"

    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 0.5
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "other.safetensors")
    assert dlm("convert", "--compare", source, tmp_path / "other.safetensors", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["equal"], found["counts"]) == (False, {"equal": 24, "only a": 1})
    assert dlm("convert", "--compare", source, tmp_path / "other.safetensors", "--values") == 1
    assert "values (largest difference 0.5)" in capsys.readouterr().out
    assert dlm("convert", "--compare", source, tmp_path / "other.safetensors", "--values", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"equal": 23, "values": 1, "only a": 1}
    by_name = {one["name"]: one for one in found["tensors"]}
    assert by_name["lm_head.weight"]["largest"] == pytest.approx(0.5, abs=1e-6)
    assert by_name["model.norm.weight"] == {
        "name": "model.norm.weight",
        "a": {"shape": [16], "dtype": "float32"},
        "b": None,
        "status": "only a",
        "largest": None,
    }


def test_options_that_do_not_belong_together(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = (source, tmp_path / "x")
    assert "--values goes with --compare" in mistake(capsys, "convert", "--from", "qwen3", *both, "--values")
    assert "--json goes with --compare" in mistake(capsys, "convert", "--to", "qwen3", *both, "--json")
    assert "--dtype is for what is written" in mistake(capsys, "convert", "--compare", *both, "--dtype", "bf16")
    assert "--check-data goes with --from" in mistake(capsys, "convert", "--to", "qwen3", *both, "--check-data", source)
    assert "--mask-token-id goes with" in mistake(capsys, "convert", "--compare", *both, "--mask-token-id", 1)
    assert "no such file or folder" in mistake(capsys, "convert", "--compare", *both)
    assert "exists already" in mistake(capsys, "convert", "--from", "qwen3", source, source)
    assert "'qwen3', which is none of ours" in mistake(capsys, "convert", "--to", "qwen3", *both)
