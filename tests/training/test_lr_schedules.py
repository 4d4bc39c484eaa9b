import math
from itertools import pairwise

import pytest

from dlm_dist.training.lr_schedules import SCHEDULES, Course, lr_factor


def factors(name: str, *, max_steps: int, **course) -> list[float]:
    return [lr_factor(name, step, Course(max_steps, **course)) for step in range(max_steps)]


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"rwkv"}))
def test_warm_up_then_the_schedule_from_peak_to_floor(name):
    decay = 30 if name in ("wsd", "inverse_sqrt") else None
    found = factors(name, max_steps=100, warmup_steps=10, min_lr_ratio=0.1, decay_steps=decay)
    assert found[:10] == [(step + 1) / 10 for step in range(10)]
    assert found[10] == (pytest.approx(math.sqrt(10 / 11)) if name == "inverse_sqrt" else 1.0)
    assert found[-1] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert all(a >= b for a, b in pairwise(found[10:]))


def test_shapes():
    middle = {name: lr_factor(name, 50, Course(101)) for name in ("constant", "linear", "cosine")}
    assert middle == {"constant": 1.0, "linear": pytest.approx(0.5), "cosine": pytest.approx(0.5)}
    assert lr_factor("cosine", 25, Course(101)) == pytest.approx(0.5 + 0.5 * 0.5**0.5)


def test_wsd_falls_in_a_line_over_its_last_steps():
    found = factors("wsd", max_steps=101, warmup_steps=10, decay_steps=20)
    assert found[10:81] == [1.0] * 71
    assert found[81:] == pytest.approx([1 - k / 20 for k in range(1, 21)])
    short = Course(30, warmup_steps=10, decay_steps=500)
    assert lr_factor("wsd", 12, short) < 1.0, "the decay begins after the warm-up at the soonest"


def test_inverse_sqrt_does_not_know_the_end_unless_it_decays():
    long, short = Course(1000, 16), Course(100, 16)
    assert [lr_factor("inverse_sqrt", s, long) for s in range(100)] == factors(
        "inverse_sqrt", max_steps=100, warmup_steps=16
    )
    assert lr_factor("inverse_sqrt", 63, short) == pytest.approx(0.5)
    assert lr_factor("inverse_sqrt", 10**6, Course(10, 16, min_lr_ratio=0.25)) == 0.25
    decayed = factors("inverse_sqrt", max_steps=100, warmup_steps=16, decay_steps=20)
    assert decayed[:80] == factors("inverse_sqrt", max_steps=100, warmup_steps=16)[:80]
    assert decayed[79:] == pytest.approx([decayed[79] * (1 - k / 20) for k in range(21)])


def test_rwkv_is_that_of_rwkv_lm():
    """As train_temp's trainer.py computes it: cosine over tokens behind the warm-up's, times the warm-up."""
    steps, warmup, final = 200, 10, 0.1
    tokens_per_step, exit_tokens = 16 * 512, 200 * 16 * 512

    def theirs(step):
        progress = (step * tokens_per_step - warmup * tokens_per_step) / (exit_tokens - warmup * tokens_per_step)
        progress = max(0, min(1, progress))
        factor = (0.5 + final / 2) + (0.5 - final / 2) * math.cos(math.pi * progress)
        return factor * (0.01 + 0.99 * step / warmup) if step < warmup else factor

    found = factors("rwkv", max_steps=steps, warmup_steps=warmup, min_lr_ratio=final)
    assert found == pytest.approx([theirs(step) for step in range(steps)])
    assert found[0] == pytest.approx(0.01)


def test_a_stable_phase_is_the_same_whatever_end_it_is_given():
    """So a decay may begin at any checkpoint of the stable phase, by another max_steps."""
    for name in ("wsd", "inverse_sqrt"):
        stable = factors(name, max_steps=1000, warmup_steps=10, decay_steps=100)
        early = factors(name, max_steps=400, warmup_steps=10, decay_steps=100)
        assert stable[:300] == early[:300]
        assert early[-1] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_beyond_the_end_and_without_room(name):
    decay = 5 if name == "wsd" else None
    assert lr_factor(name, 500, Course(100, 0, 0.2, decay)) == pytest.approx(1.0 if name == "constant" else 0.2)
    assert lr_factor(name, 0, Course(1, 0, 0.2, decay)) == 1.0
    assert 0.0 < lr_factor(name, 4, Course(5, 5, 0.2, decay)) <= 1.0
