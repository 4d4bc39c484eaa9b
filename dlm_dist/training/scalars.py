"""A record of metrics.jsonl or evaluations.jsonl as numbers by name, for programs that draw curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Every finite number of `record` but its step, by name: "loss", and what is nested as "by_role/matrix".

    Parts of [0, 1] as evaluations have them, {"first", "last", "draws", "nats_per_token"}, become
    "loss_by_time/0.0-0.1". Text, null and lists of numbers make no curve.
    """
    return {name: value for name, value in _numbers(record) if name != "step"}


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, (int, float)):
            if math.isfinite(value):
                yield name, float(value)
        elif isinstance(value, Mapping):
            yield from _numbers(value, f"{name}/")
        elif isinstance(value, list):
            for bucket in value:
                if isinstance(bucket, Mapping) and bucket["draws"]:
                    yield f"{name}/{bucket['first']:.1f}-{bucket['last']:.1f}", bucket["nats_per_token"]
