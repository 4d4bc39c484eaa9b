"""Where elements of a parameter lie in a flat tensor. Needs no DeepSpeed: commands that read checkpoints use it too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of the flattened parameter `name`, at `offset` of a shard's flat tensor."""

    name: str
    start: int
    offset: int
    numel: int
