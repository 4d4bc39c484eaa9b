"""Logits of a linear head in blocks of the vocabulary: one pass for the statistics of rows, one for gradients.

The logits of M rows over V ids are never held whole. `scan` keeps a running maximum and a running sum of exponentials
per row (the online normaliser of Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018);
`gradients` makes each block's logits again from the rows and the head weight, so each block of the weight gradient is
written once and memory is M x block_size instead of M x V.

Matrix products run in the dtype of `hidden`; maxima, exponentials, sums and the accumulated gradient of `hidden` are
fp32 (fp64 for fp64 inputs). On CUDA half-precision products also return fp32; on CPU, where PyTorch has no such
product, the logits of a half-precision head are rounded once to it. Everything between two products runs on a CPU in
slabs of rows that stay in its cache from the first operation to the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_SLAB_ELEMENTS = 2**18
"""Logits per thread between two products on a CPU: 1 MiB in fp32, half of a core's second-level cache or less."""


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

    p_v * (softmax + log_softmax * log p_v) - target * [v = y] - everywhere + extra * [v = extra_id].
    """

    softmax: Tensor
    target: Tensor
    log_softmax: Tensor | None = None
    everywhere: Tensor | None = None
    extra: Tensor | None = None
    extra_id: Tensor | None = None

    def of_rows(self, rows: slice) -> LogitGradient:
        """The coefficients of some of the rows."""
        return LogitGradient._make(None if value is None else value[rows] for value in self)


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
    total = torch.zeros_like(highest)  # of exp(z - highest)
    target_logit = torch.full_like(highest, torch.nan)
    highest_id = torch.zeros_like(targets) if find_highest_id else None
    logit_sum = torch.zeros_like(highest) if find_mean else None
    centred_sum = torch.zeros_like(highest) if find_entropy else None  # of exp(z - highest) * (z - highest)
    for start, _, product in blocks:
        inside, column = _columns(targets, start, product.shape[1])
        here = product.gather(1, column[:, None]).squeeze(1).to(blocks.dtype)
        target_logit = torch.where(inside, here, target_logit)
        for rows, logits in blocks.slabs(product):
            if logit_sum is not None:
                logit_sum[rows] += logits.sum(dim=1)
            before = highest[rows]
            if highest_id is None:
                higher = torch.maximum(before, logits.amax(dim=1))
            else:
                values, index = logits.max(dim=1)
                highest_id[rows] = torch.where(values > before, index + start, highest_id[rows])
                higher = torch.maximum(before, values)
            moved = before - higher
            before.copy_(higher)
            centred = logits.sub_(higher[:, None])
            if centred_sum is None:
                exponentials = centred.exp_()
            else:
                if start > 0:
                    centred_sum[rows].addcmul_(total[rows], moved)
                exponentials = torch.exp(centred, out=blocks.spare_of(centred))
            factor = moved.exp_()
            total[rows].mul_(factor).add_(exponentials.sum(dim=1))
            if centred_sum is not None:
                centred_sum[rows].mul_(factor).add_(exponentials.mul_(centred).sum(dim=1))
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
    for start, block, product in blocks:
        grad_logits = blocks.gradient_like(product)
        for rows, logits in blocks.slabs(product):
            spare = None if form.log_softmax is None else blocks.spare_of(logits)
            values = _logit_gradient(logits, start, targets[rows], lse[rows], form.of_rows(rows), spare)
            if blocks.copies:
                grad_logits[rows] = values
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
    logits: Tensor, start: int, targets: Tensor, lse: Tensor, form: LogitGradient, spare: Tensor | None
) -> Tensor:
    """`form` for logits [r, b] that begin at id `start`, in their place; `spare` is written over."""
    log_softmax = logits.sub_(lse[:, None])
    factor = form.softmax[:, None]
    if form.log_softmax is not None:
        factor = torch.addcmul(factor, log_softmax, form.log_softmax[:, None], out=spare)
    result = log_softmax.exp_().mul_(factor)
    if form.everywhere is not None:
        result.sub_(form.everywhere[:, None])
    _add_at(result, start, targets, -form.target)
    if form.extra is not None and form.extra_id is not None:
        _add_at(result, start, form.extra_id, form.extra)
    return result


def _add_at(logits: Tensor, start: int, ids: Tensor, values: Tensor) -> None:
    """Adds `values` [r] at the `ids` [r] that lie among those of `logits` [r, b], which begin at `start`."""
    inside, column = _columns(ids, start, logits.shape[1])
    logits.scatter_add_(1, column[:, None], torch.where(inside, values, 0.0).to(logits.dtype)[:, None])


class _LogitBlocks:
    """Products of `hidden` with blocks of the weight, all in the same buffer: use one before asking for the next."""

    def __init__(self, hidden: Tensor, weight: Tensor, block_size: int, spare: bool) -> None:
        self.hidden, self.weight, self.block_size = hidden, weight, block_size
        self.dtype = _accumulator_dtype(hidden.dtype)
        rows, width = hidden.shape[0], min(block_size, weight.shape[0])
        self.slab_rows = max(1, rows)
        if hidden.device.type == "cpu":
            self.slab_rows = max(1, min(rows, _SLAB_ELEMENTS * torch.get_num_threads() // width))
        wide_product = hidden.dtype == self.dtype or _has_wide_product(hidden)
        self.product = hidden.new_empty(rows * width, dtype=self.dtype if wide_product else hidden.dtype)
        self.gradient = self.product if self.product.dtype == hidden.dtype else hidden.new_empty(rows * width)
        slab = self.slab_rows * width
        self.slab = None if wide_product else hidden.new_empty(slab, dtype=self.dtype)
        self.spare = hidden.new_empty(slab, dtype=self.dtype) if spare else None
        self.copies = hidden.dtype != self.dtype
        """Whether gradients of logits have to be copied from where they were computed to `gradient`."""

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields (first id, weight block [b, C] in the dtype of `hidden`, product [M, b])."""
        for start in range(0, self.weight.shape[0], self.block_size):
            block = self.weight[start : start + self.block_size].to(self.hidden.dtype)
            product = _view(self.product, self.hidden.shape[0], block.shape[0])
            if product.dtype == self.hidden.dtype:
                torch.mm(self.hidden, block.t(), out=product)
            else:
                torch.mm(self.hidden, block.t(), out_dtype=self.dtype, out=product)
            yield start, block, product

    def slabs(self, product: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields (rows, their logits [r, b] fp32 or fp64, to be used up before the next)."""
        for first in range(0, product.shape[0], self.slab_rows):
            rows = slice(first, first + self.slab_rows)
            logits = product[rows]
            if self.slab is not None:
                logits = _view(self.slab, *logits.shape).copy_(logits)
            yield rows, logits

    def gradient_like(self, product: Tensor) -> Tensor:
        """Room for the gradient of the logits in the dtype of `hidden`; may be where the product is."""
        return _view(self.gradient, *product.shape)

    def spare_of(self, logits: Tensor) -> Tensor:
        """A second buffer of the shape and dtype of `logits` [r, b]."""
        assert self.spare is not None
        return _view(self.spare, *logits.shape)


def _view(buffer: Tensor, rows: int, width: int) -> Tensor:
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
