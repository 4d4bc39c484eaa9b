"""Runs on other people's token files, in this process: what they read, what they leave behind, an exact resume."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.shards import write_source
from data_pipeline.tokenizer_backends.characters import CharacterTokenizer
from data_pipeline.tokenizers import Tokenizer, load
from dlm_dist.config import ConfigError, RunConfig, load_config
from dlm_dist.training.run import train
from dlm_dist.training.sources import open_sources
from tests.data_pipeline.test_token_files import write_llmc, write_megatron
from tests.distributed import runs

LENGTH, BATCH = 16, 4
TOKENS = np.random.default_rng(0).integers(0, 257, 25 * LENGTH + 7)


@pytest.fixture
def token_files(tmp_path: Path) -> dict[str, Path]:
    write_llmc(tmp_path / "fineweb_train_000001.bin", TOKENS[:200])
    write_llmc(tmp_path / "fineweb_train_000002.bin", TOKENS[200:])
    write_llmc(tmp_path / "fineweb_val_000000.bin", TOKENS[:100])
    return {
        "llmc": tmp_path / "*_train_*.bin",
        "llmc_val": tmp_path / "fineweb_val_000000.bin",
        "megatron": write_megatron(tmp_path / "pile", [TOKENS.tolist()]),
    }


def config(path: Path, run: Path, *changes: str) -> RunConfig:
    settings = [
        *runs.MODELS["rwkv7"],
        f"run.dir={run}",
        f"data.train.0.path={path}",
        "data.tokenizer=bytes",
        f"data.sequence_length={LENGTH}",
        "train.max_steps=6",
        f"train.global_batch_size={BATCH}",
        "train.micro_batch_size=2",
        "train.precision=fp32",
        "train.device=cpu",
        "optimizer.schedule=constant",
        "checkpoint.every=3",
    ]
    return load_config(None, [*settings, *changes])


def start(settings: RunConfig, resume: str | None = None) -> None:
    train(settings, torch.device("cpu"), resume, ["test"])


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("llmc", ["data.order=keyed"]),
        (
            "megatron",
            ["data.order=cubic_prime", "model.direction=causal", "objective.name=ar", "data.random_length_prob=0"],
        ),
    ],
)
def test_a_run_resumes_exactly(form: str, changes: list[str], token_files: dict[str, Path], tmp_path: Path) -> None:
    path = token_files[form]
    if form == "llmc":
        changes = [*changes, f"data.validation={token_files['llmc_val']}", "train.eval_rows=4"]
    start(config(path, tmp_path / "whole", *changes))
    start(config(path, tmp_path / "cut", *changes, "train.max_steps=3"))
    start(config(path, tmp_path / "cut", *changes), "auto")
    runs.assert_same_steps(tmp_path / "cut", tmp_path / "whole")
    assert [record["data_pos"] for record in runs.metrics(tmp_path / "cut")] == [4, 8, 12, 16, 20, 24]
    assert runs.metrics(tmp_path / "cut")[0]["bits_per_byte"] > 0
    checkpoint = tmp_path / "cut" / "checkpoints" / "step-6"
    assert Tokenizer.load(checkpoint / "tokenizer").fingerprint == load("bytes").fingerprint
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    prime = 23  # the largest = 2 (mod 3) below the 25 rows
    assert state["epoch"] == 24 // (prime if form == "megatron" else 12 + 12)
    if form == "llmc":
        evaluations = [json.loads(line) for line in (tmp_path / "whole" / "evaluations.jsonl").read_text().splitlines()]
        assert [(evaluation["step"], evaluation["rows"]) for evaluation in evaluations] == [(0, 4), (6, 4)]
        with pytest.raises(ConfigError, match=r"data\.order is 'cubic_prime', the checkpoint was trained with 'keyed'"):
            start(config(path, tmp_path / "cut", *changes, "data.order=cubic_prime"), "auto")
        write_llmc(tmp_path / "fineweb_train_000002.bin", TOKENS[201:])
        with pytest.raises(ConfigError, match=r"data\.train is"):
            start(config(path, tmp_path / "cut", *changes), "auto")
    else:
        assert_rows_of_rwkv_lm(tmp_path / "cut", prime)


def assert_rows_of_rwkv_lm(run: Path, prime: int) -> None:
    """Every step read what RWKV-LM's dataset.py gives for the same file, context length and batch size."""
    factor = int(prime * ((math.sqrt(5) - 1) / 2))
    for step, record in enumerate(runs.metrics(run)):
        digest = hashlib.sha256()
        for ii in range(1 + step * BATCH, 1 + (step + 1) * BATCH):
            i = ((factor * ii * ii * ii) % prime) * LENGTH
            dix = TOKENS[i : i + LENGTH + 1]
            digest.update(hashlib.sha256(dix[1:].astype("<i8").tobytes()).digest())
        assert record["rows_sha256"] == digest.hexdigest(), f"step {step + 1}"


def refused(*sentences: str, settings: RunConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        open_sources(settings)
    for sentence in sentences:
        assert sentence in str(caught.value)


def test_what_token_files_need_is_asked_for_by_its_key(token_files: dict[str, Path], tmp_path: Path) -> None:
    path = token_files["megatron"]
    bare = config(path, tmp_path / "run", "data.tokenizer=null", "data.sequence_length=null")
    refused(
        f"data.tokenizer is missing: {path} holds only tokens",
        f"data.sequence_length is missing: {path} holds tokens that are not cut into rows",
        settings=bare,
    )
    write_source(tmp_path / "built", TOKENS[: 4 * LENGTH].reshape(4, LENGTH), load("bytes"))
    refused(
        f"data.tokenizer is bytes, but {tmp_path / 'built'} is no token file and has a tokenizer of its own",
        settings=config(tmp_path / "built", tmp_path / "run"),
    )
    refused(
        f"data.sequence_length is {LENGTH + 1}, but {tmp_path / 'built'} holds rows of {LENGTH} tokens",
        settings=config(
            tmp_path / "built", tmp_path / "run", "data.tokenizer=null", f"data.sequence_length={LENGTH + 1}"
        ),
    )


def test_a_mask_that_is_the_end_of_text_is_refused(tmp_path: Path) -> None:
    tokenizer = load("bytes")
    tokenizer.mask_id = tokenizer.eos_id
    write_source(tmp_path / "built", TOKENS[: 4 * LENGTH].reshape(4, LENGTH), tokenizer)
    refused(
        f"the tokenizer of {tmp_path / 'built'} has the id 256 for the mask and for the end of text",
        settings=config(tmp_path / "built", tmp_path / "run", "data.tokenizer=null"),
    )


def test_token_files_mix_with_built_data(token_files: dict[str, Path], tmp_path: Path) -> None:
    write_source(tmp_path / "built", TOKENS[: 4 * LENGTH].reshape(4, LENGTH), load("bytes"))
    mixed = [f"data.train.1.path={token_files['llmc']}", "data.train.1.weight=2"]
    sources = open_sources(config(tmp_path / "built", tmp_path / "run", *mixed))
    assert [source.num_rows for source in sources] == [4, 24]
    other = CharacterTokenizer(list(range(256)))  # as many ids as bytes, the same reserved ones, another meaning
    write_source(tmp_path / "other", TOKENS[: 4 * LENGTH].reshape(4, LENGTH), other)
    refused(
        f"{token_files['llmc']} was made with another tokenizer (bytes) than {tmp_path / 'other'} (characters)",
        settings=config(tmp_path / "other", tmp_path / "run", *mixed),
    )
    with pytest.raises(
        ConfigError, match=r"data\.order is \"cubic_prime\": expected keyed, since data\.train has 2 sources"
    ):
        config(tmp_path / "built", tmp_path / "run", *mixed, "data.order=cubic_prime")
