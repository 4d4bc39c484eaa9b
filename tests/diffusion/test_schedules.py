"""Every schedule: rises from 0 to 1, and its derivative and inverse are those of its rate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_dist.diffusion.schedules import ALIASES, SCHEDULES, Schedule, make_schedule

PARAMETERS = {
    "linear": st.just({}),
    "cosine": st.just({}),
    "cosine_squared": st.just({}),
    "power": st.fixed_dictionaries({"exponent": st.floats(0.5, 8.0)}),
    "sigmoid": st.fixed_dictionaries({"steepness": st.floats(0.1, 30.0)}),
    "geometric": st.fixed_dictionaries({"sigma_min": st.floats(1e-5, 0.5), "sigma_max": st.floats(1.0, 25.0)}),
    "table": st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6).map(
        lambda steps: {"points": [0.0, *(np.cumsum(steps[:-1]) / sum(steps)).tolist(), 1.0]}
    ),
}


def test_all_schedules_are_tested():
    assert PARAMETERS.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_contract(name, data):
    schedule = make_schedule(name, **data.draw(PARAMETERS[name]))
    t = np.linspace(0.0, 1.0, 1001)
    rates = schedule.rate(t)
    assert abs(rates[[0, -1]] - [0, 1]).max() < 1e-12
    assert (np.diff(rates) > 0).all()
    assert ((rates >= 0) & (rates <= 1)).all()
    # Times come back except where the rate is so flat that neighbouring times share a rate in 53 bits.
    middle = (rates > 1e-6) & (rates < 1 - 1e-6)
    assert abs(schedule.inverse(rates) - t)[middle].max() < 1e-6
    assert abs(schedule.inverse(np.array([0.0, 1.0])) - [0, 1]).max() < 1e-5
    assert abs(schedule.rate(schedule.inverse(rates)) - rates).max() < 1e-12
    # The integral of the derivative over any stretch is the rise of the rate (exact for the corners of a table).
    edges = np.linspace(0.05, 1.0, 20)
    fine = edges[:-1, None] + (np.arange(4000) + 0.5) / 4000 * np.diff(edges)[:, None]
    rise = schedule.derivative(fine).mean(axis=1) * np.diff(edges)
    assert np.allclose(rise, np.diff(schedule.rate(edges)), rtol=2e-3, atol=1e-9)


def test_formulas():
    t = np.array([0.25, 0.5, 0.8])
    expected = {
        "linear": t,
        "cosine": 1 - np.cos(np.pi * t / 2),
        "cosine_squared": (1 - np.cos(np.pi * t)) / 2,
        "power": t**2,
        "sigmoid": (1 / (1 + np.exp(-12 * (t - 0.5))) - 1 / (1 + np.exp(6)))
        / (1 / (1 + np.exp(-6)) - 1 / (1 + np.exp(6))),
        "geometric": (np.exp(-1e-4) - np.exp(-(1e-4 ** (1 - t)) * 20**t)) / (np.exp(-1e-4) - np.exp(-20)),
        "table": np.array([0.05, 0.1, 0.64]),
    }
    for name, rates in expected.items():
        parameters = {"points": [0.0, 0.1, 1.0]} if name == "table" else {}
        assert np.allclose(make_schedule(name, **parameters).rate(t), rates, rtol=1e-12, atol=0)
    assert {make_schedule(alias).name for alias in ALIASES} == {"linear"}


@pytest.mark.parametrize(
    ("name", "parameters", "sentence"),
    [
        ("table", {"points": [0.0, 0.6, 0.5, 1.0]}, "does not rise at t = 0.333"),
        ("table", {"points": [0.0, 0.5, 0.5, 1.0]}, "does not rise at t = 0.333"),
        ("table", {"points": [0.1, 1.0]}, "hides a share of 0.1 at t = 0 and 1 at t = 1: expected 0 and 1"),
        (
            "table",
            {"points": [0.0, 1.2, 1.0]},
            "hides shares from 0 to 1.2 of the tokens: expected shares within 0 and",
        ),
        ("table", {"points": [0.0]}, "has 1 points: expected at least two"),
        ("power", {"exponent": -1.0}, "has exponent -1.0"),
        ("sigmoid", {"steepness": 0.0}, "has steepness 0.0"),
        ("geometric", {"sigma_min": 2.0, "sigma_max": 1.0}, "has sigma from 2.0 to 1.0"),
        ("quadratic", {}, "The schedule quadratic does not exist: expected one of cosine"),
    ],
)
def test_what_is_no_schedule_is_refused(name, parameters, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_schedule(name, **parameters)


def test_a_schedule_of_ones_own_is_checked_too():
    with pytest.raises(ValueError, match=r"does not rise at t = 0\.5"):
        Schedule("hill", "4 t (1 - t)", lambda t: np.where(t < 1, 4 * t * (1 - t), 1), np.ones_like, np.copy)
