"""A model folder as `from_pretrained` reads it, written from the tensors of checkpoints, a window at a time.

Its weights are those of one checkpoint (as trained, the fp32 masters, their EMA) or the mean of several; origin.json
beside them says which.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dlm_dist.training.checkpoint_contents import Contents
from dlm_dist.training.checkpoint_files import MANIFEST, ORIGIN, load_trainer_state
from dlm_dist.training.durable_files import file_sha256
from dlm_dist.training.safetensors_files import model_index, plan_model_files, safetensors_header

WEIGHTS = {"trained": "weight", "master": "master", "ema": "ema"}
"""Names of the copies of the weights in a checkpoint, for people -> in `Contents`."""


def write_model(
    folder: Path, contents: Sequence[Contents], coefficients: Sequence[float], weights: str, dtype: torch.dtype
) -> None:
    """Write the mean of `weights` ("trained", "master" or "ema") over checkpoints of one model into the new `folder`.

    Whatever the order of the checkpoints and `coefficients`, the bytes are the same. Holds one window of elements of
    each checkpoint at a time. The tokenizer is that of the first checkpoint. Raises CheckpointError where one of them
    has no EMA to give.
    """
    parts = sorted(zip(contents, coefficients, strict=True), key=_content_first)
    for one, _ in parts:
        one.require(WEIGHTS[weights])
    folder.mkdir(parents=True)
    shapes = parts[0][0].shapes
    _write_weights(folder, shapes, lambda name: _mean(parts, name, WEIGHTS[weights]), dtype)
    _write_json(folder / "config.json", parts[0][0].config | {"dtype": _name(dtype)})
    tokenizer = contents[0].path / "tokenizer"
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, folder / "tokenizer")
        if (tokenizer / "tokenizer.json").is_file():
            # Where AutoTokenizer looks.
            shutil.copy(tokenizer / "tokenizer.json", folder)
    _write_json(folder / ORIGIN, _origin(contents, coefficients, weights, dtype))


def _content_first(part: tuple[Contents, float]) -> tuple[str, float]:
    """By what a checkpoint holds, not by its name: sums in fp64 come out the same in any order of the arguments."""
    return file_sha256(part[0].path / MANIFEST), part[1]


def _mean(parts: Sequence[tuple[Contents, float]], name: str, what: str) -> Iterator[torch.Tensor]:
    """The mean of a parameter over checkpoints, summed in fp64, as fp32 windows."""
    total = math.fsum(coefficient for _, coefficient in parts)
    for windows in zip(*(contents.windows(name, what) for contents, _ in parts), strict=True):
        if len(windows) == 1:
            yield windows[0]
            continue
        mean = torch.zeros(len(windows[0]), dtype=torch.float64)
        for (_, coefficient), window in zip(parts, windows, strict=True):
            mean += coefficient * window.double()
        yield (mean / total).float()


def _write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    windows: Callable[[str], Iterator[torch.Tensor]],
    dtype: torch.dtype,
) -> None:
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    plan = plan_model_files(sizes.items())
    for file, names in plan.items():
        with open(folder / file, "xb") as out:
            out.write(safetensors_header({name: (dtype, shapes[name]) for name in names}))
            for name in names:
                for window in windows(name):
                    out.write(window.to(dtype).view(torch.uint8).numpy().data)
            out.flush()
            os.fsync(out.fileno())
    if len(plan) > 1:
        (folder / "model.safetensors.index.json").write_bytes(model_index(plan, sum(sizes.values())))


def _origin(
    contents: Sequence[Contents], coefficients: Sequence[float], weights: str, dtype: torch.dtype
) -> dict[str, Any]:
    total = math.fsum(coefficients)
    states = [load_trainer_state(one.path) for one in contents]
    checkpoints = [
        {
            "path": str(one.path.resolve()),
            "manifest_sha256": file_sha256(one.path / MANIFEST),
            "global_step": state["global_step"],
            "share": coefficient / total,
        }
        for one, state, coefficient in zip(contents, states, coefficients, strict=True)
    ]
    newest = max(states, key=lambda state: state["global_step"])
    return {"weights": weights, "dtype": _name(dtype), "checkpoints": checkpoints, "trainer_state": newest}


def stored_dtype(contents: Contents) -> torch.dtype:
    """The dtype of a checkpoint's model/."""
    dtype: torch.dtype = getattr(torch, contents.config["dtype"])
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


@torch.no_grad()
def put_weights(model: Any, contents: Contents, weights: str) -> None:
    """Give a `model` of a checkpoint its masters or their EMA, rounded to the dtype of its parameters.

    Raises CheckpointError where the checkpoint has no EMA.
    """
    contents.require(WEIGHTS[weights])
    for name, parameter in model.named_parameters():
        parameter.copy_(contents.read(name, WEIGHTS[weights]))
