"""Which steps are refused, and that a verdict needs nothing but what a checkpoint holds."""

import json
import math

import pytest

from dlm_dist.diffusion.block_diffusion import ClipRange
from dlm_dist.training.guards import Guards, robust_deviations
from dlm_dist.training.progress import Progress


def usual(count=32):
    return [5.0 + 0.1 * math.sin(7.0 * i) for i in range(count)]


def test_deviations_are_robust():
    window = usual()
    assert robust_deviations(5.0, window) == pytest.approx(0.0, abs=0.2)
    one = robust_deviations(5.5, window)
    assert 3.0 < one < 8.0
    # A few wild values in the window move neither its middle nor its spread by much.
    assert robust_deviations(5.5, [*window[:-3], 1e3, 1e9, 1e12]) == pytest.approx(one, rel=0.3)
    assert robust_deviations(5.0 + 1e-3, [5.0] * 20) == pytest.approx(0.2)


def test_a_loss_that_is_no_number_is_always_refused():
    for loss in (math.nan, math.inf, -math.inf):
        assert Guards().refuses_loss(loss, Progress()) == "the loss is not finite"
    assert Guards().refuses_loss(1e30, Progress(losses=usual())) is None


def test_a_spike_needs_a_limit_and_a_window():
    guards = Guards(loss_spike=6.0, grad_norm_spike=6.0)
    assert guards.refuses_loss(9.0, Progress(losses=usual(15))) is None
    reason = guards.refuses_loss(9.0, Progress(losses=usual(16)))
    assert reason is not None
    assert reason.startswith("the loss, 9, lies ")
    assert guards.refuses_loss(1.0, Progress(losses=usual())) is None, "a low loss is no spike"
    assert "gradient norm" in (guards.refuses_norm(9.0, Progress(gradient_norms=usual())) or "")
    assert guards.refuses_norm(9.0, Progress(losses=usual())) is None


def test_windows_hold_what_a_limit_reads():
    progress = Progress()
    for value in range(40):
        Guards(loss_spike=6.0, window=16).remember(float(value), None, progress)
    assert progress.losses == [float(value) for value in range(24, 40)]
    assert progress.gradient_norms == []


def test_a_condemned_step_is_refused_and_no_other():
    progress = Progress(step=7, condemned={8: "spike"})
    assert Guards().refuses_loss(1.0, progress) == "spike"
    progress.step = 6
    assert Guards().refuses_loss(1.0, progress) is None


def test_progress_survives_json_to_the_bit():
    progress = Progress(3, 48, 1, 0, (ClipRange(40, 4, 0.1 + 0.2, 0.9),), [0.1 + 0.2], [1e-17], {9: "why"}, 2)
    assert Progress.from_state(json.loads(json.dumps(progress.as_state()))) == progress
