"""The steps around WKV-7: our plain PyTorch, the same compiled, and flash-linear-attention's fused kernels.

Each case is one step of a layer on [B, T, C] rows in bf16, forward and backward of all inputs and parameters; those of
`rwkv7_elementwise` are called as the layers call them. What is compared computes the same thing: `fla_error` is the
largest relative difference (2-norm) of fla's result and gradients from ours, so that no step is chosen for its speed
that is wrong on this device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import spread, take_turns
from dlm_dist.kernels.cross_entropy import weighted_cross_entropy_sum
from dlm_dist.kernels.rwkv7_elementwise import corrected_output, mixes, scaled_key, shift_difference
from dlm_dist.kernels.wkv7 import LOG_DECAY_BOUND
from dlm_dist.models.rwkv7_layers import HeadNorm

HEAD_SIZE = 64
REPEATS = 10
"""Calls of a timing: one alone would time its launch."""

Step = Callable[..., tuple[Tensor, ...] | Tensor]


@dataclass(frozen=True)
class Case:
    """A step: `ours` and `fla` take `inputs`; `fla` is None where fla has none.

    `compiles`: whether a compiler could make anything of ours.
    """

    name: str
    inputs: tuple[Tensor, ...]
    ours: Step
    fla: Step | None = None
    compiles: bool = True


@dataclass(frozen=True)
class HelperSize:
    """B rows of T tokens of C channels; the loss has V ids."""

    rows: int
    length: int
    width: int
    vocabulary: int = 65_536


class Draw:
    """Random tensors on a device, the same for everyone."""

    def __init__(self, size: HelperSize, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self._generator = torch.Generator(device).manual_seed(3)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self._generator, device=self.device)
        return (scale * values).to(self.dtype)

    def row(self) -> Tensor:
        """[B, T, C]"""
        return self(self.size.rows, self.size.length, self.size.width)

    def heads(self) -> Tensor:
        """[B, T, H, N]"""
        return self.row().unflatten(-1, (-1, HEAD_SIZE))

    def vector(self) -> Tensor:
        """[1, 1, C] between 0 and 1."""
        return self(1, 1, self.size.width).sigmoid()


def cases(size: HelperSize, device: torch.device, dtype: torch.dtype, fla: bool = True) -> list[Case]:
    """All steps; without `fla` only ours."""
    draw = Draw(size, device, dtype)
    elementwise = (shift_case, mix_case, shift_mix_case, key_case, normalise_case, decay_case, correction_case)
    modules = (head_norm_case, layer_norm_case, channel_case, loss_case)
    return [make(draw, fla) for make in (*elementwise, *modules)]


# --- the steps -------------------------------------------------------------------------------------------------


def shift_case(draw: Draw, fla: bool) -> Case:
    """The previous token minus this one."""
    return Case("token shift", (draw.row(),), shift_difference, partial(shift_difference, fused=True) if fla else None)


def mix_case(draw: Draw, fla: bool) -> Case:
    """The inputs of the six projections, given the shift."""

    def step(fused: bool) -> Step:
        return lambda x, difference, *weights: mixes(x, difference, weights, fused)

    inputs = (draw.row(), draw.row(), *(draw.vector() for _ in range(6)))
    return Case("six mixes", inputs, step(False), step(True) if fla else None)


def shift_mix_case(draw: Draw, fla: bool) -> Case:
    """Both together, which a compiler can make one of."""

    def step(fused: bool) -> Step:
        return lambda x, *weights: mixes(x, shift_difference(x, fused=fused), weights, fused)

    inputs = (draw.row(), *(draw.vector() for _ in range(6)))
    return Case("token shift and six mixes", inputs, step(False), step(True) if fla else None)


def key_case(draw: Draw, fla: bool) -> Case:
    """The key scaled by the in-context rate."""
    inputs = (draw.row(), draw.row().float().sigmoid(), draw.vector())
    return Case("key scaling", inputs, scaled_key, partial(scaled_key, fused=True) if fla else None)


def normalise_case(draw: Draw, fla: bool) -> Case:
    """The removal key: k * k_k of length one per head."""
    inputs = (draw.row(), draw.vector())

    def ours(k: Tensor, k_k: Tensor) -> Tensor:
        heads = (k.float() * k_k.float()).unflatten(-1, (-1, HEAD_SIZE))
        return F.normalize(heads, dim=-1, eps=1e-12).to(k.dtype)

    if not fla:
        return Case("removal key", inputs, ours)
    from fla.modules.l2norm import l2_norm

    def theirs(k: Tensor, k_k: Tensor) -> Tensor:
        normed: Tensor = l2_norm((k * k_k).unflatten(-1, (-1, HEAD_SIZE)))
        return normed

    return Case("removal key", inputs, ours, theirs)


def decay_case(draw: Draw, fla: bool) -> Case:
    """log w in fp32 of a low-rank map's output; fla's layer does this in PyTorch, too."""

    def ours(mapped: Tensor, w0: Tensor) -> Tensor:
        return LOG_DECAY_BOUND * torch.sigmoid(w0.float() + mapped.float())

    return Case("log decay", (draw.row(), draw.vector()), ours)


def correction_case(draw: Draw, fla: bool) -> Case:
    """The read-out with the current token's own contribution, gated."""
    heads = draw.size.width // HEAD_SIZE
    inputs = (draw.row(), draw.heads(), draw.heads(), draw(heads, HEAD_SIZE, scale=0.1), draw.heads(), draw.row())
    fused = partial(corrected_output, fused=True) if fla else None
    return Case("output correction", inputs, corrected_output, fused)


def head_norm_case(draw: Draw, fla: bool) -> Case:
    """The norm of each head. Modules, so that the parameters are theirs."""
    heads, eps = draw.size.width // HEAD_SIZE, HEAD_SIZE * 1e-5
    ours = HeadNorm(heads, draw.size.width, eps=eps).to(draw.device, draw.dtype)
    if not fla:
        return Case("head norm", (draw.row(),), ours)
    from fla.modules import GroupNorm

    theirs = GroupNorm(num_groups=heads, hidden_size=draw.size.width, bias=True, eps=eps)
    return Case("head norm", (draw.row(),), ours, theirs.to(draw.device, draw.dtype))


def layer_norm_case(draw: Draw, fla: bool) -> Case:
    """The norm of the residual stream."""
    ours = nn.LayerNorm(draw.size.width, eps=1e-5).to(draw.device, draw.dtype)
    if not fla:
        return Case("layer norm", (draw.row(),), ours)
    from fla.modules import LayerNorm

    theirs = LayerNorm(draw.size.width, bias=True, eps=1e-5)
    return Case("layer norm", (draw.row(),), ours, theirs.to(draw.device, draw.dtype))


def channel_case(draw: Draw, fla: bool) -> Case:
    """The whole channel mix. fla's keeps less and computes more again; its model does not use it."""
    width = draw.size.width
    scale = width**-0.5
    inputs = (draw.row(), draw.vector(), draw(width, 4 * width, scale=scale), draw(4 * width, width, scale=scale / 2))

    def ours(x: Tensor, x_k: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.relu(torch.addcmul(x, shift_difference(x), x_k) @ key).square() @ value

    if not fla:
        return Case("channel mix", inputs, ours)
    from fla.ops.rwkv7.channel_mixing import channel_mixing_rwkv7

    def theirs(x: Tensor, x_k: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = channel_mixing_rwkv7(x.clone(), x.new_zeros(x.shape[0], width), x_k, key, value)[0]
        return out

    return Case("channel mix", inputs, ours, theirs)


def loss_case(draw: Draw, fla: bool) -> Case:
    """The head with its cross entropy over all rows."""
    size = draw.size
    count = size.rows * size.length
    inputs = (draw(count, size.width), draw(size.vocabulary, size.width, scale=size.width**-0.5))
    targets = torch.arange(count, device=draw.device) * 7919 % size.vocabulary
    weights = torch.full((count,), 1.0 / count, device=draw.device)

    def ours(hidden: Tensor, head: Tensor) -> Tensor:
        return weighted_cross_entropy_sum(hidden, head, targets, weights)

    if not fla:
        return Case("head and loss", inputs, ours, compiles=False)
    from fla.modules import FusedLinearCrossEntropyLoss

    criterion = FusedLinearCrossEntropyLoss()

    def theirs(hidden: Tensor, head: Tensor) -> Tensor:
        loss: Tensor = criterion(hidden, targets, head)
        return loss

    return Case("head and loss", inputs, ours, theirs, compiles=False)


# --- measuring -------------------------------------------------------------------------------------------------


def results(step: Step, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the step returns and the gradients of `inputs`, and of the parameters where it is a module."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = step(*leaves)
    outs = (outs,) if isinstance(outs, Tensor) else tuple(outs)
    parameters = list(step.parameters()) if isinstance(step, nn.Module) else []
    # Random, so that sums over tokens do not cancel.
    generator = torch.Generator(outs[0].device).manual_seed(4)
    seeds = [torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outs]
    return [out.detach() for out in outs] + list(torch.autograd.grad(outs, [*leaves, *parameters], seeds))


def largest_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest ||got - want|| / ||want||; infinite where that is no number."""
    worst = 0.0
    for value, reference in zip(got, want, strict=True):
        reference = reference.float()
        error = (value.float().reshape(reference.shape) - reference).norm() / reference.norm()
        worst = max(worst, error.item() if error.isfinite() else float("inf"))
    return worst


def repeated(step: Step, inputs: Sequence[Tensor], repeats: int) -> Callable[[], None]:
    """`repeats` forward and backward passes, with gradients of ones made beforehand."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    parameters = list(step.parameters()) if isinstance(step, nn.Module) else []
    outs = step(*leaves)
    seeds = [torch.ones_like(out) for out in ((outs,) if isinstance(outs, Tensor) else outs)]

    def run() -> None:
        for _ in range(repeats):
            torch.autograd.grad(step(*leaves), [*leaves, *parameters], seeds)

    return run


def measure_case(case: Case, device: torch.device, rounds: int, repeats: int, compiled: bool) -> dict[str, Any]:
    """Milliseconds of ours, ours compiled and fla's; what fails says why in its place."""
    steps: dict[str, Step] = {"ours": case.ours}
    if compiled and case.compiles:
        steps["compiled"] = torch.compile(case.ours, dynamic=False)
    if case.fla is not None:
        steps["fla"] = case.fla
    row: dict[str, Any] = {"step": case.name}
    passes: dict[str, Callable[[], None]] = {}
    want = results(case.ours, case.inputs)
    for name, step in steps.items():
        try:
            error = largest_error(results(step, case.inputs), want)
            passes[name] = repeated(step, case.inputs, repeats)
        except Exception as failure:  # a compiler or launch error of one candidate: the others are still measured
            row[f"{name}_failed"] = " ".join([type(failure).__name__, *str(failure).strip().splitlines()[:1]])
            continue
        if name != "ours":
            row[f"{name}_error"] = error
    times = take_turns(passes, device, rounds)
    row |= {f"{name}_ms": spread([1e3 * value / repeats for value in values]) for name, values in times.items()}
    return row


def measure_helpers(
    size: HelperSize, device: torch.device, rounds: int, fla: bool = True, compiled: bool = True, repeats: int = REPEATS
) -> list[dict[str, Any]]:
    """One row for each step."""
    rows = []
    for case in cases(size, device, torch.bfloat16, fla):
        rows.append(measure_case(case, device, rounds, repeats, compiled))
        torch.compiler.reset()
    return rows
