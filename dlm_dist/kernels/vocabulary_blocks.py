"""Logits of a linear head in blocks of the vocabulary: one pass for the statistics of rows, one for gradients.

The logits of M rows over V ids are never held whole. `scan` keeps a running maximum and a running sum of exponentials
per row (the online normaliser of Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018);
`gradients` makes each block's logits again from the rows and the head weight, so each block of the weight gradient is
written once and memory is M x block_size instead of M x V.

Matrix products run in the dtype of `hidden`; maxima, exponentials, sums and the accumulated gradient of `hidden` are
fp32 (fp64 for fp64 inputs). On CUDA half-precision products also return fp32; on CPU, where PyTorch has no such
product, the logits of a half-precision head are rounded once to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class RowStatistics(NamedTuple):
    """What one pass over the logits z of each row leaves, [M] each, fp32 or fp64; None what was not asked for."""

    lse: Tensor
    """log sum_v exp z_v."""
    target_logit: Tensor
    highest: Tensor
    """max_v z_v."""
    highest_id: Tensor | None
    """The lowest of the ids that have it, int64."""
    mean_logit: Tensor | None
    entropy: Tensor | None
    """-sum_v p_v log p_v of p = softmax(z), nats."""


class LogitGradient(NamedTuple):
    """The gradient of a row's logits z, with p = softmax(z) and y its target, each coefficient [M].

    p_v * (softmax + log_softmax * log p_v) - target * [v = y] - everywhere + (extra value at the id of `extra`).
    """

    softmax: Tensor
    target: Tensor
    log_softmax: Tensor | None = None
    everywhere: Tensor | None = None
    extra: tuple[Tensor, Tensor] | None = None
    """(values, ids)."""


def scan(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    block_size: int,
    find_highest_id: bool = False,
    find_mean: bool = False,
    find_entropy: bool = False,
) -> RowStatistics:
    """Statistics of the logits of `hidden` [M, C] under `weight` [V, C]; `targets` [M]."""
    blocks = _LogitBlocks(hidden, weight, block_size, spare=find_entropy)
    highest = hidden.new_full((hidden.shape[0],), -torch.inf, dtype=blocks.dtype)
    total = torch.zeros_like(highest)
    target_logit = torch.full_like(highest, torch.nan)
    highest_id = torch.zeros_like(targets) if find_highest_id else None
    logit_sum = torch.zeros_like(highest) if find_mean else None
    centred_sum = torch.zeros_like(highest) if find_entropy else None  # of exp(z - highest) * (z - highest)
    for start, _, logits in blocks:
        inside, column = _columns(targets, start, logits.shape[1])
        target_logit = torch.where(inside, logits.gather(1, column[:, None]).squeeze(1), target_logit)
        if logit_sum is not None:
            logit_sum.add_(logits.sum(dim=1))
        if highest_id is None:
            higher = torch.maximum(highest, logits.amax(dim=1))
        else:
            here, index = logits.max(dim=1)
            highest_id = torch.where(here > highest, index + start, highest_id)
            higher = torch.maximum(highest, here)
        moved = highest.sub_(higher)
        if centred_sum is None:
            total.mul_(moved.exp_())
            total.add_(logits.sub_(higher[:, None]).exp_().sum(dim=1))
        else:
            if start > 0:
                centred_sum.addcmul_(total, moved)
            factor = moved.exp_()
            centred = logits.sub_(higher[:, None])
            exponentials = torch.exp(centred, out=blocks.spare_of(centred))
            total.mul_(factor).add_(exponentials.sum(dim=1))
            centred_sum.mul_(factor).add_(exponentials.mul_(centred).sum(dim=1))
        highest = higher
    mean_logit = None if logit_sum is None else logit_sum.div_(weight.shape[0])
    entropy = None if centred_sum is None else total.log() - centred_sum / total
    return RowStatistics(total.log_().add_(highest), target_logit, highest, highest_id, mean_logit, entropy)


def gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    form: LogitGradient,
    block_size: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `hidden`, [M, C] fp32 or fp64, and of `weight`, [V, C] in its dtype, when the logits' is `form`."""
    blocks = _LogitBlocks(hidden, weight, block_size, spare=form.log_softmax is not None)
    grad_hidden = torch.zeros_like(hidden, dtype=blocks.dtype) if wants_hidden else None
    grad_weight = torch.empty_like(weight) if wants_weight else None
    # oneDNN's half-precision product is twice as slow with a transposed first factor, so rows are transposed once
    # and each block's (small) result is transposed back.
    transposed_rows = hidden.t().contiguous() if wants_weight and _prefers_plain_factors(hidden) else None
    for start, block, logits in blocks:
        grad_logits = blocks.narrowed(_logit_gradient(logits, start, targets, lse, form, blocks))
        if grad_hidden is not None:
            _add_product(grad_hidden, grad_logits, block)
        if grad_weight is not None:
            place = grad_weight[start : start + block.shape[0]]
            if transposed_rows is not None:
                place.copy_(torch.mm(transposed_rows, grad_logits).t())
            elif place.dtype == grad_logits.dtype:
                torch.mm(grad_logits.t(), hidden, out=place)
            else:
                place.copy_(_wide_product(grad_logits.t(), hidden))
    return grad_hidden, grad_weight


def _logit_gradient(
    logits: Tensor, start: int, targets: Tensor, lse: Tensor, form: LogitGradient, blocks: _LogitBlocks
) -> Tensor:
    """`form` for one block of logits [M, b], in their place."""
    log_softmax = logits.sub_(lse[:, None])
    factor = form.softmax[:, None]
    if form.log_softmax is not None:
        slope = form.log_softmax[:, None]
        factor = torch.addcmul(factor, log_softmax, slope, out=blocks.spare_of(log_softmax))
    result = log_softmax.exp_().mul_(factor)
    if form.everywhere is not None:
        result.sub_(form.everywhere[:, None])
    _add_at(result, start, targets, -form.target)
    if form.extra is not None:
        _add_at(result, start, form.extra[1], form.extra[0])
    return result


def _add_at(block: Tensor, start: int, ids: Tensor, values: Tensor) -> None:
    """Adds `values` [M] to the logits of `ids` [M] where the block that begins at id `start` holds them."""
    inside, column = _columns(ids, start, block.shape[1])
    block.scatter_add_(1, column[:, None], torch.where(inside, values, 0.0).to(block.dtype)[:, None])


class _LogitBlocks:
    """Logits of `hidden` in blocks of the vocabulary, each in the same buffer: use one before asking for the next."""

    def __init__(self, hidden: Tensor, weight: Tensor, block_size: int, spare: bool) -> None:
        self.hidden, self.weight, self.block_size = hidden, weight, block_size
        held = hidden.shape[0] * min(block_size, weight.shape[0])
        self.dtype = _accumulator_dtype(hidden.dtype)
        self.wide = hidden.new_empty(held, dtype=self.dtype)
        # Half precision needs a second buffer: for the product on CPU, and for the logit gradients everywhere.
        self.narrow = self.wide if hidden.dtype == self.dtype else hidden.new_empty(held)
        self.spare = torch.empty_like(self.wide) if spare else None

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields (first id, weight block [b, C] in the dtype of `hidden`, logits [M, b] fp32 or fp64)."""
        for start in range(0, self.weight.shape[0], self.block_size):
            block = self.weight[start : start + self.block_size].to(self.hidden.dtype)
            logits = self.view(self.wide, block.shape[0])
            if self.narrow is self.wide:
                torch.mm(self.hidden, block.t(), out=logits)
            elif _has_wide_product(self.hidden):
                torch.mm(self.hidden, block.t(), out_dtype=self.dtype, out=logits)
            else:
                logits.copy_(torch.mm(self.hidden, block.t(), out=self.view(self.narrow, block.shape[0])))
            yield start, block, logits

    def narrowed(self, values: Tensor) -> Tensor:
        """`values` [M, b] in the dtype of `hidden`."""
        if self.narrow is self.wide:
            return values
        return self.view(self.narrow, values.shape[1]).copy_(values)

    def spare_of(self, values: Tensor) -> Tensor:
        """A second buffer of the shape and dtype of `values` [M, b]."""
        assert self.spare is not None
        return self.view(self.spare, values.shape[1])

    def view(self, buffer: Tensor, width: int) -> Tensor:
        rows = self.hidden.shape[0]
        return buffer[: rows * width].view(rows, width)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(_wide_product(left, right))


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of half-precision factors, in fp32 where the device can."""
    if _has_wide_product(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


def _has_wide_product(factor: Tensor) -> bool:
    return factor.is_cuda and torch.version.hip is None


def _prefers_plain_factors(hidden: Tensor) -> bool:
    return hidden.device.type == "cpu" and hidden.dtype in (torch.bfloat16, torch.float16)


def _columns(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Which rows [M] have their target in this block, and the column [M] of it (any valid one for the others)."""
    column = targets - start
    return (column >= 0) & (column < width), column.clamp(0, width - 1)


def _accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
