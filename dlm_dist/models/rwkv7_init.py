"""RWKV-7's initial values, each a pure function of (seed, parameter name, sizes).

The values are those of BlinkDL's x070 trainer (RWKV-LM, RWKV-v7/train_temp), where the model's own initialisation
is partly overridden by a second pass before training; what is here is the outcome of both. Each drawn parameter
has its own generator, so a value depends neither on the order of drawing nor on what else the model holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm_dist.randomness import derive_seed


@dataclass(frozen=True)
class InitSizes:
    """What initial values depend on beside a parameter's name and shape."""

    num_layers: int
    hidden_size: int
    head_size: int
    direction_gate_init: float = 0.0
    seed_gate_init: float = 0.0


# Exponents e of the token-shift weights: x_s = 1 - (i / C) ** (e * (1 - l / L)).
_SHIFT_EXPONENTS = {"x_r": 0.2, "x_g": 0.2, "x_w": 0.9, "x_a": 0.9, "x_k": 0.7, "x_v": 0.7}
_ORTHOGONAL_GAINS = {
    "att.receptance.weight": 1.0,
    "att.value.weight": 1.0,
    "att.key.weight": 0.1,
    "ffn.key.weight": 1.0,
}
_ZERO = {"att.output.weight", "ffn.value.weight", "att.direction_gate.weight", "att.ln_x.bias"}
_LAYER_NORM = re.compile(r"ln(0|1|2|_out)\.(weight|bias)$")


def initialize_(parameters: Mapping[str, Tensor], sizes: InitSizes, seed: int) -> None:
    """Set each parameter, by name, to its `initial_value`.

    As many are drawn at once as torch has threads, each on one thread: a large model is then ready in minutes, and
    the number of threads changes no bit.
    """

    @torch.no_grad()
    def draw(name: str) -> None:
        parameters[name].copy_(initial_value(name, parameters[name].shape, sizes, seed))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, parameters))
    finally:
        torch.set_num_threads(threads)


def initial_value(name: str, shape: torch.Size, sizes: InitSizes, seed: int) -> Tensor:
    """The fp32 initial value of the parameter `name` (BlinkDL's names, and those of `TimeMix`) on the CPU."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "init", name))
    if name == "emb.weight":
        return torch.empty(shape).uniform_(-1e-4, 1e-4, generator=generator)
    if name == "head.weight":
        vocab_size, hidden_size = shape
        return _orthogonal(shape, 0.5 * math.sqrt(max(1.0, vocab_size / hidden_size)), generator)
    if _LAYER_NORM.search(name):
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    assert match, f"no initial value is known for {name}"
    return _block_value(match[2].replace("att.backward_mix.", "att."), int(match[1]), shape, sizes, generator)


def _block_value(name: str, layer: int, shape: torch.Size, sizes: InitSizes, generator: torch.Generator) -> Tensor:
    """The value of `blocks.<layer>.<name>`."""
    hidden_size = sizes.hidden_size
    from_top = 1.0 - layer / sizes.num_layers
    depth = layer / max(1, sizes.num_layers - 1)
    channel = torch.arange(hidden_size, dtype=torch.float64)
    position = channel / hidden_size
    ramp = channel / max(1, hidden_size - 1)
    linear = ramp - 0.5
    middle = (sizes.head_size - 1) / 2
    zigzag = (channel % sizes.head_size - middle) / max(middle, 0.5)
    zigzag = zigzag * zigzag.abs()
    kind = name.removeprefix("att.")
    if kind in _SHIFT_EXPONENTS:
        value = 1.0 - position ** (_SHIFT_EXPONENTS[kind] * from_top)
    elif name == "ffn.x_k":
        value = 1.0 - position ** (from_top**4)
    elif kind == "w0":
        value = -5.5 + 6.0 * ramp ** (1.0 + depth**0.3) + 2.5 * zigzag
    elif kind == "a0":
        value = -0.19 + 0.3 * zigzag + 0.4 * linear
    elif kind == "v0":
        value = 0.73 - 0.4 * linear
    elif kind == "k_k":
        value = 0.71 - 0.1 * linear
    elif kind in ("k_a", "r_k", "direction_gate.bias", "seed_gate"):
        gates = {"direction_gate.bias": sizes.direction_gate_init, "seed_gate": sizes.seed_gate_init}
        return torch.full(shape, ({"k_a": 1.02, "r_k": -0.04} | gates)[kind])
    elif kind == "ln_x.weight":
        return torch.full(shape, ((layer + 1) / sizes.num_layers) ** 0.7)
    elif kind in ("w1", "a1", "v1", "g1") or name in _ZERO:
        return torch.zeros(shape)
    elif kind in ("w2", "a2", "v2", "g2"):
        return _orthogonal(shape, 0.1 * math.sqrt(max(1.0, shape[0] / shape[1])), generator)
    else:
        assert name in _ORTHOGONAL_GAINS, f"no initial value is known for {name}"
        return _orthogonal(shape, _ORTHOGONAL_GAINS[name], generator)
    return value.to(torch.float32).reshape(shape)


def _orthogonal(shape: torch.Size, gain: float, generator: torch.Generator) -> Tensor:
    """Orthonormal rows or columns, whichever are fewer, times `gain`."""
    threads = torch.get_num_threads()
    # The last bits of a QR depend on how many threads share it, and initial values must not.
    torch.set_num_threads(1)
    try:
        return torch.nn.init.orthogonal_(torch.empty(shape), gain, generator=generator)
    finally:
        torch.set_num_threads(threads)
