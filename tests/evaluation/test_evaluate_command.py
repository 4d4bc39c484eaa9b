"""`dlm evaluate`: the number of `evaluate_bound`, on any number of ranks, and only for data that fits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.shards import ShardedSource, write_source
from data_pipeline.tokenizer_backends.characters import CharacterTokenizer
from data_pipeline.tokenizers import Tokenizer, load
from dlm_dist import models
from dlm_dist.evaluation.bound import evaluate_bound, unigram_nats_per_token
from launcher import cli, evaluate_command
from tests import small_checkpoints
from tests.data_pipeline.test_token_files import write_megatron
from tests.distributed import runs

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = [f"<{i:02d}>{'abcdefgh'[i % 5 :]}"[:8].ljust(8, ".") for i in range(20)]


def write(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> Path:
    write_source(folder, np.stack([tokenizer.encode(text) for text in texts]), tokenizer)
    return folder


def publish(checkpoints: Path, tokenizer: Tokenizer, **changes: Any) -> Path:
    """A checkpoint of step 7; `objective` and `isolate_documents` are those of its run."""
    identity = {"data.isolate_documents": changes.pop("isolate_documents", False)}
    identity |= {"objective.name": changes.pop("objective", "mdlm")}
    return small_checkpoints.publish(checkpoints / "step-7", tokenizer, identity, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "train", load("bytes"), TEXTS)
    write(folder / "validation", load("bytes"), TEXTS[3:14])
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return publish(tmp_path_factory.mktemp("run") / "checkpoints", load("bytes"))


@pytest.fixture
def evaluate(capsys, monkeypatch):
    """evaluate(checkpoint, data, options) -> (status, standard output, standard error)."""
    monkeypatch.delenv("DLM_DEBUG", raising=False)
    monkeypatch.delenv("RANK", raising=False)

    def call(checkpoint: Path, data: Path, *options: str) -> tuple[int, str, str]:
        arguments = ["evaluate", "--checkpoint", str(checkpoint), "--data", str(data), "--device", "cpu", *options]
        capsys.readouterr()  # what making the checkpoint has said
        return (cli.main(arguments), *capsys.readouterr())

    return call


def test_it_prints_what_evaluate_bound_gives(evaluate, checkpoint, data):
    status, out, _ = evaluate(checkpoint, data, "--draws", "3", "--unigram-from", str(data), "--json")
    found = json.loads(out)
    train, validation = ShardedSource.open(data / "train"), ShardedSource.open(data / "validation")
    bound = evaluate_bound(models.load(checkpoint), validation, torch.device("cpu"), num_rows=11, draws=3)
    assert status == 0
    assert found["bound_nats_per_token"] == bound.nats_per_token
    assert found["standard_error"] == bound.standard_error
    assert found["bits_per_byte"] == bound.bits_per_byte
    assert found["unigram_nats_per_token"] == unigram_nats_per_token(train, validation, 11)
    assert (found["rows"], found["draws"], found["dtype"], found["world_size"]) == (11, 3, "float32", 1)
    assert found["data"] == str(data / "validation")


def test_the_text_says_what_the_json_says(evaluate, checkpoint, data):
    found = json.loads(evaluate(checkpoint, data, "--rows", "4", "--unigram-from", str(data / "train"), "--json")[1])
    _, out, _ = evaluate(checkpoint, data, "--rows", "4", "--unigram-from", str(data / "train"))
    for name in ("bound_nats_per_token", "standard_error", "bits_per_byte", "unigram_nats_per_token"):
        assert f"{found[name]:.4f}" in out
    assert "on 4 rows of 8 tokens" in out
    assert f"{found['bound_nats_per_token'] - found['unigram_nats_per_token']:.4f} above" in out
    assert len(found["loss_by_time"]) == 10
    for part in found["loss_by_time"]:
        (line,) = [line for line in out.splitlines() if f"t {part['first']:.1f} to {part['last']:.1f}" in line]
        assert ("no draw" if part["draws"] == 0 else f"{part['nats_per_token']:.4f}") in line


def test_rows_dtype_and_a_named_split(evaluate, checkpoint, data):
    status, out, _ = evaluate(checkpoint, data / "train", "--rows", "999", "--dtype", "bf16", "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["rows"], found["dtype"], found["data"]) == (20, "bfloat16", str(data / "train"))


def test_token_files_are_scored_like_a_data_set_of_the_same_rows(evaluate, checkpoint, data, tmp_path):
    flat = np.concatenate([[0], ShardedSource.open(data / "validation").read(range(11)).tokens.reshape(-1)])
    tokens = write_megatron(tmp_path / "tokens", [flat.tolist()])
    given = ["--tokenizer", "bytes", "--sequence-length", "8"]
    status, out, err = evaluate(checkpoint, tokens, *given, "--unigram-from", str(data), "--json")
    found, built = json.loads(out), json.loads(evaluate(checkpoint, data, "--unigram-from", str(data), "--json")[1])
    assert status == 0
    assert "note: " in err  # no end of text among the tokens
    assert found.pop("data") == str(tokens)
    assert built.pop("data") == str(data / "validation")
    assert found == built
    status, _, err = evaluate(checkpoint, tokens)
    assert (status, "give a tokenizer and a sequence length" in err) == (2, True)
    status, _, err = evaluate(checkpoint, data, *given)
    assert (status, "--tokenizer and --sequence-length are for token files" in err) == (2, True)


def test_a_causal_language_model_is_scored_as_it_was_trained(evaluate, data, tmp_path):
    path = publish(tmp_path / "checkpoints", load("bytes"), objective="ar", direction="causal")
    status, out, err = evaluate(path, data, "--json")
    found = json.loads(out)
    validation = ShardedSource.open(data / "validation")
    exact = evaluate_bound(models.load(path), validation, torch.device("cpu"), num_rows=11, objective="ar")
    assert status == 0
    assert "note:" not in err
    assert found["objective"] == "ar"
    assert found["bound_nats_per_token"] == exact.nats_per_token
    assert found["standard_error"] == exact.standard_error
    assert (found["exact"], found["loss_by_time"]) == (True, None)
    told = evaluate(path, data)[1]
    assert f"likelihood     {exact.nats_per_token:.4f} +- " in told
    assert "draw" not in told
    card = publish(tmp_path / "card" / "checkpoints", load("bytes"), objective="card", direction="causal")
    assert json.loads(evaluate(card, data, "--json")[1])["exact"] is True
    bound = json.loads(evaluate(path, data, "--json", "--objective", "mdlm", "--draws", "2")[1])
    assert (bound["objective"], bound["draws"]) == ("mdlm", 2)
    assert bound["bound_nats_per_token"] != exact.nats_per_token
    status, _, err = evaluate(path, data, "--draws", "2")
    assert status != 0
    assert "--draws is 2: the objective ar has nothing to draw" in err


def test_a_model_of_unknown_training_is_scored_by_its_direction(evaluate, checkpoint, data, tmp_path):
    shutil.copytree(publish(tmp_path / "checkpoints", load("bytes"), direction="causal") / "model", tmp_path / "causal")
    status, out, err = evaluate(tmp_path / "causal", data, "--json")
    assert (status, json.loads(out)["objective"]) == (0, "ar")
    assert "does not say its objective; it is causal, so taken as ar" in err
    shutil.copytree(checkpoint / "model", tmp_path / "both")
    status, out, err = evaluate(tmp_path / "both", data, "--json")
    assert (status, json.loads(out)["objective"]) == (0, "mdlm")
    status, _, err = evaluate(checkpoint, data, "--objective", "ar")
    assert status != 0
    assert "the objective ar needs a causal model" in err
    assert "bidirectional" in err


@pytest.mark.parametrize("trained", [True, False])
def test_documents_are_isolated_as_in_training_unless_told(evaluate, data, tmp_path, trained):
    path = publish(tmp_path / "checkpoints", load("bytes"), isolate_documents=trained)
    for options, expected in ((), trained), (("--isolate-documents",), True), (("--no-isolate-documents",), False):
        found = json.loads(evaluate(path, data, "--rows", "2", "--json", *options)[1])
        assert found["isolate_documents"] is expected
    # The model folder inside a checkpoint is the same model of the same run.
    found = json.loads(evaluate(path / "model", data, "--rows", "2", "--json")[1])
    assert found["isolate_documents"] is trained


@pytest.mark.distributed
@pytest.mark.parametrize("objective", ["mdlm", "block"])
def test_several_ranks_give_the_same_number(objective, data, tmp_path):
    """As a user starts it: one process by itself, and two under torchrun."""
    path = publish(tmp_path / "checkpoints", load("bytes"), objective=objective)
    # 5 batches on 2 ranks: the last round has one batch for two ranks.
    command = ["evaluate", "--checkpoint", str(path), "--data", str(data), "--batch-size", "5", "--draws", "2"]
    command += ["--device", "cpu", "--json", *(["--block-length", "4"] if objective == "block" else [])]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(runs.free_port())]
    outputs = [
        subprocess.run(
            [sys.executable, *launcher, "-m", "launcher.cli", *command],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            timeout=120,
        ).stdout
        for launcher in ([], torchrun)
    ]
    alone, both = (json.loads(out) for out in outputs)
    assert (alone.pop("world_size"), both.pop("world_size")) == (1, 2)
    assert alone == both
    assert sum(part["draws"] for part in alone["loss_by_time"]) == 11 * 2 * (2 if objective == "block" else 1)


def refusal(result: tuple[int, str, str]) -> str:
    """The one sentence of a refused command."""
    status, out, err = result
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("dlm: error: ")
    return line


def test_data_of_another_tokenizer_is_refused(evaluate, checkpoint, data, tmp_path):
    same_mask = write(tmp_path / "same_mask", CharacterTokenizer(range(256)), TEXTS)
    assert ShardedSource.open(same_mask).mask_id == load("bytes").mask_id
    assert "built with another tokenizer (characters)" in refusal(evaluate(checkpoint, same_mask))
    other_mask = write(tmp_path / "other_mask", CharacterTokenizer.learn(TEXTS), TEXTS)
    assert "has mask id" in refusal(evaluate(checkpoint, other_mask))
    line = refusal(evaluate(checkpoint, data, "--unigram-from", str(same_mask)))
    assert "built with different tokenizers" in line


def test_a_model_that_does_not_fit_the_data_is_refused(evaluate, data, tmp_path):
    wrong = publish(tmp_path / "wrong", load("bytes"), mask_token_id=5)
    assert "has mask id 257, the model of" in refusal(evaluate(wrong, data))
    config = SimpleNamespace(mask_token_id=257, vocab_size=257)
    with pytest.raises(ValueError, match=r"holds ids up to 257, but the vocabulary of x ends at 256"):
        evaluate_command._require_vocabulary(config, ShardedSource.open(data / "train"), Path("x"), masked=True)


def test_weights_without_tokenizer_are_compared_by_ids(evaluate, checkpoint, data, tmp_path):
    shutil.copytree(checkpoint / "model", tmp_path / "weights")
    status, _, err = evaluate(tmp_path / "weights", data, "--rows", "2")
    assert status == 0
    assert "has no tokenizer/" in err


def test_a_damaged_checkpoint_is_refused(evaluate, checkpoint, data, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "step-7")
    content = bytearray((copy / "model" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model" / "model.safetensors").write_bytes(content)
    assert "model.safetensors does not have its recorded SHA-256" in refusal(evaluate(copy, data))


def test_wrong_paths_are_one_sentence(evaluate, checkpoint, data, tmp_path):
    assert "does not exist" in refusal(evaluate(checkpoint, tmp_path / "nothing"))
    assert "No model at" in refusal(evaluate(tmp_path / "nothing", data))
    assert "No model at" in refusal(evaluate(checkpoint.parent, data))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_one_sentence(evaluate, checkpoint, data):
    assert "no CUDA device" in refusal(evaluate(checkpoint, data, "--device", "cuda"))
