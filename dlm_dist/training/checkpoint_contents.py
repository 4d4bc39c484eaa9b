"""The masters and optimizer states of a checkpoint by parameter, whatever layout of ranks wrote them.

For looking at checkpoints and exporting them: what a run loads goes from shard to shard (elastic.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dlm_dist.training.checkpoint_files import CheckpointError
from dlm_dist.training.elastic import SavedShard, SavedShards
from dlm_dist.training.pieces import Piece

WINDOW = 2**22
"""Elements that are held at a time."""


@dataclass(frozen=True)
class Difference:
    """One tensor of two checkpoints that is not the same in both."""

    parameter: str
    what: str
    """`weight` (the dtype of training), `master`, `ema`, or an optimizer state's name (8-bit ones by their values)."""
    largest: float | None
    """Largest absolute difference; None where only one has it, or the shapes differ."""


class Contents:
    """A checkpoint, read by parameter. Raises CheckpointError where its parts do not fit together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = json.loads((path / "model" / "config.json").read_bytes())
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file in sorted((path / "model").glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
                    self._files[name] = file
        self._shards = SavedShards(path, {name: math.prod(shape) for name, shape in self.shapes.items()})

    def require(self, what: str) -> None:
        """Raise CheckpointError where there is no `what`, "weight", "master" or "ema", of the parameters."""
        if what == "ema" and not self._shards.has_ema:
            raise CheckpointError(f"{self.path} holds no EMA: its run had no train.ema_half_life")

    def read(self, name: str, what: str) -> torch.Tensor:
        """A parameter's weight, master or average, whole, as fp32 in its shape."""
        return torch.cat(list(self.windows(name, what))).view(self.shapes[name])

    def tensors(self, name: str) -> list[str]:
        """What there is of a parameter, for `windows`."""
        holder = self._holder(name)
        states = holder.tensors
        averages = ["ema"] if holder.ema else []
        return ["weight", "master", *averages, *(state for state in states if not state.startswith(("absmax", "qmap")))]

    def windows(self, name: str, what: str) -> Iterator[torch.Tensor]:
        """The elements of a parameter's weight, master or state as fp32, in order, a window at a time."""
        if what == "weight":
            with safe_open(self._files[name], framework="pt") as tensors:
                flat = tensors.get_tensor(name).view(-1)
            for first in range(0, len(flat), WINDOW):
                yield flat[first : first + WINDOW].float()
        elif what == "step":
            yield self._shards.whole(self._holder(name), what).float().view(-1)
        else:
            yield from self._windows(name, what)

    def _holder(self, name: str) -> SavedShard:
        """The shard that holds the first element of a parameter."""
        return self._shards.runs([Piece(name, 0, 0, 1)])[0].saved

    def _windows(self, name: str, what: str) -> Iterator[torch.Tensor]:
        size = math.prod(self.shapes[name])
        for first in range(0, size, WINDOW):
            out = torch.empty(min(WINDOW, size - first))
            for run in self._shards.runs([Piece(name, first, 0, len(out))]):
                out[run.to : run.to + run.numel] = self._shards.values(run, what)
            yield out


def differences(a: Contents, b: Contents) -> Iterator[Difference]:
    """Every tensor that is not bit for bit the same number in both, by parameter."""
    for name in sorted({*a.shapes, *b.shapes}):
        if a.shapes.get(name) != b.shapes.get(name):
            yield Difference(name, "weight", None)
            continue
        mine, theirs = a.tensors(name), b.tensors(name)
        for what in dict.fromkeys([*mine, *theirs]):
            if what not in mine or what not in theirs:
                yield Difference(name, what, None)
                continue
            pairs = zip(a.windows(name, what), b.windows(name, what), strict=True)
            largest = max((_largest(one, other) for one, other in pairs), default=0.0)
            if largest:
                yield Difference(name, what, largest)


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference; inf where one is no number and the other is."""
    unlike = (one != other) & ~(one.isnan() & other.isnan())
    return float((one - other)[unlike].abs().nan_to_num(math.inf).max()) if bool(unlike.any()) else 0.0
