"""Kinds of values that several sections of the configuration share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field


def _whole(value: object) -> object:
    """A float without a fraction as an int, so that `max_steps: 1e4` is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("empty")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
NonNegative = Annotated[Whole, Field(ge=0)]
Positive = Annotated[Whole, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Location = Annotated[Path, BeforeValidator(_not_empty)]
