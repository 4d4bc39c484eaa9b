"""Masters and optimizer states of a checkpoint, read into shards of another layout than wrote them.

A checkpoint says for each shard which elements of which parameter it holds. A shard of any other layout (ranks, ZeRO
stage, sub-groups) is put together from the ranges that overlap it, which are read from the memory-mapped files:
no more than one shard's states and a window of its elements is ever held beside the engine's own. Masters and 32-bit
states keep their bits. 8-bit states keep their values wherever a block of 256 codes comes from under one scale, which
is so as long as shards are cut at multiples of 256 elements of a parameter; other blocks are quantised again.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dlm_dist.training.checkpoint_files import CheckpointError, read_manifest
from dlm_dist.training.pieces import Piece
from dlm_dist.training.quantisation import BLOCK, dequantise, quantise

WINDOW = 2**14 * BLOCK
"""Elements of a shard that are converted at a time."""
_UNKNOWN = -1.0
"""In the place of a scale: no state was saved for this element (padding), so its value is 0."""


@dataclass(frozen=True)
class SavedShard:
    """One shard of a checkpoint: where its tensors are, and what its flat tensors hold."""

    index: Path
    """The list of shards of the rank that wrote it."""
    files: tuple[Path, ...]
    """That rank's files of tensors; each of the shard's is in one of them."""
    key: str
    pieces: tuple[Piece, ...]
    tensors: tuple[str, ...]
    """Names of the optimizer's tensors; none before its first step."""
    numbers: Mapping[str, Any]
    ema: bool
    """Whether an average of the masters is saved beside them."""


@dataclass(frozen=True)
class Run:
    """Elements [to, to + numel) of a shard are [start, start + numel) of a saved one."""

    to: int
    saved: SavedShard
    start: int
    numel: int


@dataclass
class Blocks:
    """Blocks of 8-bit states that were put together, and how many of them had to be quantised again."""

    converted: int = 0
    requantised: int = 0


class SavedShards:
    """The shards of one checkpoint. Raises CheckpointError where they do not cover every parameter exactly once."""

    def __init__(self, path: Path, sizes: Mapping[str, int]) -> None:
        """Read the indexes of `path`/tensors; `sizes` are the elements of every parameter."""
        self.path = path
        self.by_key: dict[str, SavedShard] = {}
        self.blocks = Blocks()
        self._holders: dict[str, list[tuple[Piece, SavedShard]]] = {name: [] for name in sizes}
        self._open: dict[Path, tuple[Any, frozenset[str]]] = {}
        names = read_manifest(path)
        for name in names:
            if name.startswith("tensors/") and name.endswith(".json"):
                rank = name.removesuffix(".json")
                files = [path / file for file in names if file.startswith(rank) and file.endswith(".safetensors")]
                self._read_index(path / name, tuple(files))
        self._check_coverage(sizes)

    def _read_index(self, index: Path, files: tuple[Path, ...]) -> None:
        for entry in json.loads(index.read_bytes()):
            pieces = tuple(Piece(*piece) for piece in entry["pieces"])
            shard = SavedShard(
                index=index,
                files=files,
                key=entry["key"],
                pieces=pieces,
                tensors=tuple(entry["tensors"]),
                numbers=entry["numbers"],
                ema=entry.get("ema", False),
            )
            self.by_key[shard.key] = shard
            for piece in pieces:
                if piece.name not in self._holders:
                    raise CheckpointError(f"{index} holds {piece.name}, which is no trained parameter of this model")
                self._holders[piece.name].append((piece, shard))

    def _check_coverage(self, sizes: Mapping[str, int]) -> None:
        for name, holders in self._holders.items():
            holders.sort(key=lambda holder: holder[0].start)
            reached = 0
            for piece, shard in holders:
                if piece.start != reached:
                    what = "more than once" if piece.start < reached else "not at all"
                    between = sorted((piece.start, reached))
                    raise CheckpointError(
                        f"{self.path} is inconsistent: elements {between[0]} to {between[1]} of {name} are in it "
                        f"{what} (found at shard {shard.key} of {shard.index.name})"
                    )
                reached += piece.numel
            if reached != sizes[name]:
                raise CheckpointError(
                    f"{self.path} does not fit the model: it holds {reached} elements of {name}, which has "
                    f"{sizes[name]}"
                )

    @property
    def has_ema(self) -> bool:
        """Whether it holds an average of the masters. Raises CheckpointError where only some shards have one."""
        found = {shard.ema for shard in self.by_key.values()}
        if len(found) > 1:
            raise CheckpointError(f"{self.path} is inconsistent: some of its shards have an EMA and some have none")
        return found == {True}

    def runs(self, pieces: Sequence[Piece]) -> list[Run]:
        """Where the elements of `pieces` are, in the order of the shard."""
        found = []
        for piece in sorted(pieces, key=lambda piece: piece.offset):
            holders = self._holders[piece.name]
            at = bisect_right(holders, piece.start, key=lambda holder: holder[0].start) - 1
            end = piece.start + piece.numel
            while at < len(holders) and holders[at][0].start < end:
                held, shard = holders[at]
                first, last = max(piece.start, held.start), min(end, held.start + held.numel)
                found.append(
                    Run(piece.offset + first - piece.start, shard, held.offset + first - held.start, last - first)
                )
                at += 1
        return found

    def numel(self, shard: SavedShard) -> int:
        """Elements of the shard's flat tensors, padding included."""
        return math.prod(self._slice(shard, "master").get_shape())

    def whole(self, shard: SavedShard, name: str) -> torch.Tensor:
        """A whole tensor of a saved shard, in the shape that it was written in."""
        return self._file(shard, name).get_tensor(f"{shard.key}/{name}")

    def values(self, run: Run, name: str) -> torch.Tensor:
        """Elements of a run as fp32 [numel]; 8-bit states by the values that their codes stand for."""
        found = self._range(run.saved, name, run.start, run.numel)
        number = name.removeprefix("state")
        if f"absmax{number}" not in run.saved.tensors:
            return found.float()
        return dequantise(found, self._scale_of_each(run, number), self.whole(run.saved, f"qmap{number}").float())

    def copy_weights(self, runs: Sequence[Run], name: str, flat: torch.Tensor) -> None:
        """Write fp32 masters ("master") or their average ("ema") into `flat` [numel]; only the elements of `runs`."""
        for run in runs:
            flat[run.to : run.to + run.numel].copy_(self._range(run.saved, name, run.start, run.numel))

    def state(self, runs: Sequence[Run], like: torch.Tensor) -> dict[str, Any]:
        """The optimizer's state of a shard whose master is `like`, on its device; {} where none was saved.

        Elements without a saved state (padding; parameters that never had a gradient) get 0.
        """
        with_state = [run for run in runs if run.saved.tensors]
        if not with_state:
            return {}
        first = with_state[0].saved
        for saved in {run.saved.key: run.saved for run in with_state}.values():
            if set(saved.tensors) != set(first.tensors) or saved.numbers != first.numbers:
                raise CheckpointError(
                    f"{self.path} is inconsistent: the optimizer states of shards {first.key} and {saved.key}, which "
                    "belong together here, are of different kinds or step counts"
                )
        quantised = {f"state{name.removeprefix('absmax')}" for name in first.tensors if name.startswith("absmax")}
        state: dict[str, Any] = {}
        for name in first.tensors:
            if name.startswith("qmap") or name == "step":
                state[name] = self._common(with_state, name)
            elif name in quantised:
                codes, scales = self._quantised(with_state, name.removeprefix("state"), like)
                state |= {name: codes, f"absmax{name.removeprefix('state')}": scales}
            elif not name.startswith("absmax"):
                state[name] = self._elementwise(with_state, name, like)
        return {**{name: state[name] for name in first.tensors}, **first.numbers}

    def _common(self, runs: Sequence[Run], name: str) -> torch.Tensor:
        """A tensor that is the same for all elements: a step count or a code book."""
        shards = list({run.saved.key: run.saved for run in runs}.values())
        value = self.whole(shards[0], name).clone()
        for other in shards[1:]:
            if not torch.equal(self.whole(other, name), value):
                raise CheckpointError(
                    f"{self.path} is inconsistent: {name} of shards {shards[0].key} and {other.key}, which belong "
                    "together here, differ"
                )
        return value

    def _elementwise(self, runs: Sequence[Run], name: str, like: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(like.numel(), device=like.device)
        for run in runs:
            out[run.to : run.to + run.numel].copy_(self._range(run.saved, name, run.start, run.numel))
        return out.view(like.shape)

    def _quantised(self, runs: Sequence[Run], number: str, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of the shape of `like` and the scales of their blocks; counts in `self.blocks`."""
        book = self._common(runs, f"qmap{number}").float()
        codes = torch.empty(like.numel(), dtype=torch.uint8, device=like.device)
        scales = torch.empty(-(-like.numel() // BLOCK), device=like.device)
        zero = int(book.abs().argmin())
        for first in range(0, like.numel(), WINDOW):
            size = min(WINDOW, like.numel() - first)
            padded = -(-size // BLOCK) * BLOCK
            old = torch.full((padded,), zero, dtype=torch.uint8)
            old_scales = torch.full((padded,), _UNKNOWN)
            for run in _clipped(runs, first, first + size):
                place = slice(run.to - first, run.to - first + run.numel)
                old[place] = self._range(run.saved, f"state{number}", run.start, run.numel)
                old_scales[place] = self._scale_of_each(run, number)
            new, new_scales, again = regroup(old.view(-1, BLOCK), old_scales.view(-1, BLOCK), book)
            codes[first : first + size].copy_(new.view(-1)[:size])
            scales[first // BLOCK : (first + padded) // BLOCK].copy_(new_scales)
            self.blocks.converted += len(new)
            self.blocks.requantised += again
        return codes.view(like.shape), scales

    def _scale_of_each(self, run: Run, number: str) -> torch.Tensor:
        first = run.start // BLOCK
        scales = self._range(run.saved, f"absmax{number}", first, (run.start + run.numel - 1) // BLOCK - first + 1)
        return scales[torch.arange(run.start, run.start + run.numel) // BLOCK - first]

    def _range(self, shard: SavedShard, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of a saved tensor, flattened; nothing else of it is read."""
        view = self._slice(shard, name)
        row = math.prod(view.get_shape()[1:])
        first = start // row
        rows = view[first : -(-(start + numel) // row)]
        return rows.reshape(-1)[start - first * row :][:numel]

    def _slice(self, shard: SavedShard, name: str) -> Any:
        return self._file(shard, name).get_slice(f"{shard.key}/{name}")

    def _file(self, shard: SavedShard, name: str) -> Any:
        """The file that holds the tensor `name` of a shard, opened once."""
        for path in shard.files:
            if path not in self._open:
                opened = safe_open(path, framework="pt")
                self._open[path] = opened, frozenset(opened.keys())
            file, keys = self._open[path]
            if f"{shard.key}/{name}" in keys:
                return file
        raise CheckpointError(f"{self.path} is inconsistent: none of its files holds {shard.key}/{name}")


def _clipped(runs: Sequence[Run], first: int, last: int) -> Iterator[Run]:
    """What of `runs` lies in elements [first, last) of the shard."""
    for run in runs:
        begin, end = max(first, run.to), min(last, run.to + run.numel)
        if begin < end:
            yield Run(begin, run.saved, run.start + begin - run.to, end - begin)


def regroup(codes: torch.Tensor, scales: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Codes [blocks, 256] that come with a scale each under one scale a block -> codes, scales [blocks], requantised.

    A block under one scale keeps its codes; any other is quantised again, and counted. A negative scale stands for an
    element without a value; its code must be that of 0.
    """
    common = scales.amax(1).clamp(min=0)
    mixed = ((scales != common[:, None]) & (scales >= 0)).any(1)
    again = int(mixed.sum())
    if again:
        codes = codes.clone()
        codes[mixed], common[mixed] = quantise(dequantise(codes[mixed], scales[mixed].clamp(min=0), book), book)
    return codes, common, again
