"""A packed row as a scan sees it: where its documents and their blocks begin, and how each span is reversed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one packed row of T tokens."""

    bounds: Tensor
    """[D + 1] int64, where each starts and the last ends: cu_seqlens."""
    lengths: tuple[int, ...]
    """Tokens of each, on the host."""
    first: Tensor
    """[1, T, 1] bool, True at the first token of each."""
    blocks: Documents | None = None
    """The blocks of the same T tokens, where a token sees no later block; each lies inside a document."""
    clean_follows: bool = False
    """Block diffusion: behind the T tokens lie their T clean ones, with the same documents and blocks."""

    @staticmethod
    def from_ids(document_ids: Tensor) -> Documents:
        """From ids [B, T], the rows laid end to end. A new id begins a document, and so does a new row.

        Positions with id -1 (a truncated tail) form spans of their own, so nothing else can see them. Waits for the
        device once, since the number of documents decides a shape.
        """
        first = torch.ones_like(document_ids, dtype=torch.bool)
        first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        return Documents.from_first(first.flatten())

    @staticmethod
    def from_first(first: Tensor) -> Documents:
        """From a mask [T] of the first tokens; the first one is."""
        starts = first.nonzero().squeeze(1)
        bounds = torch.cat([starts, starts.new_tensor([first.numel()])])
        return Documents(bounds, tuple(bounds.diff().tolist()), first.view(1, -1, 1))

    @staticmethod
    def with_blocks(document_ids: Tensor, block_ids: Tensor, clean_follows: bool) -> Documents:
        """Documents and blocks from ids [B, T]; a new document begins a new block."""
        documents = Documents.from_ids(document_ids)
        first = torch.ones_like(block_ids, dtype=torch.bool)
        first[:, 1:] = block_ids[:, 1:] != block_ids[:, :-1]
        blocks = Documents.from_first(first.flatten() | documents.first.flatten())
        return Documents(documents.bounds, documents.lengths, documents.first, blocks, clean_follows)

    @cached_property
    def last(self) -> Tensor:
        """[1, T, 1] bool, True at the last token of each."""
        return self.first.roll(-1, 1)

    @cached_property
    def reversal(self) -> Tensor:
        """[T] int64, the position that each position swaps with when every document is reversed in its own span."""
        document = self.first.flatten().cumsum(0) - 1
        mirrored = self.bounds[document] + self.bounds[document + 1] - 1
        return mirrored - torch.arange(len(mirrored), device=mirrored.device)

    def followed_by(self, other: Documents) -> Documents:
        """The documents of this row and, behind them, those of `other`."""
        bounds = torch.cat([self.bounds, other.bounds[1:] + self.first.shape[1]])
        return Documents(bounds, self.lengths + other.lengths, torch.cat([self.first, other.first], 1))

    @cached_property
    def backward(self) -> Documents:
        """What a scan from right to left runs over: documents, or blocks, of both streams if there are two."""
        inner = self if self.blocks is None else self.blocks
        return inner.followed_by(inner) if self.clean_follows else inner

    @cached_property
    def both_ways(self) -> Documents:
        """The row followed by its reversed copy, for both scans in one call (one stream only)."""
        return self.followed_by(self.backward)


class _Permute(torch.autograd.Function):
    """x[:, index] for an index that is its own inverse; the gradient is a gather too, hence deterministic."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad.index_select(1, ctx.saved_tensors[0]), None


def reverse(x: Tensor, documents: Documents | None) -> Tensor:
    """x [B, T, C] in the order of a scan from right to left (each row flipped, without documents)."""
    return x.flip(1) if documents is None else _Permute.apply(x, documents.backward.reversal)


def chain_blocks(transfer: Tensor, added: Tensor, documents: Documents) -> Tensor:
    """The state before each block, [S, H, N, N], where a block makes P S + Q of the state S before it.

    transfer, added: P and Q [S, H, N, N] by block; each document starts from zero. Documents go on side by side.
    """
    assert documents.blocks is not None
    of_document = _blocks_of_documents(documents.lengths, documents.blocks.lengths)
    longest_first = sorted(range(len(of_document)), key=lambda d: -len(of_document[d]))
    state = torch.zeros_like(added[: len(of_document)])
    before, order = [], []
    for step in range(len(of_document[longest_first[0]])):
        numbers = [of_document[d][step] for d in longest_first if len(of_document[d]) > step]
        state = state[: len(numbers)]
        before.append(state)
        order += numbers
        index = torch.tensor(numbers, device=transfer.device)
        state = torch.matmul(transfer.index_select(0, index), state) + added.index_select(0, index)
    place = torch.empty(len(order), dtype=torch.int64)
    place[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(before).index_select(0, place.to(transfer.device))


def _blocks_of_documents(documents: tuple[int, ...], blocks: tuple[int, ...]) -> list[list[int]]:
    """The numbers of the blocks that each document consists of, from the lengths of both."""
    found: list[list[int]] = []
    number = 0
    for length in documents:
        inside = []
        while length > 0:
            inside.append(number)
            length -= blocks[number]
            number += 1
        assert length == 0
        found.append(inside)
    return found
