"""ZeRO-Offload of optimizer states: the same training, guards and checkpoints as without, over its three wrappers."""

import math

import pytest
import torch

from dlm_dist import models
from dlm_dist.config import ConfigError
from dlm_dist.training import checkpoint, fallbacks, zero_state
from dlm_dist.training.optimizers import IN_32_BITS
from tests.training.conftest import run_steps, tiny_config, tiny_engine, tiny_model
from tests.training.test_elastic import save, values

OFFLOAD = "zero.offload_optimizer=cpu"
over_stages = pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [
        pytest.param(1, "bf16", "adamw8bit", marks=pytest.mark.slow),
        pytest.param(1, "fp32", "lion", marks=pytest.mark.slow),
        (2, "bf16", "lion8bit"),
        pytest.param(2, "fp32", "adamw8bit", marks=pytest.mark.slow),
        pytest.param(3, "bf16", "adamw", marks=pytest.mark.slow),
        (3, "fp32", "lion8bit"),
    ],
)


def settings(stage, precision, optimizer="adamw"):
    return f"zero.stage={stage}", f"train.precision={precision}", f"optimizer.name={optimizer}"


@over_stages
def test_offload_trains_the_same(stage, precision, optimizer):
    """From unrounded masters, by the bits of each role.

    To the bit where DeepSpeed measures the gradient in the same order, else but for that order in the norm.
    """
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plain, _ = tiny_engine(*settings(stage, precision, optimizer))
    offloaded, table = tiny_engine(*settings(stage, precision, optimizer), OFFLOAD, model=model)
    for (name, kind), value in values(offloaded).items():
        assert kind == "master", "no state before the first step"
        assert torch.equal(value, before[name].view(-1)), "born unrounded"
    ours, theirs = (run_steps(engine, 0, 3) for engine in (offloaded, plain))
    bits = {row["role"]: row["optimizer_bits"] for row in table}
    roles = offloaded.module.parameter_roles()
    for shard in zero_state.shards(offloaded):
        (role,) = {roles[piece.name] for piece in shard.pieces}
        assert shard.master.device.type == "cpu"
        assert int(zero_state.optimizer_state(offloaded, shard)["step"]) == 3
        assert zero_state.optimizer_bits(offloaded, shard) == bits[role]
    if precision == "fp32" and stage < 3:
        assert ours == theirs
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    for key, value in values(plain).items():
        torch.testing.assert_close(values(offloaded)[key], value, rtol=1e-3, atol=1e-5)


@over_stages
def test_a_bad_micro_batch_changes_nothing_with_offload(stage, precision, optimizer):
    clean, _ = tiny_engine(*settings(stage, precision, optimizer), OFFLOAD)
    spoiled, _ = tiny_engine(*settings(stage, precision, optimizer), OFFLOAD)
    run_steps(clean, 0, 2)
    run_steps(spoiled, 0, 2)
    ((_, norm, applied),) = run_steps(spoiled, 2, 1, spoil=lambda step, micro: math.nan if micro == 0 else 1.0)
    assert not applied
    assert not math.isfinite(norm)
    for key, value in values(clean).items():
        assert torch.equal(values(spoiled)[key], value)
    assert run_steps(spoiled, 5, 2) == run_steps(clean, 5, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "tolerance"), [(1, 1e-6), (2, 1e-6), (3, 1e-2)])
def test_offloaded_bf16_gradients_accumulate_as_they_do_without(stage, tolerance):
    many = "train.global_batch_size=32", "train.gradient_clipping=0"
    norms = []
    for changes in ((), (OFFLOAD,)):
        engine, _ = tiny_engine(*settings(stage, "bf16"), *many, *changes)
        ((_, norm, _),) = run_steps(engine, 0, 1, accumulation=16)
        norms.append(norm)
    assert norms[1] == pytest.approx(norms[0], rel=tolerance)


@over_stages
def test_a_checkpoint_moves_into_host_memory_and_back(stage, precision, optimizer, tmp_path):
    """Without offload, with it, on another stage with it, and without again: every value to the bit."""
    engine, _ = tiny_engine(*settings(stage, precision, optimizer))
    run_steps(engine, 0, 2)
    expected = values(engine)
    layouts = [(stage, (OFFLOAD,)), (stage % 3 + 1, (OFFLOAD,)), (stage, ())]
    for number, (other, changes) in enumerate(layouts):
        engine, loaded = gone_on(engine, tmp_path / str(number), *settings(other, precision, optimizer), *changes)
        assert loaded.requantised_blocks == 0
        assert expected.keys() == values(engine).keys()
        for key, value in values(engine).items():
            assert torch.equal(value, expected[key]), key


@over_stages
def test_an_offloaded_run_goes_on_to_the_bit(stage, precision, optimizer, tmp_path):
    whole, _ = tiny_engine(*settings(stage, precision, optimizer), OFFLOAD)
    run_steps(whole, 0, 2)
    resumed, loaded = gone_on(whole, tmp_path, *settings(stage, precision, optimizer), OFFLOAD)
    assert loaded.converted_shards == 0
    assert run_steps(resumed, 2, 2) == run_steps(whole, 2, 2)
    for key, value in values(whole).items():
        assert torch.equal(values(resumed)[key], value)


def gone_on(engine, folder, *options):
    """An engine with these settings that goes on from what `engine` saves, and how that was loaded."""
    path = save(engine, folder)
    resumed, _ = tiny_engine(*options, model=models.load(path, dtype=torch.float32))
    return resumed, checkpoint.load_shards(resumed, path)


def test_stage_0_cannot_offload():
    with pytest.raises(ConfigError, match=r"expected none, since zero\.stage is 0: DeepSpeed offloads from stage 1 on"):
        tiny_config("zero.stage=0", OFFLOAD)
    with pytest.raises(ConfigError, match=r"use zero\.offload_optimizer and remove it"):
        tiny_config("deepspeed.zero_optimization.offload_optimizer.device=cpu")


def test_an_offloaded_8_bit_optimizer_is_tried_on_the_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(fallbacks, "eight_bit_problem", lambda name, device: asked.append((name, device.type)))
    for name in IN_32_BITS:
        for offload in ("none", "cpu"):
            config = tiny_config(f"optimizer.name={name}", f"zero.offload_optimizer={offload}")
            assert fallbacks.with_optimizer_that_runs(config, torch.device("meta")) == (config, [])
    assert [device for _, device in asked] == ["meta", "cpu"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_leaves_no_states_on_the_gpu(stage, optimizer, tmp_path):
    """A run of the launcher; this process has its CPU ranks already."""
    from tests.distributed import runs

    data = runs.build_data(tmp_path)
    losses = {}
    for offload in ("none", "cpu"):
        run = tmp_path / offload
        changes = {"zero__stage": stage, "zero__offload_optimizer": offload, "optimizer__name": optimizer}
        changes |= {"model__hidden_size": 512, "train__device": "cuda", "train__max_steps": 4}
        runs.train(runs.overrides(data, run, "qwen3", **changes), ranks=1)
        losses[offload] = [record["loss"] for record in runs.metrics(run)]
    assert losses["cpu"] == pytest.approx(losses["none"], rel=1e-3)
