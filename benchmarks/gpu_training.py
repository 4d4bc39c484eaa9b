"""Whole training steps on a GPU, ours beside flash-linear-attention's model, and a profile of where ours spends them.

Both systems: bf16 weights and gradients, fp32 masters, clipping at 1 and torch's fused AdamW over the masters (what a
bf16 run does on one rank), the same initial values and the same random ids. `ar` supervises every position with the
next token, `masked` hides and supervises half of the positions. fla's loss cannot leave out rows, so its model gets
ignored labels there. MFU counts the same model FLOPs for both: the head on supervised rows, backward twice the
forward, nothing for what is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from benchmarks.machine import PeakMemory, spread, synchronize, take_turns
from dlm_dist import models

OBJECTIVES = ("ar", "masked")
GOALS = {"ar": 1.0, "masked": 1.3}
"""Tokens per second of ours over those of fla's model that the project asks for."""


@dataclass(frozen=True)
class ModelSize:
    """A model and the rows of a step."""

    name: str
    hidden: int
    layers: int
    rows: int
    length: int
    vocabulary: int = 65_536

    def build(self) -> Any:
        """Our model in fp32, on the host."""
        return models.build(
            "rwkv7",
            seed=0,
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            mask_token_id=self.vocabulary - 1,
            direction="causal",
        )


@dataclass(frozen=True)
class Batch:
    """Rows of one step, on the device."""

    input_ids: Tensor
    """[B, T]"""
    targets: Tensor
    """[B, T]"""
    supervised: Tensor
    """[M] indices into B*T."""

    @staticmethod
    def draw(size: ModelSize, objective: str, device: torch.device) -> Batch:
        """Random ids; `masked` hides every position with probability one half."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(size.vocabulary - 1, (size.rows, size.length + 1), generator=generator)
        if objective == "ar":
            inputs, targets = ids[:, :-1], ids[:, 1:]
            supervised = torch.arange(targets.numel())
        else:
            targets = ids[:, 1:]
            hidden = torch.rand(targets.shape, generator=generator) < 0.5
            inputs = targets.masked_fill(hidden, size.vocabulary - 1)
            supervised = hidden.flatten().nonzero().squeeze(1)
        return Batch(*(x.contiguous().to(device) for x in (inputs, targets, supervised)))


def our_loss(model: Any, batch: Batch) -> Tensor:
    """The mean cross entropy of the supervised positions by our model."""
    count = batch.supervised.numel()
    weights = torch.full((count,), 1.0 / count, device=batch.supervised.device)
    targets = batch.targets.flatten()[batch.supervised]
    loss: Tensor = model(input_ids=batch.input_ids, supervised=batch.supervised, targets=targets, weights=weights)
    return loss


def peer_loss(model: Any, batch: Batch) -> Tensor:
    """The same by fla's model."""
    labels = torch.full_like(batch.targets, -100)
    labels.view(-1)[batch.supervised] = batch.targets.flatten()[batch.supervised]
    loss: Tensor = model(input_ids=batch.input_ids, shift_labels=labels, use_cache=False).loss
    return loss


class TrainingStep:
    """Loss, gradients, clipping, fused AdamW on fp32 masters. Takes over `model`, whose weights are of one dtype."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Batch], Tensor]) -> None:
        self.model = model.train()
        self.loss = loss
        self.weights: list[Tensor] = list(model.parameters())
        self.masters: list[Tensor] = [nn.Parameter(weight.detach().float().clone()) for weight in self.weights]
        self.gradients = [torch.zeros_like(master) for master in self.masters]
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1, fused=True)

    def __call__(self, batch: Batch) -> Tensor:
        """One step -> its loss, 0-d, on the device."""
        loss = self.loss(self.model, batch)
        loss.backward()
        torch._foreach_copy_(self.gradients, [_gradient(weight) for weight in self.weights])
        for weight in self.weights:
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return loss.detach()


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None, "a parameter outside the loss"
    return weight.grad


def build_steps(size: ModelSize, device: torch.device, peer: bool) -> dict[str, TrainingStep]:
    """Ours and, with `peer`, fla's, from the same initial values."""
    model = size.build()
    steps = {}
    if peer:
        from benchmarks.fla_peer import build_peer

        steps["fla"] = TrainingStep(build_peer(model, device, torch.bfloat16), peer_loss)
    return {"ours": TrainingStep(model.to(device, torch.bfloat16), our_loss), **steps}


def measure_training(
    size: ModelSize, device: torch.device, rounds: int, peak: float, peer: bool = True
) -> list[dict[str, Any]]:
    """Rows for both objectives: tokens per second, MFU against `peak` FLOP/s, loss, memory, speed over fla's."""
    rows: list[dict[str, Any]] = []
    steps = build_steps(size, device, peer)
    model: Any = steps["ours"].model
    tokens = size.rows * size.length
    batches = {objective: Batch.draw(size, objective, device) for objective in OBJECTIVES}
    losses = {
        (objective, name): step.loss(step.model, batch).item()
        for objective, batch in batches.items()
        for name, step in steps.items()
    }
    for objective, batch in batches.items():
        head = model.head_flops_per_row() * batch.supervised.numel()
        flops = 3.0 * (model.flops_per_token(size.length) * tokens + head)
        memory = {name: step_memory(step, batch, device) for name, step in steps.items()}
        times = take_turns({name: partial(step, batch) for name, step in steps.items()}, device, rounds)
        for name, seconds in times.items():
            row: dict[str, Any] = {"model": size.name, "objective": objective, "system": name}
            row |= {"supervised": batch.supervised.numel() / tokens, "loss": losses[objective, name]}
            row |= {"tokens_per_second": spread([tokens / value for value in seconds])}
            row |= {"mfu": spread([flops / value / peak for value in seconds]), "peak_gb": memory[name]}
            if peer:
                pairs = zip(seconds, times["fla"], strict=True)
                row |= {"speed_over_fla": spread([other / value for value, other in pairs])}
            if peer and name == "ours":
                row |= {"goal": GOALS[objective], "met": row["speed_over_fla"]["median"] >= GOALS[objective]}
            rows.append(row)
    return rows


def step_memory(step: TrainingStep, batch: Batch, device: torch.device) -> float | None:
    """GB that a step has at its highest: its weights, masters and optimizer states, and what comes and goes.

    None on CPU, where other systems of the process would count. The first step makes the optimizer states.
    """
    if device.type != "cuda":
        return None
    step(batch)
    with PeakMemory(device) as memory:
        step(batch)
    states = [tensor for state in step.optimizer.state.values() for tensor in state.values()]
    kept = [*step.weights, *step.masters, *step.gradients, *states]
    return (memory.bytes + sum(tensor.nbytes for tensor in kept)) / 1e9


# --- profile ---------------------------------------------------------------------------------------------------

# Autograd functions and optimizers: all that runs inside them is theirs.
_OWNERS = (
    ("loss", ("BlockedCrossEntropy", "FusedLinearCrossEntropy")),
    ("WKV", ("ChunkedWKV7", "ChunkDPLR")),
    ("optimizer", ("Optimizer.step", "_fused_adamw", "_foreach_")),
)
# Of the rest, ops by what they do; the innermost that has a kind decides.
_KINDS = (
    ("matrix products", ("aten::mm", "aten::bmm", "aten::addmm", "aten::matmul", "MmBackward")),
    ("norm", ("layer_norm", "LayerNorm", "group_norm", "GroupNorm", "L2Norm")),
    ("embedding", ("aten::embedding", "EmbeddingBackward")),
    ("copies", ("aten::copy_", "aten::cat", "aten::clone", "Memcpy", "Memset")),
)
# Kernels by name, where no op says it: Triton's are launched from Python.
_KERNELS = (
    ("WKV", ("dplr", "wy_repr", "wu_fwd", "rwkv6")),
    ("matrix products", ("gemm", "cutlass", "cublas", "nvjet", "splitk")),
    ("norm", ("layer_norm", "l2norm")),
    ("copies", ("memcpy", "memset")),
)


def group_of(event: Any) -> str:
    """The group of what an op itself ran, by its own name and those of the ops and functions around it."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    owner = next((group for group, marks in _OWNERS if any(mark in name for name in names for mark in marks)), None)
    kinds = (group for name in names for group, marks in _KINDS if any(mark in name for mark in marks))
    kind = next(kinds, "elementwise")
    if owner == "loss":
        return "loss: matrix products" if kind == "matrix products" else "loss: the rest"
    return owner or kind


def kernel_group(kernel: str) -> str:
    """The group of a kernel by its name alone."""
    name = kernel.lower()
    return next((group for group, marks in _KERNELS if any(mark in name for mark in marks)), "elementwise")


def group_events(events: Sequence[Any], on_device: bool) -> dict[str, float]:
    """Microseconds by group. On a device the kernels', attributed to the op that launched them; else the ops' own.

    Kernels that the profiler links to no op are grouped by their names.
    """
    groups: dict[str, float] = {}
    unlinked: dict[str, float] = {}

    def add(sums: dict[str, float], key: str, microseconds: float) -> None:
        sums[key] = sums.get(key, 0.0) + microseconds

    for event in events:
        if event.device_type == DeviceType.CPU:
            owner = group_of(event)
            if not on_device:
                add(groups, owner, event.self_cpu_time_total)
            for kernel in event.kernels if on_device else ():
                add(groups, kernel_group(kernel.name) if owner == "elementwise" else owner, kernel.duration)
                add(unlinked, kernel.name, -kernel.duration)
        elif on_device and not event.is_user_annotation:
            add(unlinked, event.name, event.time_range.elapsed_us())
    for name, microseconds in unlinked.items():
        if microseconds > 0.0:
            add(groups, kernel_group(name), microseconds)
    return groups


def measure_profile(size: ModelSize, device: torch.device, steps: int = 3) -> list[dict[str, Any]]:
    """Where our step's time goes on the AR objective: milliseconds and share, by group.

    The row "idle" is what the kernels' time leaves of a step that is timed without the profiler.
    """
    step = build_steps(size, device, peer=False)["ours"]
    batch = Batch.draw(size, "ar", device)
    for _ in range(2):
        step(batch)
    on_device = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_device:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step(batch)
        synchronize(device)
    groups = group_events(profiler.events(), on_device)
    busy = sum(groups.values())
    if not busy:
        raise RuntimeError("the profiler saw no kernel: CUPTI does not work on this machine")
    wall = spread(take_turns({"ours": partial(step, batch)}, device, steps)["ours"])["median"] * 1e6 * steps
    groups["idle"] = max(0.0, wall - busy)
    total = busy + groups["idle"]
    ordered = sorted(groups.items(), key=lambda item: -item[1])
    return [
        {"model": size.name, "group": group, "ms_per_step": value / steps / 1e3, "percent": 100.0 * value / total}
        for group, value in ordered
    ]
