"""Each DeepSpeed trap that the engine closes, one test per trap, over every wrapper."""

import math

import pytest
import torch
import torch.nn.functional as functional

from dlm_dist.training import zero_speed, zero_state
from tests.training.conftest import micro_batch, run_steps, tiny_config, tiny_engine, tiny_model

WRAPPERS = [(stage, precision) for stage in range(4) for precision in ("bf16", "fp32")]
over_wrappers = pytest.mark.parametrize(("stage", "precision"), WRAPPERS)


def settings(stage, precision, optimizer="adamw"):
    return f"zero.stage={stage}", f"train.precision={precision}", f"optimizer.name={optimizer}"


def masters(engine):
    return {
        (piece.name, piece.start): shard.flat[piece.offset : piece.offset + piece.numel].clone()
        for shard in zero_state.shards(engine)
        for piece in shard.pieces
    }


@over_wrappers
def test_masters_are_born_unrounded_and_cover_every_parameter(stage, precision):
    model = tiny_model()
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine, _ = tiny_engine(*settings(stage, precision), model=model)
    found = masters(engine)
    assert {name for name, _ in found} == set(values)
    for (name, start), piece in found.items():
        assert torch.equal(piece, values[name].view(-1)[start : start + len(piece)])
    if precision == "bf16":
        assert any((value != value.bfloat16().float()).any() for value in values.values())


@over_wrappers
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit"])
def test_no_optimizer_step_happens_before_the_first(stage, precision, optimizer):
    engine, _ = tiny_engine(*settings(stage, precision, optimizer))
    for shard in zero_state.shards(engine):
        assert not zero_state.optimizer_state(engine, shard)
    run_steps(engine, 0, 2)
    for shard in zero_state.shards(engine):
        assert int(zero_state.optimizer_state(engine, shard)["step"]) == 2


@over_wrappers
def test_state_dtypes_follow_the_roles(stage, precision):
    engine, table = tiny_engine(*settings(stage, precision, "adamw8bit"))
    run_steps(engine, 0, 1)
    roles = engine.module.parameter_roles()
    seen = set()
    for shard in zero_state.shards(engine):
        kinds = {roles[piece.name] for piece in shard.pieces}
        assert len(kinds) == 1
        dtype = zero_state.optimizer_state(engine, shard)["state1"].dtype
        assert dtype == (torch.uint8 if kinds == {"matrix"} else torch.float32)
        seen |= kinds
    assert seen == {row["role"] for row in table} == {"matrix", "embedding", "head", "vector"}


def rwkv7_model():
    from dlm_dist import models

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "head_size": 16, "mask_token_id": 60}
    model = models.build("rwkv7", direction="causal", **sizes)
    for name, parameter in model.named_parameters():
        # Off the initial values, whose zeros would hide gradients.
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data.add_(noise, alpha=0.1)
    return model


@over_wrappers
def test_each_role_of_rwkv7_trains_by_its_own_rules(stage, precision):
    """Bits, decay and learning rate of every role in the optimizer itself, and their effect on one step."""
    lr, decay = 1e-3, 0.5
    model = rwkv7_model()
    before = {name: parameter.detach().clone().view(-1) for name, parameter in model.named_parameters()}
    engine, table = tiny_engine(
        *settings(stage, precision, "adamw8bit"), f"optimizer.weight_decay={decay}", "optimizer.eps=1e-18", model=model
    )
    run_steps(engine, 0, 1, lr=lr)
    roles = engine.module.parameter_roles()
    assert {row["role"] for row in table} == set(roles.values())
    assert len(set(roles.values())) == 6
    large = {"matrix", "embedding", "head"}
    for shard in zero_state.shards(engine):
        (role,) = {roles[piece.name] for piece in shard.pieces}
        state = zero_state.optimizer_state(engine, shard)
        assert state["state1"].dtype == (torch.uint8 if role == "matrix" else torch.float32), role
        assert ("absmax1" in state) == (role == "matrix")
        for piece in shard.pieces:
            old = before[piece.name][piece.start : piece.start + piece.numel]
            new = shard.flat[piece.offset : piece.offset + piece.numel]
            rate = lr * (2.0 if role == "decay_base" else 1.0)
            moved = (new - old * (1.0 - rate * decay if role in large else 1.0)).abs()
            # Adam's first step is the learning rate wherever there is a gradient at all.
            there = moved > 0.5 * rate
            unused = piece.name.startswith("blocks.0.att.v") and piece.name[-2:] in ("v0", "v1", "v2")
            assert there.any() != unused, piece.name
            torch.testing.assert_close(moved[there], torch.full_like(moved[there], rate), rtol=0.02, atol=0)
            assert not (moved[~there] > 0.02 * rate).any(), piece.name
    by_role = {row["role"]: row for row in table}
    assert by_role["decay_base"]["names"] == ["blocks.*.att.w0"]
    assert by_role["lora"]["names"] == [f"blocks.*.att.{x}{i}" for x in "wavg" for i in (1, 2)]
    assert {role for role, row in by_role.items() if row["weight_decay"]} == large
    assert by_role["decay_base"]["lr"] == 2 * by_role["matrix"]["lr"]


@pytest.mark.parametrize(
    ("backbone", "stage"),
    [
        ("qwen3", 0),
        ("rwkv7", 3),
        pytest.param("rwkv7", 0, marks=pytest.mark.slow),
        pytest.param("qwen3", 3, marks=pytest.mark.slow),
    ],
)
def test_activation_checkpointing_changes_no_bit_of_a_step(backbone, stage):
    found = []
    for checkpointed in (False, True):
        model = rwkv7_model() if backbone == "rwkv7" else tiny_model()
        if checkpointed:
            model.gradient_checkpointing_enable()
        engine, _ = tiny_engine(*settings(stage, "fp32"), model=model)
        found.append((run_steps(engine, 0, 2), masters(engine)))
    (plain, values), (saving, same) = found
    assert saving == plain, "losses and gradient norms"
    assert all(torch.equal(same[key], value) for key, value in values.items())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_stage_3_leaves_f_linear_alone(precision):
    before = functional.linear
    engine, _ = tiny_engine(*settings(3, precision))
    run_steps(engine, 0, 1)
    assert functional.linear is before


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_stages_agree_on_the_first_loss_and_follow_each_other(precision):
    results = [run_steps(tiny_engine(*settings(stage, precision))[0], 0, 3) for stage in range(4)]
    first = {result[0][0] for result in results}
    assert len(first) == 1
    tolerance = 2e-2 if precision == "bf16" else 2e-5
    for result in results[1:]:
        for (loss, norm, _), (loss_0, norm_0, _) in zip(result, results[0], strict=True):
            assert loss == pytest.approx(loss_0, rel=tolerance)
            assert norm == pytest.approx(norm_0, rel=tolerance)


@pytest.mark.parametrize(
    ("precision", "optimizer"), [("bf16", "adamw"), ("bf16", "adamw8bit"), ("bf16", "lion8bit"), ("fp32", "adamw")]
)
def test_stages_0_and_1_move_the_masters_alike(precision, optimizer):
    """Bias correction included: one hidden step would make the first update of Adam a quarter smaller."""
    moved = []
    for stage in (0, 1):
        # One micro-batch, so that the gradients are the same.
        engine, _ = tiny_engine(*settings(stage, precision, optimizer), "train.global_batch_size=2")
        start = masters(engine)
        run_steps(engine, 0, 1, accumulation=1)
        first = masters(engine)
        run_steps(engine, 1, 1, accumulation=1)
        second = masters(engine)
        moved.append({name: torch.stack([first[name] - start[name], second[name] - first[name]]) for name in start})
    for name, expected in moved[0].items():
        error = (moved[1][name] - expected).norm() / expected.norm()
        assert error < 1e-4, (name, error)


@over_wrappers
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_bad_micro_batch_changes_nothing(stage, precision, factor):
    clean, _ = tiny_engine(*settings(stage, precision, "adamw8bit"))
    spoiled, _ = tiny_engine(*settings(stage, precision, "adamw8bit"))
    run_steps(clean, 0, 2)
    run_steps(spoiled, 0, 2)
    ((_, norm, applied),) = run_steps(spoiled, 2, 1, spoil=lambda step, micro: factor if micro == 0 else 1.0)
    assert not applied
    assert not math.isfinite(norm)
    for key, value in masters(spoiled).items():
        assert torch.equal(value, masters(clean)[key])
    assert run_steps(spoiled, 5, 2) == run_steps(clean, 5, 2)


@over_wrappers
def test_gradients_are_clipped_to_the_global_norm(stage, precision):
    moved = {}
    for clipping in (0.0, 1e-3):
        # With Adam a clipped gradient moves weights as much as another; Lion's sign too. The second step shows it.
        engine, _ = tiny_engine(
            *settings(stage, precision), f"train.gradient_clipping={clipping}", "optimizer.eps=1e-2"
        )
        start = masters(engine)
        ((_, norm, _),) = run_steps(engine, 0, 1)
        assert norm > 1.0
        moved[clipping] = max((value - start[key]).abs().max().item() for key, value in masters(engine).items())
    assert moved[1e-3] < 0.2 * moved[0.0]


@pytest.mark.parametrize(("stage", "tolerance"), [(1, 1e-6), (2, 1e-6), (3, 1e-2), (0, 3e-2)])
def test_bf16_gradients_accumulate_in_fp32_where_deepspeed_can(stage, tolerance):
    accumulation = 16
    engine, _ = tiny_engine(
        *settings(stage, "bf16"), "train.global_batch_size=32", "train.gradient_clipping=0", "train.micro_batch_size=2"
    )
    reference = tiny_model()
    for parameter in reference.parameters():  # and not the buffers, as in the engine
        parameter.data = parameter.data.bfloat16()
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in reference.named_parameters()}
    for micro in range(accumulation):
        (reference(**micro_batch(micro)) / (16 * accumulation)).backward()
        for name, parameter in reference.named_parameters():
            sums[name] += parameter.grad.double()
            parameter.grad = None
    expected = math.sqrt(sum(float((value**2).sum()) for value in sums.values()))
    ((_, norm, _),) = run_steps(engine, 0, 1, accumulation=accumulation)
    assert norm == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 5_000_000])
def test_sum_of_squares_is_that_of_fp64(size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 1e-4
    expected = values.double().square().sum()
    torch.testing.assert_close(zero_speed.sum_of_squares(values), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sum_of_squares_shows_what_is_not_finite(bad):
    values = torch.zeros(200_000)
    for place in (0, 131_072, 199_999):
        values[place] = bad
        assert not torch.isfinite(zero_speed.sum_of_squares(values))
        values[place] = 0.0


@over_wrappers
def test_buffers_stay_in_fp32(stage, precision):
    engine, _ = tiny_engine(*settings(stage, precision))
    buffers = dict(engine.module.named_buffers())
    assert buffers
    assert all(buffer.dtype == torch.float32 for buffer in buffers.values())


def test_raw_deepspeed_keys_are_merged_last():
    from dlm_dist.config import resolve_batch
    from dlm_dist.training.engine import deepspeed_config

    config = tiny_config("zero.stage=2", "deepspeed.zero_optimization.reduce_bucket_size=7", "deepspeed.seed=5")
    merged = deepspeed_config(config, resolve_batch(config.train, 1))
    assert merged["zero_optimization"]["reduce_bucket_size"] == 7
    assert merged["zero_optimization"]["memory_efficient_linear"] is False
    assert merged["seed"] == 5
