"""Numbers as people read them, and the dtypes that commands offer by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that the option --dtype calls `name`, bf16 or fp32."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def count(number: int) -> str:
    """A count with the unit that leaves few digits."""
    for unit, size_of_unit in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size_of_unit:
            return f"{number / size_of_unit:.4g} {unit}"
    return str(number)


def size(number: int) -> str:
    """Bytes in GB or MB."""
    return f"{number / 1e9:.2f} GB" if number >= 10**9 else f"{number / 1e6:.1f} MB"
