"""`dlm checkpoint export` and `average`: the weights that were asked for, as a folder that everything else reads."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_dist import models
from dlm_dist.config import load_config
from dlm_dist.training import safetensors_files, zero_state
from dlm_dist.training.checkpoint_contents import Contents
from dlm_dist.training.durable_files import file_sha256
from dlm_dist.training.model_files import _mean
from dlm_dist.training.starting_model import initial_model
from dlm_dist.training.weight_average import WeightAverage
from launcher import cli
from launcher.trained_as import load_weights, trained_identity
from tests.training.conftest import SIZES, run_steps, save_checkpoint, tiny_engine


def save(engine, folder, step, average=None, tokenizer=b"{}"):
    state = {"global_step": step, "identity": {"objective.name": "mdlm", "objective.shift": True}}
    return save_checkpoint(engine, folder, state, {"tokenizer.json": tokenizer}, average)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints of steps 1 to 3 with an EMA, in different layouts, and one of step 1 without."""
    folder = tmp_path_factory.mktemp("run")
    settings = ("optimizer.name=adamw8bit", "train.precision=bf16")
    found = {}
    for step, layout in ((1, "zero.stage=2"), (2, "zero.stage=0"), (3, "zero.stage=3")):
        engine, _ = tiny_engine(*settings, layout)
        average = WeightAverage(engine, half_life=10)
        for number in range(step):
            run_steps(engine, number, 1)
            average.update(4 * (number + 1), 4)
        found[step] = save(engine, folder, step, average)
    found["bare"] = save(engine, folder / "bare", 1)
    found["ema"] = {
        piece.name: average.of(shard)[piece.offset : piece.offset + piece.numel].clone()
        for shard in zero_state.shards(engine)
        for piece in shard.pieces
    }
    return found


def dlm(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("dtype", [None, "bf16", "fp32"])
def test_the_ema_is_exported(run, dtype, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(safetensors_files, "MODEL_FILE_BYTES", 20_000)
    out = tmp_path / "out"
    options = [] if dtype is None else ["--dtype", dtype]
    assert dlm("checkpoint", "export", run[3], out, "--weights", "ema", *options) == 0
    expected = torch.bfloat16 if dtype == "bf16" else torch.float32
    name = str(expected).removeprefix("torch.")
    assert f"{out}: the EMA of step-3 in {name}" in capsys.readouterr().out
    assert len(list(out.glob("*.safetensors"))) > 1
    model = models.load(out)
    assert model.dtype == expected
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, run["ema"][key].view(parameter.shape).to(expected)), key
        assert not torch.equal(parameter.float(), Contents(run[3]).read(key, "master"))
    origin = json.loads((out / "origin.json").read_text())
    assert (origin["weights"], origin["dtype"]) == ("ema", name)
    (source,) = origin["checkpoints"]
    assert source["path"] == str(run[3])
    assert (source["global_step"], source["share"]) == (3, 1.0)
    assert source["manifest_sha256"] == file_sha256(run[3] / "manifest.json")
    assert trained_identity(out) == {"objective.name": "mdlm", "objective.shift": True}


def test_commands_take_the_ema_of_a_checkpoint(run):
    model = load_weights(run[3], "ema")
    assert model.dtype == torch.bfloat16
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, run["ema"][key].view(parameter.shape).bfloat16())
    exact = load_weights(run[3], "master", torch.float32)
    assert all(torch.equal(p, Contents(run[3]).read(key, "master")) for key, p in exact.named_parameters())


def test_what_has_no_ema_says_so(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert dlm("checkpoint", "export", run["bare"], out, "--weights", "ema") == 2
    assert "holds no EMA: its run had no train.ema_half_life" in capsys.readouterr().err
    assert dlm("checkpoint", "average", run[2], run["bare"], "--weights", "ema", "--output", out) == 2
    assert "bare/step-1 holds no EMA" in capsys.readouterr().err
    assert not out.exists()
    assert dlm("checkpoint", "export", run[3], out, "--weights", "trained") == 0
    for command in (["generate", "--prompt", "", "--model"], ["evaluate", "--data", tmp_path, "--checkpoint"]):
        dlm(*command, out, "--weights", "ema")
    assert f"--weights ema is for a checkpoint (RUN/checkpoints/step-N), and {out} is none" in capsys.readouterr().err


@pytest.mark.parametrize("coefficients", [None, [1.0, 2.0, 0.3]])
def test_the_average_is_that_of_numpy_in_any_order(run, coefficients, tmp_path, capsys):
    steps = [1, 2, 3]
    for number, order in enumerate(itertools.permutations(range(3))):
        given_coefficients = [] if coefficients is None else ["--coefficients", *(coefficients[i] for i in order)]
        paths = [run[steps[i]] for i in order]
        assert dlm("checkpoint", "average", *paths, "--output", tmp_path / str(number), *given_coefficients) == 0
        assert "the fp32 masters of 3 checkpoints, averaged in float32" in capsys.readouterr().out
    one = tmp_path / "0"
    for number in range(1, 6):
        other = tmp_path / str(number)
        assert (other / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
        assert json.loads((other / "origin.json").read_text())["trainer_state"]["global_step"] == 3
    shares = coefficients or [1.0, 1.0, 1.0]
    found = json.loads((one / "origin.json").read_text())["checkpoints"]
    assert [entry["share"] for entry in found] == pytest.approx([share / sum(shares) for share in shares])
    contents = [Contents(run[step]) for step in steps]
    for key, parameter in models.load(one).named_parameters():
        masters = np.stack([one.read(key, "master").numpy() for one in contents]).astype(np.float64)
        mean = np.average(masters, axis=0, weights=shares)
        assert parameter.dtype == torch.float32
        np.testing.assert_array_max_ulp(parameter.detach().numpy(), mean.astype(np.float32), maxulp=1)
        assert not np.array_equal(parameter.detach().numpy(), masters[2].astype(np.float32))
    assert (one / "tokenizer" / "tokenizer.json").read_bytes() == b"{}"


class Fixed:
    """Contents with one vector of given values, in windows of three."""

    def __init__(self, values):
        self.values = torch.tensor(values, dtype=torch.float32)

    def windows(self, name, what):
        return iter(self.values.split(3))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=10),
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20),
    st.booleans(),
)
def test_the_average_of_equal_checkpoints_is_one_of_them(values, coefficients, uniform):
    one = Fixed(values)
    parts = [(one, 1.0 if uniform else coefficient) for coefficient in coefficients]
    assert torch.equal(torch.cat(list(_mean(parts, "x", "master"))), one.values)


def test_an_average_starts_a_run(run, tmp_path):
    out = tmp_path / "out"
    assert dlm("checkpoint", "average", run[1], run[3], "--output", out) == 0
    sizes = [f"model.{key}={value}" for key, value in SIZES.items() if key != "mask_token_id"]
    changes = ["run.dir=unused", "model.backbone=qwen3", f"model.init_from={out}", "data.train.0.path=unused"]
    changes += ["train.max_steps=1", "train.global_batch_size=1", "train.micro_batch_size=1"]
    config = load_config(None, [*sizes, "model.tie_word_embeddings=false", *changes])
    model, report = initial_model(config, SIZES["mask_token_id"])
    averaged = models.load(out)
    assert not report["skipped"]
    for (key, mine), theirs in zip(model.named_parameters(), averaged.parameters(), strict=True):
        assert torch.equal(mine, theirs), key


def test_mistakes_of_an_average_are_sentences(run, tmp_path, capsys):
    other = models.build("qwen3", **{**SIZES, "vocab_size": 70})
    engine, _ = tiny_engine(model=other)
    wider = save(engine, tmp_path / "wider", 1)
    engine, _ = tiny_engine(model=models.build("qwen3", **{**SIZES, "mask_token_id": 61}))
    masked = save(engine, tmp_path / "masked", 1)
    engine, _ = tiny_engine()
    read = save(engine, tmp_path / "read", 1, tokenizer=b"{} ")
    damaged = shutil.copytree(run[1], tmp_path / "damaged" / "step-1")
    (damaged / "tensors" / "rank-00000.json").write_text("[]")
    out = tmp_path / "out"
    for arguments, said in (
        ([run[1], wider], "hold different models: lm_head.weight is [64, 32] and [70, 32]"),
        ([run[1], masked], "hold different models: mask_token_id in config.json is 60 and 61"),
        ([run[1], read], "were trained with different tokenizers"),
        ([run[1], damaged], "damaged/step-1 is no whole checkpoint: "),
        ([run[1], tmp_path], "is no whole checkpoint: "),
        ([run[1]], "alone has no average"),
        ([run[1], run[2], "--coefficients", 1], "--coefficients has 1 numbers for 2 checkpoints"),
        ([run[1], run[2], "--coefficients", 1, 0], "expected numbers above 0"),
        ([run[1], run[2], "--coefficients", 1, "nan"], "expected numbers above 0"),
    ):
        assert dlm("checkpoint", "average", *arguments, "--output", out) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()
    out.mkdir()
    assert dlm("checkpoint", "average", run[1], run[2], "--output", out) == 2
    assert "exists already" in capsys.readouterr().err
