"""Weighted cross entropy of a linear head, computed in blocks of the vocabulary (vocabulary_blocks.py).

A row's loss is what it costs to name its target, and what else is asked for:

- Label smoothing e: (1 - e) * NLL + e * mean_v(-log p_v), the cross entropy to a target of which the share e is
  spread evenly over all V ids.
- Confidence weight c (CAP, LLaDA 2.0's tech report): c * the entropy of p where the target has the highest logit, so
  that predictions that are already right become sharper and can be accepted in parallel. Its gradient runs through
  the entropy; which rows are right is taken as it is. The report divides this term by the number of right rows,
  which is known only after the forward pass of all ranks; here each such row has the weight of its cross entropy.
- L2Wrap (BlinkDL, RWKV-LM) keeps logits from drifting: the loss stays as it is, and the gradient of each row's
  highest logit gets an addition in proportion to that logit, as from a term l2wrap / 2 * (highest logit)^2 per row.
- z-loss (PaLM, arXiv 2204.02311) keeps log-partition functions near 0: the loss stays as it is here too, and the
  gradient is that of a further term z_loss * lse^2 per row, lse being the log of the sum of the row's exponentials.

What is not asked for costs nothing: no pass over the logits, no memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlm_dist.kernels.vocabulary_blocks import LogitGradient, RowStatistics, gradients, scan

_DEFAULT_BLOCK_CPU = 2048  # fastest of 512 .. 16384 measured for M in 500 .. 2500 and C in 128 .. 1024
_DEFAULT_BLOCK_ACCELERATOR = 8192  # fewer, larger launches; 33 MB of fp32 logits per 1024 rows


def weighted_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, block_size: int | None = None
) -> Tensor:
    """sum_i weights[i] * (-log softmax(hidden[i] @ weight.T)[targets[i]]), a 0-d fp32 tensor.

    `hidden` [M, C], `weight` [V, C], `targets` [M] integers in [0, V), `weights` [M] fp32. M may be 0: the loss is
    then 0 and the gradients are zeros, so that the graph stays connected. Differentiable once in `hidden`, `weight`
    and `weights`. Products run in the dtype of `hidden`, under autocast in autocast's; the loss is fp32.
    `block_size` is the number of vocabulary ids whose logits are held at a time. Inputs in fp64 give
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
    label_smoothing: float = 0.0,
    confidence_weight: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """sum_i weights[i] * (loss of row i), and the losses of the rows before their weights, [M] fp32 without gradient.

    Arguments and errors as in `weighted_cross_entropy_sum`, whose sum this is with the last four left out.
    `label_smoothing` in [0, 1) and `confidence_weight` (finite, from 0) are e and c above. Logits that are equal, as
    rounded ones may be, are all the highest: the target need only be one of them.
    `l2wrap`: the backward pass adds l2wrap * (row i's highest logit) * (gradient of the sum) to the gradient of that
    logit, of the lowest id where several are equally high; rows' weights do not enter. None or 0: nothing is added.
    `z_loss`: the backward pass adds z_loss * (gradient of lse^2) * (gradient of the sum) likewise.
    """
    _check(hidden, weight, targets, weights)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be at least 0 and below 1.")
    if not 0.0 <= confidence_weight < float("inf"):
        raise ValueError(f"confidence_weight is {confidence_weight}: it must be at least 0 and finite.")
    block = _block(hidden, block_size)
    total, rows = _BlockedCrossEntropy.apply(
        hidden, weight, targets, weights, block, l2wrap or 0.0, label_smoothing, confidence_weight, z_loss
    )
    return total, rows


@torch.no_grad()
def cross_entropy_rows(hidden: Tensor, weight: Tensor, targets: Tensor, block_size: int | None = None) -> Tensor:
    """Unweighted losses of the rows, [M] fp32 (fp64 for fp64 inputs), without gradient. Arguments as above."""
    _check(hidden, weight, targets, None)
    with torch.autocast(hidden.device.type, enabled=False):
        statistics = scan(_as_operand(hidden), weight, targets, _block(hidden, block_size))
    return statistics.lse - statistics.target_logit


class _BlockedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        block_size: int,
        l2wrap: float,
        label_smoothing: float,
        confidence_weight: float,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        operand = _as_operand(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            statistics = scan(
                operand, weight, targets, block_size, l2wrap != 0.0, label_smoothing != 0.0, confidence_weight != 0.0
            )
            rows = statistics.lse - statistics.target_logit
            if statistics.mean_logit is not None:
                rows = rows + label_smoothing * (statistics.target_logit - statistics.mean_logit)
            if statistics.entropy is not None:
                rows = rows + confidence_weight * _entropy_of_right_rows(statistics)
            total = (rows * weights).sum()
        # The weight itself is saved: under ZeRO-3 backward then sees it gathered again.
        ctx.save_for_backward(operand, weight, targets, weights, rows, *statistics)
        ctx.block_size, ctx.hidden_dtype = block_size, hidden.dtype
        ctx.l2wrap, ctx.label_smoothing, ctx.confidence_weight = l2wrap, label_smoothing, confidence_weight
        ctx.z_loss = z_loss
        ctx.mark_non_differentiable(rows)
        return total, rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        operand, weight, targets, weights, rows, *saved = ctx.saved_tensors
        statistics = RowStatistics(*saved)
        wants_hidden, wants_weight, _, wants_weights, *_ = ctx.needs_input_grad
        with torch.autocast(operand.device.type, enabled=False):
            form = _logit_gradient(
                statistics,
                (weights * grad_total).to(statistics.lse.dtype),
                ctx.label_smoothing,
                ctx.confidence_weight,
                ctx.l2wrap * grad_total,
                weight.shape[0],
            )
            if ctx.z_loss != 0.0:
                form = form._replace(softmax=form.softmax + 2.0 * ctx.z_loss * grad_total * statistics.lse)
            grad_hidden, grad_weight = gradients(
                operand, weight, targets, statistics.lse, form, ctx.block_size, wants_hidden, wants_weight
            )
            if grad_weight is not None and not len(targets):
                grad_weight = grad_weight + 0.0 * grad_total  # without rows too, NaN gives NaN
            grad_weights = (rows * grad_total).to(weights.dtype) if wants_weights else None
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(ctx.hidden_dtype)
        return grad_hidden, grad_weight, None, grad_weights, None, None, None, None, None


def _logit_gradient(
    statistics: RowStatistics,
    scales: Tensor,
    label_smoothing: float,
    confidence_weight: float,
    l2wrap: Tensor,
    vocabulary: int,
) -> LogitGradient:
    """The gradient of the logits of each row whose loss is multiplied by `scales` [M].

    The entropy H of softmax p has the gradient -p_v * (log p_v + H).
    """
    form = LogitGradient(softmax=scales, target=scales)
    if statistics.mean_logit is not None:
        form = form._replace(
            target=scales * (1.0 - label_smoothing), everywhere=scales * (label_smoothing / vocabulary)
        )
    if statistics.entropy is not None:
        slope = -confidence_weight * scales * _is_right(statistics)
        form = form._replace(softmax=scales + slope * statistics.entropy, log_softmax=slope)
    if statistics.highest_id is not None:
        form = form._replace(extra=statistics.highest * l2wrap, extra_id=statistics.highest_id)
    return form


def _is_right(statistics: RowStatistics) -> Tensor:
    return statistics.target_logit >= statistics.highest


def _entropy_of_right_rows(statistics: RowStatistics) -> Tensor:
    assert statistics.entropy is not None
    return statistics.entropy * _is_right(statistics)


def _as_operand(hidden: Tensor) -> Tensor:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return hidden.detach().to(torch.get_autocast_dtype(device)).contiguous()
    return hidden.detach().contiguous()


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
