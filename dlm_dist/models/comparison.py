"""Two sets of weights side by side, tensor by tensor, under our names wherever they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlm_dist.models.conversion import TIED_EMBEDDING, TIED_HEAD, read_safetensors, read_tensor_file
from dlm_dist.models.conversion_blinkdl import read_pth
from dlm_dist.models.conversion_fla import UNUSED_FILE, looks_like_fla, our_tensors

# Differences are taken in fp64, so many values at a time.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Side:
    """One tensor of one side: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Difference:
    """What the two sides have under `name`; None where a side has nothing.

    status: "equal", "shape", "dtype", "values", "only a" or "only b". largest: the largest absolute difference of two
    values; None where they were not compared or cannot be, nan where only one side is not a number.
    """

    name: str
    a: Side | None
    b: Side | None
    status: str
    largest: float | None = None


def compare(a: Path, b: Path, values: bool = False) -> list[Difference]:
    """Every tensor of the weights at `a` and `b`, in the order of `a`, then those of `b` alone.

    Without `values` only names, shapes and dtypes are compared. Raises ValueError where one holds no weights.
    """
    left, right = read_any(a), read_any(b)
    names = [*left, *(name for name in right if name not in left)]
    return [_difference(name, left.get(name), right.get(name), values) for name in names]


def read_any(path: Path) -> dict[str, Tensor]:
    """The tensors at `path` under our names, on the CPU, in the dtypes they have there.

    `path` is a checkpoint of ours, a folder with safetensors (ours, fla's, Qwen3's or any other), a safetensors file,
    or a .pth. Names of no known layout are left as they are. A head that config.json ties to the embedding is there
    also where it was not stored. Raises ValueError where there are no weights.
    """
    if path.is_file():
        tensors = read_tensor_file(path) if path.suffix == ".safetensors" else read_pth(path)
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{path}: {name} is of type {type(tensor).__name__}, and only tensors are compared.")
        return our_tensors(tensors) if looks_like_fla(tensors) else tensors
    folder = path / "model" if (path / "model").is_dir() else path
    if not folder.is_dir():
        raise ValueError(f"{path}: there is no such file or folder.")
    tensors = read_safetensors(folder)
    if (folder / UNUSED_FILE).is_file():
        tensors |= read_tensor_file(folder / UNUSED_FILE)
    if looks_like_fla(tensors):
        return our_tensors(tensors)
    if _says_tied(folder) and TIED_EMBEDDING in tensors:
        tensors.setdefault(TIED_HEAD, tensors[TIED_EMBEDDING])
    return tensors


def _says_tied(folder: Path) -> bool:
    file = folder / "config.json"
    if not file.is_file():
        return False
    try:
        fields: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    return isinstance(fields, Mapping) and fields.get("tie_word_embeddings") is True


def _difference(name: str, a: Tensor | None, b: Tensor | None, values: bool) -> Difference:
    left, right = _side(a), _side(b)
    if a is None or b is None:
        return Difference(name, left, right, "only b" if a is None else "only a")
    if a.shape != b.shape:
        return Difference(name, left, right, "shape")
    largest = _largest_difference(a, b) if values else None
    if a.dtype != b.dtype:
        return Difference(name, left, right, "dtype", largest)
    return Difference(name, left, right, "values" if largest else "equal", largest)


def _side(tensor: Tensor | None) -> Side | None:
    return None if tensor is None else Side(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| in fp64; 0 where both are the same infinity or no number; nan where only one is no number."""
    largest = 0.0
    for left, right in zip(a.flatten().split(_CHUNK), b.flatten().split(_CHUNK), strict=True):
        if left.dtype == right.dtype and torch.equal(left, right):
            continue
        x, y = left.double(), right.double()
        same = (x == y) | (x.isnan() & y.isnan())
        gap = (x - y).abs().masked_fill(same, 0.0).max().item()
        if gap != gap:
            return gap
        largest = max(largest, gap)
    return largest
