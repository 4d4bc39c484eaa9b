"""Learning-rate schedules: each a pure function of the step, never of what ran before.

Nothing of a schedule is in a checkpoint. So a run may be made longer, or its decay begun from any checkpoint of the
stable phase, by giving another `train.max_steps` at the resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Course:
    """What a schedule is a function of besides the step; see `optimizer` in docs and dlm_dist/config.py."""

    max_steps: int
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    decay_steps: int | None = None


def lr_factor(name: str, step: int, course: Course) -> float:
    """Factor on the peak learning rate for `step` (0-based, the step about to be taken)."""
    return SCHEDULES[name](step, course)


def _constant(step: int, course: Course) -> float:
    """1 after the warm-up."""
    return _rise(step, course)


def _linear(step: int, course: Course) -> float:
    """A straight line from 1 at the end of the warm-up to `min_lr_ratio` at the last step."""
    return _rise(step, course) * _line(_progress(step, course, course.warmup_steps), course.min_lr_ratio)


def _cosine(step: int, course: Course) -> float:
    """Half a cosine from 1 at the end of the warm-up to `min_lr_ratio` at the last step."""
    return _rise(step, course) * _half_cosine(_progress(step, course, course.warmup_steps), course.min_lr_ratio)


def _wsd(step: int, course: Course) -> float:
    """Warm-up, stable, decay: 1 until `decay_steps` before the end, from there a line to `min_lr_ratio`."""
    assert course.decay_steps is not None
    return _rise(step, course) * _line(_progress(step, course, _decay_start(course)), course.min_lr_ratio)


def _inverse_sqrt(step: int, course: Course) -> float:
    """sqrt(w / n) at the n-th step, w = `warmup_steps` (at least 1), never below `min_lr_ratio`.

    It does not know the end of the run; with `decay_steps` it falls in a line to `min_lr_ratio` over the last of them.
    """
    w = max(1, course.warmup_steps)

    def root(at: int) -> float:
        return max(course.min_lr_ratio, math.sqrt(w / max(w, at + 1)))

    if course.decay_steps is None:
        return _rise(step, course) * root(step)
    start = _decay_start(course)
    level = root(min(step, start))
    return _rise(step, course) * (level + (min(level, course.min_lr_ratio) - level) * _progress(step, course, start))


def _rwkv(step: int, course: Course) -> float:
    """RWKV-LM's (RWKV-v7/train_temp): a half cosine from the end of the warm-up to `min_lr_ratio` after the last step,
    times a warm-up from 0.01."""
    first, last = course.warmup_steps, course.max_steps
    progress = min(1.0, max(0.0, (step - first) / max(1, last - first)))
    rise = 0.01 + 0.99 * step / first if step < first else 1.0
    return rise * _half_cosine(progress, course.min_lr_ratio)


SCHEDULES: dict[str, Callable[[int, Course], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "rwkv": _rwkv,
}


def _rise(step: int, course: Course) -> float:
    """Linear warm-up: the first step has 1 / `warmup_steps` of the peak, the last one the peak."""
    return min(1.0, (step + 1) / max(1, course.warmup_steps))


def _decay_start(course: Course) -> int:
    """The last step before the decay."""
    assert course.decay_steps is not None
    return max(course.warmup_steps, course.max_steps - 1 - course.decay_steps)


def _progress(step: int, course: Course, first: int) -> float:
    """0 up to step `first`, 1 at the last step and behind it."""
    return min(1.0, max(0.0, (step - first) / max(1, course.max_steps - 1 - first)))


def _line(progress: float, floor: float) -> float:
    return 1.0 - (1.0 - floor) * progress


def _half_cosine(progress: float, floor: float) -> float:
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
