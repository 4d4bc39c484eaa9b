"""Lion without bitsandbytes, and what takes the place of an 8-bit optimizer that cannot run."""

import sys

import bitsandbytes
import pytest
import torch

from dlm_dist.config import ConfigError
from dlm_dist.training import optimizers, zero_state
from dlm_dist.training.fallbacks import with_optimizer_that_runs
from dlm_dist.training.lion import Lion
from dlm_dist.training.optimizers import eight_bit_problem
from tests.training.conftest import run_steps, tiny_config, tiny_engine
from tests.training.test_engine import rwkv7_model

CPU = torch.device("cpu")


def test_lion_is_that_of_bitsandbytes():
    options = {"lr": 3e-3, "betas": (0.9, 0.98), "weight_decay": 0.3}
    start = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs, unused = (torch.nn.Parameter(start.clone()) for _ in range(3))
    steps = Lion([ours, unused], **options), bitsandbytes.optim.Lion([theirs], **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        gradient = torch.randn(37, 5, generator=generator)
        for parameter, optimizer in zip((ours, theirs), steps, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    momentum = steps[1].state[theirs]["state1"]
    torch.testing.assert_close(steps[0].state[ours]["exp_avg"], momentum, rtol=1e-5, atol=1e-6)
    assert steps[0].state[ours]["step"] == 20
    assert torch.equal(unused, start)
    assert not steps[0].state[unused]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("eight_bit", ["adamw8bit", "lion8bit"])
def test_the_32_bit_form_trains_alike(stage, eight_bit):
    """The same rule with the same hyper-parameters under every stage; what differs is the rounding of states."""
    settings = (f"zero.stage={stage}", "train.precision=fp32")
    engine, table = tiny_engine(*settings, f"optimizer.name={optimizers.IN_32_BITS[eight_bit]}")
    losses = [result[0] for result in run_steps(engine, 0, 4)]
    quantised = [result[0] for result in run_steps(tiny_engine(*settings, f"optimizer.name={eight_bit}")[0], 0, 4)]
    assert losses[:2] == pytest.approx(quantised[:2], rel=1e-5)
    assert losses == pytest.approx(quantised, rel=1e-2)
    assert {row["optimizer_bits"] for row in table} == {32}
    for shard in zero_state.shards(engine):
        state = zero_state.optimizer_state(engine, shard)
        assert int(state.pop("step")) == 4
        assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("backbone", ["qwen3", "rwkv7"])
def test_no_state_of_a_32_bit_role_is_quantised_by_lion(backbone, stage):
    """AdamW8bit: test_engine.py. Roles and sizes do not go together: some vectors are large, some matrices small."""
    settings = (f"zero.stage={stage}", "optimizer.name=lion8bit")
    engine, table = tiny_engine(*settings, model=rwkv7_model() if backbone == "rwkv7" else None)
    run_steps(engine, 0, 2)
    roles = engine.module.parameter_roles()
    seen = set()
    for shard in zero_state.shards(engine):
        (role,) = {roles[piece.name] for piece in shard.pieces}
        state = zero_state.optimizer_state(engine, shard)
        if role == "matrix":
            assert state["state1"].dtype == torch.uint8
            assert set(state) == {"step", "state1", "qmap1", "absmax1"}
        else:
            assert state["state1"].dtype == torch.float32, role
            assert set(state) == {"step", "state1"}, role
        assert state["state1"].numel() == shard.flat.numel()
        seen.add(role)
    assert seen == {row["role"] for row in table} == set(roles.values())
    assert {row["role"] for row in table if row["optimizer_bits"] == 8} == {"matrix"}


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_what_runs_is_left_alone(name):
    assert eight_bit_problem(name, CPU) is None
    config = tiny_config(f"optimizer.name={name}", "strict=true")
    assert with_optimizer_that_runs(config, CPU) == (config, [])


def test_what_cannot_run_is_replaced_and_said_to_be(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for name, other in (("adamw8bit", "adamw"), ("lion8bit", "lion")):
        config = tiny_config(f"optimizer.name={name}", "optimizer.lr=0.0123")
        replaced, (fallback,) = with_optimizer_that_runs(config, CPU)
        assert replaced.optimizer == config.optimizer.model_copy(update={"name": other})
        assert f"optimizer.name is {other} instead of {name}" in fallback
        assert "on rank 0 ModuleNotFoundError: import of bitsandbytes halted" in fallback
        with pytest.raises(ConfigError, match=f"strict is true: mend that, or set optimizer.name={other}"):
            with_optimizer_that_runs(tiny_config(f"optimizer.name={name}", "strict=true"), CPU)
        plain = tiny_config(f"optimizer.name={other}", "strict=true")
        assert with_optimizer_that_runs(plain, CPU) == (plain, [])


def test_a_broken_step_is_a_problem(monkeypatch):
    def nothing(self, closure=None):
        return None

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", nothing)
    assert eight_bit_problem("adamw8bit", CPU).startswith("KeyError")

    def broken(self, closure=None):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", broken)
    assert eight_bit_problem("adamw8bit", CPU) == "RuntimeError: no kernel image is available"
