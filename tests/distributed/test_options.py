"""Options that meet only in a whole run: ZeRO-3 with checkpointing, samples, evaluation, wandb, warm start."""

import json
import os
import subprocess
import sys

import pytest

from tests.commands import dlm
from tests.distributed import runs
from tests.training.test_tensorboard import curve as tensorboard_curve

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.build_data(tmp_path_factory.mktemp("data"))


def everything(data, run, **changes):
    settings = {
        "zero__stage": 3,
        "model__direction": "bidirectional",
        "model__gradient_checkpointing": True,
        "data__isolate_documents": True,
        "data__validation": data / "validation",
        "train__eval_every": 4,
        "train__eval_rows": 5,
        "train__sample_every": 4,
        "train__sample_prompt": "time",
        "train__max_steps": 8,
        "logging__wandb": "offline",
        "logging__tensorboard": True,
        "objective__schedule": "cosine",
    }
    return runs.overrides(data, run, **(settings | changes))


def test_everything_at_once_and_resumed(data, tmp_path):
    plain, run = tmp_path / "plain", tmp_path / "run"
    runs.train(everything(data, plain, model__gradient_checkpointing=False, logging__wandb="disabled"))
    runs.train(everything(data, run, train__max_steps=8, checkpoint__every=4))
    (run / "checkpoints" / "step-8" / "manifest.json").unlink()
    runs.train(everything(data, run), resume="auto")
    runs.assert_same_steps(run, plain)

    def lines(folder, kind):
        return [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]

    assert [record["step"] for record in lines(run, "evaluations")] == [0, 4, 8]
    assert lines(run, "evaluations") == lines(plain, "evaluations")
    assert [record["step"] for record in lines(run, "samples")] == [4, 8]
    assert lines(run, "samples") == lines(plain, "samples")
    # One wandb run id over both starts, kept in the checkpoint.
    offline = [path.name for path in (run / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert len(offline) == 2
    assert len({name.rsplit("-", 1)[1] for name in offline}) == 1
    assert all(record["resident_set_bytes"] > 2**26 for record in lines(run, "metrics"))
    assert {record["cuda_allocated_peak_bytes"] for record in lines(run, "metrics")} == {None}
    # Whoever reads the events of both starts finds every step once.
    for name, kind, key in (("train", "metrics", "loss"), ("validation", "evaluations", "bound_nats_per_token")):
        curve = [(step, pytest.approx(value)) for step, value in tensorboard_curve(run / "tensorboard" / name, key)]
        assert curve == [(record["step"], record[key]) for record in lines(run, kind)]
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert [start["resumed_from"] is None for start in starts] == [True, False]
    assert all(start["versions"]["deepspeed"] and start["command"] for start in starts)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["causal", "alternate", "dw_jrt"])
def test_gradient_checkpointing_changes_nothing_under_zero3(direction, data, tmp_path):
    kept, again = tmp_path / "kept", tmp_path / "again"
    settings = {"zero__stage": 3, "model__direction": direction, "train__max_steps": 3, "checkpoint__every": None}
    runs.train(runs.overrides(data, kept, **settings))
    runs.train(runs.overrides(data, again, model__gradient_checkpointing=True, **settings))
    runs.assert_same_steps(again, kept)


def test_init_from_reports_what_fitted(data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    other_ranks = {"model__decay_low_rank_dim": 8, "model__gate_low_rank_dim": 16}
    runs.train(runs.overrides(data, first, train__max_steps=4, model__direction="causal", **other_ranks), ranks=1)
    start = first / "checkpoints" / "step-4"
    settings = {"model__init_from": start, "model__direction": "bidirectional", "model__vocab_size": 384}
    settings |= {"model__tie_directions": True}
    output = runs.train(runs.overrides(data, second, train__max_steps=4, optimizer__lr=1e-9, **settings), ranks=1)
    assert "resized (2): emb.weight, head.weight" in output
    assert "direction_gate" in output
    report = json.loads((second / "manifest.json").read_text())["starts"][0]["init_from"]
    assert len(report["matched"]) > 40
    assert report["unused"] == []
    assert set(report["skipped"]) == {
        f"blocks.{i}.att.direction_gate.{x}" for i in range(2) for x in ("weight", "bias")
    }, "the ranks of the low-rank maps are those of the given weights"
    assert (
        json.loads((second / "checkpoints" / "step-4" / "model" / "config.json").read_text())["direction_gate_init"]
        == 4.0
    )
    # A causal model, read nearly forward only, is about as good as it was; from scratch the loss is ln 384 = 5.95.
    assert runs.metrics(second)[0]["loss"] < runs.metrics(first)[-1]["loss"] + 0.4


def test_an_objective_that_is_no_bound_says_so_and_draws_the_same_on_any_ranks(data, tmp_path):
    settings = {
        "objective__name": "soft_ce",
        "objective__schedule": "power",
        "objective__draws_per_row": 2,
        "objective__complementary_prob": 0.5,
        "objective__protected_tokens": "[eos]",
        "objective__token_to_token_rate": 0.1,
        "objective__confidence_weight": 0.5,
        "objective__shift": True,
        "data__validation": data / "validation",
        "train__eval_rows": 5,
        "train__eval_draws": 4,
        "train__max_steps": 3,
        "train__sample_every": 3,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    output = runs.train(runs.overrides(data, one, **settings), ranks=1)
    runs.train(runs.overrides(data, two, **settings), ranks=2)
    assert "the loss is no bound on the likelihood: weighting=inverse_rate, protected_tokens=('eos',), " in output
    for first, second in zip(runs.metrics(one), runs.metrics(two), strict=True):
        assert (first["bound_nats_per_token"], first["bits_per_byte"]) == (None, None)
        assert first["noise_sha256"] == second["noise_sha256"]
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
    alone, both = (
        [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()] for run in (one, two)
    )
    # At step 0 both have the same weights: held-out rows are scored the same by any ranks, to the bit.
    assert alone[0] == both[0]
    assert 0 < alone[-1]["bound_nats_per_token"] < 10
    assert both[-1]["bound_nats_per_token"] == pytest.approx(alone[-1]["bound_nats_per_token"], rel=1e-3)
    asked = ["--data", data, "--rows", "5", "--draws", "4", "--device", "cpu", "--json"]
    command = [sys.executable, "-m", "launcher.cli", "evaluate", "--checkpoint", one / "checkpoints" / "step-3", *asked]
    alone_here = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, cwd=runs.REPOSITORY, env=alone_here, check=True, stdout=subprocess.PIPE)
    again = json.loads(done.stdout)
    for key in ("bound_nats_per_token", "standard_error", "bits_per_byte"):
        assert again[key] == pytest.approx(alone[-1][key], rel=1e-6), key


@pytest.mark.parametrize("backbone", ["rwkv7", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_block_diffusion_writes_texts_on_the_way_and_afterwards(data, tmp_path, capsys, backbone):
    run = tmp_path / "run"
    settings = {"zero__stage": 3 if backbone == "rwkv7" else 2, "train__max_steps": 4, "train__sample_every": 2}
    settings |= {"objective__name": "block", "objective__block_lengths": "[[512, 8], [0, 0]]"}
    settings |= {"data__random_length_prob": 0, "train__sample_prompt": "time"}
    runs.train(runs.overrides(data, run, backbone, **settings))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(record["step"], record["text"][:4]) for record in samples] == [(2, "time"), (4, "time")]
    state = json.loads((run / "checkpoints" / "step-4" / "trainer_state.json").read_text())
    assert state["sequence_length"] == 32
    command = ["generate", "--model", str(run / "checkpoints" / "step-4"), "--prompt", "time", "--length", "20"]
    for more in ([], ["--block-length", "8"]):
        assert dlm(*command, *more) == 0
        assert capsys.readouterr().out.startswith("time")


@pytest.mark.slow
def test_noise_on_masks_is_the_same_on_any_ranks_and_after_a_resume_and_ends(data, tmp_path):
    """Steps of 8 samples: the noise is gone after step 5."""
    settings = {"objective__mask_noise_std": 0.5, "objective__mask_noise_samples": 40, "train__max_steps": 8}
    settings |= {"train__precision": "fp32"}
    without = {"objective__mask_noise_std": None, "objective__mask_noise_samples": None}
    found = {}
    for name, ranks, changes in (("one", 1, {}), ("two", 2, {}), ("without", 2, without)):
        runs.train(runs.overrides(data, tmp_path / name, **(settings | changes)), ranks)
        found[name] = runs.metrics(tmp_path / name)
    for one, two in zip(found["one"], found["two"], strict=True):
        assert one["noise_sha256"] == two["noise_sha256"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    same = [
        one["noise_sha256"] == other["noise_sha256"] for one, other in zip(found["two"], found["without"], strict=True)
    ]
    assert same == [False] * 5 + [True] * 3
    (tmp_path / "two" / "checkpoints" / "step-8" / "manifest.json").unlink()
    again = tmp_path / "again"
    (tmp_path / "two").rename(again)
    runs.train(runs.overrides(data, again, **settings), 2, resume="auto")
    for one, other in zip(runs.metrics(again), found["two"], strict=True):
        assert [one[key] for key in runs.EXACT] == [other[key] for key in runs.EXACT]
    refused = runs.attempt(runs.overrides(data, again, **(settings | {"objective__mask_noise_std": 0.4})), 1, "auto")
    assert "objective.mask_noise_std is 0.4, the checkpoint was trained with 0.5" in refused.stdout


def test_a_run_without_bitsandbytes_trains_with_32_bit_states_and_says_so(data, tmp_path, monkeypatch):
    (tmp_path / "broken" / "bitsandbytes").mkdir(parents=True)
    (tmp_path / "broken" / "bitsandbytes" / "__init__.py").write_text("raise ImportError('built for another CUDA')\n")
    search = [str(tmp_path / "broken"), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = tmp_path / "run"
    settings = runs.overrides(data, run, optimizer__name="lion8bit", optimizer__lr=2e-4, train__max_steps=3)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(search))
        output = runs.train(settings, ranks=2)
    said = "optimizer.name is lion instead of lion8bit, which bitsandbytes cannot run: on rank 0 ImportError: built for"
    assert f"warning: {said}" in output
    (start,) = json.loads((run / "manifest.json").read_text())["starts"]
    assert start["fallbacks"][0].startswith(said)
    assert {group["optimizer_bits"] for group in start["parameter_groups"]} == {32}
    assert "name: lion\n" in (run / "config.yaml").read_text()
    # Its states are no 8-bit ones, whoever can run those now.
    refused = runs.attempt(settings, ranks=1, resume="auto")
    assert refused.returncode != 0
    assert "optimizer.name is 'lion8bit', the checkpoint was trained with 'lion'" in refused.stdout
