"""The block-wise 8-bit code of bitsandbytes: codes into a book of 256 values, a scale for each block of 256 codes.

bitsandbytes' own `quantize_blockwise` scales by the largest magnitude; its signed book ends at -0.993, so a block
whose largest value is negative shrinks at each pass. `quantise` here scales such a block by what the book reaches.
"""

from __future__ import annotations

import torch

BLOCK = 256
"""Elements per scale, counted from the start of the tensor that the optimizer steps on."""


def dequantise(codes: torch.Tensor, scales: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """fp32 values of `codes` uint8 under `scales` fp32 of a shape that broadcasts to theirs; `book` [256] fp32."""
    return book[codes.long()] * scales


def quantise(values: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes uint8 [blocks, 256] and scales fp32 [blocks] of `values` fp32 [blocks, 256]; `book` is sorted.

    What came out of whole blocks of `dequantise` gets its codes back, and its scale up to its last bit. Nothing but 0
    becomes 0: Adam divides by the root of its second moment, and a lost one would make a huge step.
    """
    scales = values.amax(1).clamp(min=0)
    lowest = book[0]
    if lowest < 0:
        scales = torch.maximum(scales, values.amin(1) / lowest)
    normed = values / torch.where(scales > 0, scales, 1.0)[:, None]
    codes = torch.bucketize(normed, (book[1:] + book[:-1]) / 2)
    codes += torch.where(book[codes] == 0, normed.sign().long(), 0)
    return codes.to(torch.uint8), scales
