"""Figures beside those of the step itself, in a world of one: every wrapper, and what the console is told."""

from __future__ import annotations

import math

import pytest
import torch

from dlm_dist.training import rank_times, step_figures, update_figures
from dlm_dist.training.engine import gradient_norm
from dlm_dist.training.phases import PHASES, PhaseClock
from dlm_dist.training.progress import Progress
from dlm_dist.training.rank_times import RankTimes
from dlm_dist.training.step_figures import Pace, add_by_time, take_by_time
from dlm_dist.training.update_figures import UpdateMeter
from tests.training.conftest import micro_batch, run_steps, tiny_engine, tiny_model
from tests.training.test_engine import WRAPPERS, masters, settings


def autograd_norms() -> dict[str, float]:
    """Norms by role of the gradient of the first step of `run_steps`, with nothing but autograd."""
    model = tiny_model()
    roles = model.parameter_roles()
    for number in range(2):
        (model(**micro_batch(number)) / 32).backward()
    squares = dict.fromkeys(roles.values(), 0.0)
    for name, parameter in model.named_parameters():
        squares[roles[name]] += parameter.grad.double().square().sum().item()
    return {role: math.sqrt(square) for role, square in squares.items()}


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [*((*wrapper, "adamw") for wrapper in WRAPPERS), (0, "fp32", "lion8bit"), (2, "bf16", "adamw8bit")],
)
def test_norms_and_ratios_by_role_are_those_of_the_gradients_and_masters(stage, precision, optimizer):
    # The norm is far above the limit: what is clipped is not what is told.
    engine, _ = tiny_engine(*settings(stage, precision, optimizer), "train.gradient_clipping=0.01")
    roles = engine.module.parameter_roles()
    meter = UpdateMeter(engine)
    before = masters(engine)
    meter.begin()
    run_steps(engine, 0, 1, lr=0.01)
    total = gradient_norm(engine)
    found = meter.end(total, None)
    expected = autograd_norms()
    tolerance = 1e-5 if precision == "fp32" else 0.03
    assert total > 0.1
    assert found["grad_norm_by_role"] == pytest.approx(expected, rel=tolerance)
    assert sum(norm**2 for norm in found["grad_norm_by_role"].values()) == pytest.approx(total**2, rel=1e-6)
    moved, size = dict.fromkeys(expected, 0.0), dict.fromkeys(expected, 0.0)
    for (name, start), after in masters(engine).items():
        moved[roles[name]] += (after.double() - before[name, start].double()).square().sum().item()
        size[roles[name]] += before[name, start].double().square().sum().item()
    ratios = {role: math.sqrt(moved[role] / size[role]) for role in moved}
    assert found["update_ratio_by_role"] == pytest.approx(ratios, rel=1e-4)
    assert all(ratio > 1e-3 for ratio in ratios.values())


def test_steps_in_between_are_left_alone_and_the_next_is_measured_by_itself():
    engine, _ = tiny_engine("zero.stage=2")
    meter = UpdateMeter(engine)
    first = None
    for step in range(3):
        if step != 1:
            meter.begin()
        run_steps(engine, step, 1)
        if step != 1:
            figures = meter.end(gradient_norm(engine), None)["grad_norm_by_role"]
            assert math.hypot(*figures.values()) == pytest.approx(gradient_norm(engine), rel=1e-6)
            assert figures != first
            first = figures
        assert not meter._begun


def test_ratios_of_large_roles_are_estimated_from_some_of_their_elements(monkeypatch):
    figures = []
    for limit in (1 << 20, 1 << 10):
        monkeypatch.setattr(update_figures, "SAMPLED_FROM", limit)
        engine, _ = tiny_engine("zero.stage=1", model=tiny_model())
        meter = UpdateMeter(engine)
        run_steps(engine, 0, 3)
        meter.begin()
        run_steps(engine, 3, 1)
        figures.append(meter.end(gradient_norm(engine), None))
    exact, sampled = figures
    assert sampled["grad_norm_by_role"] == exact["grad_norm_by_role"]
    # 33,000 elements of the matrices, of which 540 are looked at: a standard error of 3 %.
    assert sampled["update_ratio_by_role"]["matrix"] != exact["update_ratio_by_role"]["matrix"]
    assert sampled["update_ratio_by_role"]["matrix"] == pytest.approx(exact["update_ratio_by_role"]["matrix"], rel=0.12)
    assert sampled["update_ratio_by_role"]["vector"] == exact["update_ratio_by_role"]["vector"]


def test_a_rank_that_stays_slow_is_named_once_a_window():
    told: list[str] = []
    times = RankTimes(["a", "b", "b"], told.append, window=10)
    for step in range(20):
        record = times.step([0.1, 0.1, 0.2 if step % 4 else 0.1], step_seconds=0.5)
    assert record == {
        "rank_seconds": {"min": 0.1, "median": 0.1, "max": 0.2},
        "slowest_rank": 2,
        "slowest_host": "b",
    }
    assert len(told) == 2
    assert "rank 2 on b holds the others up: in 7 of 10 steps" in told[0]


@pytest.mark.parametrize(
    "seconds",
    [
        lambda step: [0.1, 0.2 if step % 2 else 0.1, 0.1],  # half of the steps
        lambda step: [0.1, 0.14, 0.1],
        lambda step: [0.3 if step % 3 == rank else 0.1 for rank in range(3)],  # now this one, now that one
        lambda step: [0.001, 0.002, 0.001],  # of 0.5 s
    ],
)
def test_ranks_that_are_not_always_the_slowest_are_not_named(seconds):
    told: list[str] = []
    times = RankTimes(["a"] * 3, told.append, window=10)
    for step in range(20):
        times.step(seconds(step), step_seconds=0.5)
    assert told == []


def test_of_two_ranks_the_slower_is_named():
    told: list[str] = []
    times = RankTimes(["a", "b"], told.append, window=rank_times.WINDOW)
    for _ in range(rank_times.WINDOW):
        times.step([0.1, 0.2], step_seconds=0.5)
    assert ["rank 1" in line for line in told] == [True]


def test_the_time_left_follows_the_last_steps(monkeypatch):
    now = iter([0.0, 2.0, 4.0, 6.0, 100.0, 101.0, 102.0])
    monkeypatch.setattr(step_figures.time, "perf_counter", lambda: next(now))
    pace = Pace(max_steps=10)
    assert pace.seconds_left(1) is None
    assert [pace.seconds_left(step) for step in (2, 3, 4)] == [16.0, 14.0, 12.0]
    assert pace.seconds_left(2) is None  # a rollback: what lies before it says nothing
    assert [pace.seconds_left(step) for step in (3, 4)] == [7.0, 6.0]


def test_losses_by_time_are_sums_over_the_steps_since_the_last_record():
    progress = Progress()
    assert take_by_time(progress) is None
    add_by_time(progress, [1.0, 2.0] + [0.0] * 8, [2, 1] + [0] * 7 + [4])
    # Through a checkpoint in between.
    progress = Progress.from_state(progress.as_state())
    add_by_time(progress, [2.0, 0.0] + [0.0] * 8, [4, 0] + [0] * 8)
    found = take_by_time(progress)
    assert found is not None
    assert found["0.0-0.1"] == 0.5
    assert found["0.1-0.2"] == 2.0
    assert found["0.2-0.3"] is None
    assert found["0.9-1.0"] == 0.0
    assert take_by_time(progress) is None


def test_phases_sum_to_the_time_that_has_passed(monkeypatch):
    now = iter(float(value) for value in (0, 1, 3, 6, 10, 15, 15, 21))
    monkeypatch.setattr("dlm_dist.training.phases.time.perf_counter", lambda: next(now))
    clock = PhaseClock(torch.device("cpu"))
    clock.enter("data")
    clock.enter("forward")
    with clock.during("wait"):
        pass
    assert clock.so_far()["forward"] == 3.0 + 5.0
    found = clock.take()
    assert found == {**dict.fromkeys(PHASES, 0.0), "data": 2.0, "forward": 8.0, "wait": 4.0, "other": 1.0}
    assert clock.take()["forward"] == 6.0
