"""Figures of a step over real ranks: those of one process that holds the whole batch, whatever the stage."""

from __future__ import annotations

import math

import pytest
import torch

from dlm_dist.diffusion.time_buckets import TIME_BUCKETS, bucket_name
from tests.distributed import runs
from tests.distributed.figures_worker import LATE, MICRO_BATCHES, STEPS, buckets_of
from tests.training.conftest import micro_batch, tiny_model

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

QUICK = ["2-fp32", "3-fp32"]
OTHERS = [
    f"{stage}-{precision}"
    for stage in range(4)
    for precision in ("fp32", "bf16")
    if f"{stage}-{precision}" not in QUICK
]


@pytest.fixture(scope="module")
def expected():
    """Norms by role, and loss by bucket of time, of the first step; with nothing but autograd."""
    model = tiny_model()
    roles, nats, tokens = model.parameter_roles(), [0.0] * TIME_BUCKETS, [0] * TIME_BUCKETS
    for number in range(MICRO_BATCHES):
        batch = micro_batch(number)
        total, losses = model(**batch, per_row=True)
        (total / (16 * MICRO_BATCHES)).backward()
        for bucket, loss in zip(buckets_of(number).tolist(), losses.tolist(), strict=True):
            nats[bucket] += loss
            tokens[bucket] += 1
    squares = dict.fromkeys(roles.values(), 0.0)
    for name, parameter in model.named_parameters():
        squares[roles[name]] += parameter.grad.double().square().sum().item()
    norms = {role: math.sqrt(square) for role, square in squares.items()}
    assert [i for i in range(TIME_BUCKETS) if not tokens[i]] == [TIME_BUCKETS - 1]
    return norms, {bucket_name(i): nats[i] / tokens[i] for i in range(TIME_BUCKETS - 1)}


@pytest.mark.parametrize(
    ("ranks", "wrappers"),
    [
        (2, QUICK),
        pytest.param(2, OTHERS, marks=pytest.mark.slow),
        pytest.param(4, ["1-fp32", "3-bf16"], marks=pytest.mark.slow),
    ],
)
def test_figures_are_those_of_the_whole_batch_and_the_late_rank_is_named(ranks, wrappers, expected, tmp_path):
    runs.run_workers("tests.distributed.figures_worker", ranks, tmp_path, *wrappers)
    results = torch.load(tmp_path / "figures.pt", weights_only=True)
    assert list(results) == wrappers
    norms, losses = expected
    for wrapper, found in results.items():
        first, *_ = found["records"]
        tolerance = 1e-5 if wrapper.endswith("fp32") else 0.03
        assert first["grad_norm_by_role"] == pytest.approx(norms, rel=tolerance), wrapper
        assert math.hypot(*first["grad_norm_by_role"].values()) == pytest.approx(first["grad_norm"], rel=1e-6)
        assert first["grad_norm"] > 0.1  # clipped to 0.01
        assert first["update_ratio_by_role"] == pytest.approx(found["ratios"], rel=1e-4), wrapper
        by_time = first["loss_by_time"]
        assert by_time.pop("0.9-1.0") is None
        assert by_time == pytest.approx(losses, rel=tolerance), wrapper
        mean = sum(
            value * sum((buckets_of(number) == index).sum().item() for number in range(MICRO_BATCHES))
            for index, value in enumerate(by_time.values())
        )
        assert mean / (16 * MICRO_BATCHES) == pytest.approx(first["loss"], rel=1e-6)
        assert len(found["records"]) == STEPS
        for record in found["records"]:
            assert record["slowest_rank"] == ranks - 1
            assert record["slowest_host"] == "here"
            assert record["rank_seconds"]["min"] < LATE <= record["rank_seconds"]["max"]
            assert record["rank_seconds"]["median"] < LATE
            assert record["tokens_seen"] == record["step"] * 16 * MICRO_BATCHES
        assert len(found["told"]) == 1, wrapper
        assert f"rank {ranks - 1} on here holds the others up: in {STEPS} of {STEPS} steps" in found["told"][0]
