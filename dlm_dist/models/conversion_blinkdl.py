"""BlinkDL's layout of RWKV-7 (x070): one `.pth` with a flat dictionary of tensors, and no configuration.

His names are ours, so only the sizes have to be found: they follow from the shapes, also where the low-rank maps
have the ranks of an older rule or of nobody's.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlm_dist.models.conversion import (
    Weights,
    check_tensors,
    expected_shapes,
    fill_unused,
    require_causal_rwkv7,
    staged,
)
from dlm_dist.models.rwkv7 import RWKV7Config

SUFFIX = ".pth"


def read_blinkdl(path: Path) -> Weights[RWKV7Config]:
    """The weights in the `.pth` file `path`, in the dtypes they have there, mapped into memory.

    No code in it is run. Raises ValueError where it is no such file, damaged, of another RWKV version, or where a
    tensor is missing, misshapen or unknown, which is named with its shape and the one expected.
    """
    tensors = read_pth(path)
    _refuse_other_versions(tensors, path)
    config = config_from_shapes(tensors, path)
    whole, notes = fill_unused(config, tensors)
    expected = expected_shapes(config)
    check_tensors(whole, expected, path)
    return Weights(config, {name: whole[name] for name in expected}, notes)


def write_blinkdl(weights: Weights[RWKV7Config], destination: Path) -> None:
    """Write `destination`, a new file whose name ends with `.pth`.

    Raises ValueError where it exists or the weights are not those of a causal RWKV-7.
    """
    require_causal_rwkv7(weights.config)
    if destination.suffix != SUFFIX:
        raise ValueError(f"{destination} does not end with {SUFFIX}, which programs for RWKV files expect.")
    # Through an open file, since torch.save writes the name of a path into what it saves.
    with staged(destination) as path, open(path, "wb") as file:
        torch.save({name: _alone(tensor) for name, tensor in weights.tensors.items()}, file)


def _alone(tensor: Tensor) -> Tensor:
    """A plain tensor with a storage of just its size: torch.save writes whole storages."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def read_pth(path: Path) -> dict[str, Any]:
    """What torch.save wrote to `path`, a dictionary, mapped into memory. No code in it is run. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; expected BlinkDL's {SUFFIX}.")
    with open(path, "rb") as file:
        cut_short = file.read(2) == b"PK" and not zipfile.is_zipfile(path)
    if cut_short:
        raise ValueError(f"{path} is cut short or damaged: its table of contents is missing; fetch it again.")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        if code := re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", str(error)):
            raise ValueError(
                f"{path} holds more than tensors ({code[1] or code[2]}), which would run code when read, and was "
                "refused: save a plain dictionary of tensors with torch.save."
            ) from error
        # torch's own words would advise to switch the protection off.
        raise ValueError(f"{path} is damaged or no {SUFFIX} file of tensors.") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds an object of type {type(tensors).__name__}, expected a dictionary of tensors.")
    return tensors


def _refuse_other_versions(tensors: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError for RWKV-4 to RWKV-6, which have tensors of their own."""
    for name in map(str, tensors):
        if match := re.fullmatch(r"blocks\.\d+\.(?:att|ffn)\.(time_\w+)", name):
            version = "RWKV-6 (x060)" if match[1].startswith("time_maa") else "RWKV-4, 5 or 6"
            raise ValueError(f"{path} is of {version}, to which the tensor {name} belongs: expected RWKV-7 (x070).")


def config_from_shapes(tensors: Mapping[str, Any], origin: str | Path) -> RWKV7Config:
    """Sizes and low-rank dimensions as the shapes of BlinkDL's tensors give them, direction causal.

    Raises ValueError naming the tensor that is missing or whose shape gives no size.
    """

    def matrix(name: str, rows: str | int, columns: str | int) -> tuple[int, int]:
        wanted = f"[{rows}, {columns}]"
        tensor = tensors.get(name)
        if tensor is None:
            raise ValueError(f"{origin}: the tensor {name} is missing; expected one of shape {wanted}.")
        shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or (isinstance(rows, int) and tensor.shape[0] != rows):
            raise ValueError(f"{origin}: the tensor {name} has shape {shape}, expected {wanted}.")
        return int(tensor.shape[0]), int(tensor.shape[1])

    vocab_size, width = matrix("emb.weight", "vocabulary", "width")
    heads, head_size = matrix("blocks.0.att.r_k", "heads", "head size")
    if heads * head_size != width:
        raise ValueError(
            f"{origin}: the tensor blocks.0.att.r_k has shape [{heads}, {head_size}], expected [heads, head size] "
            f"whose product is the width, {width}."
        )
    layers = _count_layers(tensors, origin)
    # Layer 0's own v1 is unused, and some exporters drop it.
    v1 = next((name for name in ("blocks.1.att.v1", "blocks.0.att.v1") if name in tensors), None)
    if v1 is None and layers > 1:
        v1 = "blocks.1.att.v1"
    ranks = {kind: matrix(f"blocks.0.att.{kind}1", width, "rank")[1] for kind in "wag"}
    return RWKV7Config(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        head_size=head_size,
        decay_low_rank_dim=ranks["w"],
        a_low_rank_dim=ranks["a"],
        v_low_rank_dim=matrix(v1, width, "rank")[1] if v1 is not None else None,
        gate_low_rank_dim=ranks["g"],
        direction="causal",
    )


def _count_layers(tensors: Mapping[str, Any], origin: str | Path) -> int:
    numbers = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", str(name)))}
    for number in range(max(numbers)):
        if number not in numbers:
            raise ValueError(f"{origin}: block {number} is missing, though there is a block {max(numbers)}.")
    return len(numbers)
