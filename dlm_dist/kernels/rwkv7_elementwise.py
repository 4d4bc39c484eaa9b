"""The elementwise steps of RWKV-7 around its recurrence: token shift, mixes, key scaling, output correction.

Each is a plain PyTorch function that runs anywhere. On CUDA and for 16-bit numbers the same step can run as one
kernel of fla's (`fused`); `dlm_dist.kernels.wkv7` allows that per device, after `self_test_errors` has compared
results and gradients with the plain form on that very device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least fp32: 16-bit tensors are widened."""
    return x if x.dtype == torch.float64 else x.float()


def shift_difference(
    x: Tensor,
    first: Tensor | None = None,
    previous: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    fused: bool = False,
) -> Tensor:
    """The previous token minus the current one [B, T, C].

    x [B, T, C]. Zeros precede the first token of a document: those that `first` [1, T, 1] names, which are also
    the bounds `cu_seqlens` [D + 1]; without them the rows' first, which `previous` [B, C] precedes if it is given.
    """
    if fused and previous is None:
        from fla.modules.token_shift import token_shift

        return token_shift(x, cu_seqlens=cu_seqlens)
    before = F.pad(x[:, :-1], (0, 0, 1, 0))
    if previous is not None:
        before = torch.cat([previous.unsqueeze(1), x[:, :-1]], 1)
    if first is not None:
        before = before.masked_fill(first, 0.0)
    return before - x


def mixes(x: Tensor, difference: Tensor, weights: Sequence[Tensor], fused: bool = False) -> tuple[Tensor, ...]:
    """x + difference * mu for each of six mu [1, 1, C]; x and difference [B, T, C]."""
    if fused:
        return _FusedMixes.apply(x, difference, *weights)
    return tuple(torch.addcmul(x, difference, mu) for mu in weights)


class _FusedMixes(torch.autograd.Function):
    """fla's six mixes in one kernel. Its own autograd function writes the gradient of x over x itself in the backward
    pass, which is wrong wherever anything else has kept x; this one does not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, difference: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        from fla.ops.rwkv7.fused_addcmul import fused_addcmul_rwkv7

        ctx.save_for_backward(x, difference, *weights)
        outs: tuple[Tensor, ...] = fused_addcmul_rwkv7(x, difference, *weights)
        return outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        from fla.ops.rwkv7.fused_addcmul import addcmul_bwd1, addcmul_bwd2

        x, difference, *weights = ctx.saved_tensors
        grads = tuple(grad.contiguous() for grad in grads)
        d_x, d_difference = addcmul_bwd1(*grads, *weights, x, difference, use_xg=True, inplace=False)
        d_weights = addcmul_bwd2(*grads, difference, use_xg=True)
        shaped = (grad.reshape(mu.shape).to(mu.dtype) for grad, mu in zip(d_weights, weights, strict=True))
        return d_x, d_difference, *shaped


def scaled_key(k: Tensor, rate: Tensor, k_a: Tensor, fused: bool = False) -> Tensor:
    """k (1 + (rate - 1) k_a) in the dtype of k. k and rate [B, T, C], k_a [1, 1, C]."""
    if fused:
        from fla.ops.rwkv7.fused_k_update import fused_k_rwkv7

        return fused_k_rwkv7(k, rate, k_a)
    return (wide(k) * (1.0 + (rate - 1.0) * wide(k_a))).to(k.dtype)


def corrected_output(
    out: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, gate: Tensor, fused: bool = False
) -> Tensor:
    """(out + <r, k r_k> v) gate [B, T, C]. out and gate [B, T, C], r, k, v [B, T, H, N], r_k [H, N]."""
    if fused:
        from fla.ops.rwkv7.gate_output_correction import gate_output_correction

        return gate_output_correction(out, r, k, r_k, v, gate)
    strength = (wide(r) * wide(k) * wide(r_k)).sum(-1, keepdim=True).to(out.dtype)
    return (out + (strength * v).flatten(-2)) * gate


STEPS = ("token_shift", "mixes", "key", "correction")


def self_test_errors(step: str, device: torch.device, head_size: int) -> dict[str, float]:
    """The relative error (2-norm) of the fused `step` against the plain one in bf16: its results and gradients."""
    generator = torch.Generator().manual_seed(21)
    batch, length, heads = 2, 200, 4
    width = heads * head_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    x, other = normal(batch, length, width), normal(batch, length, width)
    if step == "token_shift":
        packed, bounds = normal(1, length, width), torch.tensor([0, 3, 4, 130, length], device=device)
        first = torch.zeros(1, length, 1, dtype=torch.bool, device=device)
        first[0, bounds[:-1]] = True
        errors = _errors(lambda fused: (shift_difference(x, fused=fused),), [x])
        in_documents = _errors(lambda fused: (shift_difference(packed, first, None, bounds, fused),), [packed])
        return errors | {f"{name} of documents": error for name, error in in_documents.items()}
    if step == "mixes":
        weights = [normal(1, 1, width) for _ in range(6)]
        # x times itself is kept for the backward pass, so that a kernel which writes over x is found out.
        return _errors(lambda fused: (x * x, *mixes(x, other, weights, fused)), [x, other, *weights])
    if step == "key":
        rate, k_a = other.float().sigmoid(), normal(1, 1, width)
        return _errors(lambda fused: (scaled_key(x, rate, k_a, fused),), [x, rate, k_a])
    assert step == "correction"
    r, k, v = (normal(batch, length, heads, head_size) for _ in range(3))
    r_k = normal(heads, head_size) * 0.1
    gate = normal(batch, length, width)
    return _errors(lambda fused: (corrected_output(x, r, k, r_k, v, gate, fused),), [x, r, k, r_k, v, gate])


def _errors(step: Callable[[bool], tuple[Tensor, ...]], leaves: list[Tensor]) -> dict[str, float]:
    """The relative errors of fused results and gradients by number; `step` closes over `leaves`."""
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.enable_grad():
        results = []
        for fused in (False, True):
            outs = step(fused)
            # A gradient that differs from element to element.
            seeds = [torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype) for out in outs]
            results.append((outs, torch.autograd.grad(outs, leaves, seeds)))
    (want, d_want), (got, d_got) = results
    errors = {f"result {i}": relative_error(g, w) for i, (g, w) in enumerate(zip(got, want, strict=True))}
    return errors | {f"gradient {i}": relative_error(g, w) for i, (g, w) in enumerate(zip(d_got, d_want, strict=True))}


@torch.no_grad()
def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference|| (2-norms, in fp32); infinite where that is no number."""
    difference = (value.float() - reference.float()).norm() / reference.float().norm()
    return difference.item() if difference.isfinite() else float("inf")
