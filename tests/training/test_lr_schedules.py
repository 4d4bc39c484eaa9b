from itertools import pairwise

import pytest

from dlm_dist.training.lr_schedules import SCHEDULES, lr_factor


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_warm_up_then_the_schedule_from_peak_to_floor(name):
    factors = [lr_factor(name, step, 100, warmup_steps=10, min_lr_ratio=0.1, decay_steps=30) for step in range(100)]
    assert factors[:10] == [(step + 1) / 10 for step in range(10)]
    assert factors[10] == 1.0
    assert factors[-1] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_shapes():
    middle = {name: lr_factor(name, 50, 101, 0, 0.0, 25) for name in SCHEDULES}
    assert middle == {"constant": 1.0, "linear": pytest.approx(0.5), "cosine": pytest.approx(0.5), "wsd": 1.0}
    assert lr_factor("cosine", 25, 101, 0, 0.0) == pytest.approx(0.5 + 0.5 * 0.5**0.5)


def test_wsd_falls_in_a_line_over_its_last_steps():
    factors = [lr_factor("wsd", step, 101, 10, 0.0, decay_steps=20) for step in range(101)]
    assert factors[10:81] == [1.0] * 71
    assert factors[81:] == pytest.approx([1 - k / 20 for k in range(1, 21)])
    assert lr_factor("wsd", 12, 30, 10, 0.0, decay_steps=500) < 1.0, "the decay begins after the warm-up at the soonest"


def test_beyond_the_end_and_without_room():
    assert lr_factor("linear", 500, 100, 0, 0.2) == pytest.approx(0.2)
    assert lr_factor("linear", 0, 1, 0, 0.2) == 1.0
    assert lr_factor("cosine", 4, 5, 5, 0.2) == 1.0
