"""Tensors as the bytes of safetensors files, and many of them dealt out to several files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

MODEL_FILE_BYTES = 2 * 2**30
STATE_FILE_BYTES = 2**28
"""Files of a rank's masters and states: SHA-256 of one file takes one core, so there are several to share out."""
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


def plan_model_files(sizes: Iterable[tuple[str, int]]) -> dict[str, list[str]]:
    """Deal parameters (name, bytes) in order into files of at most MODEL_FILE_BYTES -> file name -> names."""
    bins = _dealt(sizes, MODEL_FILE_BYTES)
    if len(bins) == 1:
        return {"model.safetensors": bins[0]}
    return {f"model-{i + 1:05d}-of-{len(bins):05d}.safetensors": names for i, names in enumerate(bins)}


def state_files(rank: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """What `rank` writes of masters and states, in files of about STATE_FILE_BYTES -> path -> tensors.

    tensors/rank-R.safetensors, and rank-R-2.safetensors and so on where one is too small.
    """
    bins = _dealt(((name, tensor.nbytes) for name, tensor in tensors.items()), STATE_FILE_BYTES)
    endings = ["", *(f"-{number}" for number in range(2, len(bins) + 1))]
    return {
        f"tensors/rank-{rank:05d}{ending}.safetensors": {name: tensors[name] for name in names}
        for ending, names in zip(endings, bins, strict=True)
    }


def _dealt(sizes: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Names in order, cut where more than `limit` bytes would come together; at least one part."""
    bins: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if bins[-1] and filled + size > limit:
            bins.append([])
            filled = 0
        bins[-1].append(name)
        filled += size
    return bins


def model_index(plan: Mapping[str, Sequence[str]], size: int) -> bytes:
    """model.safetensors.index.json of a model of `size` bytes in several files {file name: names of parameters}."""
    file_of = {name: file for file, names in plan.items() for name in names}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": file_of}, indent=2).encode()


def safetensors_buffers(tensors: Mapping[str, torch.Tensor]) -> list[memoryview]:
    """The buffers of a safetensors file of host tensors: its header, then their bytes in the same order."""
    header = safetensors_header({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    raw = (t.contiguous().reshape(-1).view(torch.uint8).numpy().data for t in tensors.values() if t.numel())
    return [memoryview(header), *raw]


def safetensors_header(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """How a safetensors file begins that holds tensors of these dtypes and shapes, one behind another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
