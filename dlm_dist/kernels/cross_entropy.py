"""Weighted cross entropy of a linear head, computed in blocks of the vocabulary.

The logits of M rows over V ids are never held whole. The forward pass keeps a running maximum and a running
sum of exponentials per row (the online normaliser of Milakov and Gimelshein, "Online normalizer calculation
for softmax", 2018); the backward pass makes each block's logits again from the saved rows and head weight, so
each block of the weight gradient is written once and memory is M x block_size instead of M x V.

Matrix products run in the dtype of `hidden` (under autocast: in autocast's dtype); maxima, exponentials, sums and
the accumulated gradient of `hidden` are fp32 (fp64 for fp64 inputs). On CUDA half-precision products also return
fp32; on CPU, where PyTorch has no such product, the logits of a half-precision head are rounded once to it.

L2Wrap (BlinkDL, RWKV-LM) keeps logits from drifting: the loss stays as it is, and the gradient of each row's highest
logit gets an addition in proportion to that logit, as from a term l2wrap / 2 * (highest logit)^2 per row in the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_DEFAULT_BLOCK_CPU = 2048  # fastest of 512 .. 16384 measured for M in 500 .. 2500 and C in 128 .. 1024
_DEFAULT_BLOCK_ACCELERATOR = 8192  # fewer, larger launches; 33 MB of fp32 logits per 1024 rows


def weighted_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, block_size: int | None = None
) -> Tensor:
    """sum_i weights[i] * (-log softmax(hidden[i] @ weight.T)[targets[i]]), a 0-d fp32 tensor.

    `hidden` [M, C], `weight` [V, C], `targets` [M] integers in [0, V), `weights` [M] fp32. M may be 0: the loss is
    then 0 and the gradients are zeros, so that the graph stays connected. Differentiable once in `hidden`, `weight`
    and `weights`. `block_size` is the number of vocabulary ids whose logits are held at a time. Inputs in fp64 give
    an fp64 loss. Raises ValueError when the shapes do not fit, and on CPU when a target is no id; on an accelerator,
    where looking would wait for the device, the loss of such a row is NaN.
    """
    return weighted_cross_entropy(hidden, weight, targets, weights, block_size)[0]


def weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    block_size: int | None = None,
    l2wrap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`weighted_cross_entropy_sum` and the unweighted losses of the rows, [M] fp32 without gradient.

    `l2wrap`: the backward pass adds l2wrap * (row i's highest logit) * (gradient of the sum) to the gradient of that
    logit, of the lowest id where several are equally high; rows' weights do not enter. None or 0: nothing is added.
    """
    _check(hidden, weight, targets, weights)
    block = _block(hidden, block_size)
    total, rows = _BlockedCrossEntropy.apply(hidden, weight, targets, weights, block, l2wrap or 0.0)
    return total, rows


@torch.no_grad()
def cross_entropy_rows(hidden: Tensor, weight: Tensor, targets: Tensor, block_size: int | None = None) -> Tensor:
    """Unweighted losses of the rows, [M] fp32 (fp64 for fp64 inputs), without gradient. Arguments as above."""
    _check(hidden, weight, targets, None)
    with torch.autocast(hidden.device.type, enabled=False):
        lse, target_logits, _ = _scan(_as_operand(hidden), weight, targets, _block(hidden, block_size))
    return lse - target_logits


class _BlockedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, block_size: int, l2wrap: float
    ) -> tuple[Tensor, Tensor]:
        operand = _as_operand(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            lse, target_logits, highest = _scan(operand, weight, targets, block_size, find_highest=l2wrap != 0.0)
            rows = lse - target_logits
            total = (rows * weights).sum()
        # The weight itself is saved: under ZeRO-3 backward then sees it gathered again.
        ctx.save_for_backward(operand, weight, targets, weights, lse, rows, *(highest or ()))
        ctx.block_size, ctx.l2wrap = block_size, l2wrap
        ctx.hidden_dtype = hidden.dtype
        ctx.mark_non_differentiable(rows)
        return total, rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        operand, weight, targets, weights, lse, rows, *highest = ctx.saved_tensors
        wants_hidden, wants_weight, _, wants_weights, _, _ = ctx.needs_input_grad
        with torch.autocast(operand.device.type, enabled=False):
            extra = (highest[0] * (ctx.l2wrap * grad_total), highest[1]) if highest else None
            grad_hidden, grad_weight = _gradients(
                operand, weight, targets, lse, weights * grad_total, extra, ctx.block_size, wants_hidden, wants_weight
            )
            grad_weights = (rows * grad_total).to(weights.dtype) if wants_weights else None
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(ctx.hidden_dtype)
        return grad_hidden, grad_weight, None, grad_weights, None, None


class _LogitBlocks:
    """Logits of `hidden` in blocks of the vocabulary, each in the same buffer: use one before asking for the next."""

    def __init__(self, hidden: Tensor, weight: Tensor, block_size: int) -> None:
        self.hidden, self.weight, self.block_size = hidden, weight, block_size
        held = hidden.shape[0] * min(block_size, weight.shape[0])
        self.dtype = _accumulator_dtype(hidden.dtype)
        self.wide = hidden.new_empty(held, dtype=self.dtype)
        # Half precision needs a second buffer: for the product on CPU, and for the logit gradients everywhere.
        self.narrow = self.wide if hidden.dtype == self.dtype else hidden.new_empty(held)

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

    def view(self, buffer: Tensor, width: int) -> Tensor:
        rows = self.hidden.shape[0]
        return buffer[: rows * width].view(rows, width)


def _scan(
    hidden: Tensor, weight: Tensor, targets: Tensor, block_size: int, find_highest: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Log-sum-exp of each row's logits, and the logit of its target: both [M], fp32 or fp64.

    With `find_highest` also each row's highest logit and its id, the lowest of several: both [M].
    """
    blocks = _LogitBlocks(hidden, weight, block_size)
    maximum = hidden.new_full((hidden.shape[0],), -torch.inf, dtype=blocks.dtype)
    total = torch.zeros_like(maximum)
    target_logits = torch.full_like(maximum, torch.nan)
    highest_id = torch.zeros_like(targets) if find_highest else None
    for start, _, logits in blocks:
        inside, column = _columns(targets, start, logits.shape[1])
        target_logits = torch.where(inside, logits.gather(1, column[:, None]).squeeze(1), target_logits)
        if highest_id is None:
            higher = torch.maximum(maximum, logits.amax(dim=1))
        else:
            here, index = logits.max(dim=1)
            highest_id = torch.where(here > maximum, index + start, highest_id)
            higher = torch.maximum(maximum, here)
        total.mul_(maximum.sub_(higher).exp_())
        total.add_(logits.sub_(higher[:, None]).exp_().sum(dim=1))
        maximum = higher
    highest = None if highest_id is None else (maximum, highest_id)
    return total.log_().add_(maximum), target_logits, highest


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    row_scales: Tensor,
    extra: tuple[Tensor, Tensor] | None,
    block_size: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients [M, C] (fp32 or fp64) and [V, C] (dtype of `weight`).

    The gradient of row i's logits is row_scales[i] * (softmax - one-hot of the target); `extra` = (values [M], ids
    [M]) is added to one logit of each row.
    """
    blocks = _LogitBlocks(hidden, weight, block_size)
    row_scales = row_scales.to(blocks.dtype)
    grad_hidden = torch.zeros_like(hidden, dtype=blocks.dtype) if wants_hidden else None
    grad_weight = torch.empty_like(weight) if wants_weight else None
    # oneDNN's half-precision product is twice as slow with a transposed first factor, so rows are transposed once
    # and each block's (small) result is transposed back.
    transposed_rows = hidden.t().contiguous() if wants_weight and _prefers_plain_factors(hidden) else None
    for start, block, logits in blocks:
        inside, column = _columns(targets, start, logits.shape[1])
        probabilities = logits.sub_(lse[:, None]).exp_().mul_(row_scales[:, None])
        probabilities.scatter_add_(1, column[:, None], torch.where(inside, -row_scales, 0.0)[:, None])
        if extra is not None:
            inside, column = _columns(extra[1], start, logits.shape[1])
            probabilities.scatter_add_(1, column[:, None], torch.where(inside, extra[0], 0.0).to(blocks.dtype)[:, None])
        grad_logits = blocks.narrowed(probabilities)
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


def _as_operand(hidden: Tensor) -> Tensor:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return hidden.detach().to(torch.get_autocast_dtype(device)).contiguous()
    return hidden.detach().contiguous()


def _accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _block(hidden: Tensor, block_size: int | None) -> int:
    if block_size is None:
        return _DEFAULT_BLOCK_CPU if hidden.device.type == "cpu" else _DEFAULT_BLOCK_ACCELERATOR
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: it must be at least 1.")
    return block_size


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [M, C] and weight [V, C], got {tuple(hidden.shape)} and {tuple(weight.shape)}."
            " (A weight of size 0 is one that ZeRO-3 has not gathered: call this from the forward of its module.)"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}], one per row, got {tuple(targets.shape)}.")
    if weights is not None and weights.shape != hidden.shape[:1]:
        raise ValueError(f"weights must be [{hidden.shape[0]}], one per row, got {tuple(weights.shape)}.")
    if targets.device.type == "cpu" and targets.numel() > 0:
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"targets hold the id {low if low < 0 else high}, outside the vocabulary of {weight.shape[0]}:"
                " hand over only the rows that enter the loss."
            )
