"""Initial values of RWKV-7 against the formulas of BlinkDL's trainer, written out once more by element.

His model's own initialisation and the pass over it that his trainer adds are both applied, the second one last, so
matrices are orthogonal with a gain and not uniform. What he leaves undefined, a single layer, divides by zero there.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm_dist.models import build
from dlm_dist.models.rwkv7 import lora_ranks

V = 160


def initial(layers: int, width: int, head: int, **sizes: Any) -> dict[str, Tensor]:
    """The initial state dict in fp64."""
    sizes = {"vocab_size": V, "head_size": head, "mask_token_id": V - 1} | sizes
    model = build("rwkv7", seed=11, hidden_size=width, num_hidden_layers=layers, **sizes)
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def deterministic(layer: int, layers: int, width: int, head: int) -> dict[str, list[float]]:
    """Every value of a block that is not drawn, as a flat list."""
    up = layer / (layers - 1) if layers > 1 else 0.0
    down = 1.0 - layer / layers
    table: dict[str, list[float]] = {}

    def put(name: str, value: float) -> None:
        table.setdefault(name, []).append(value)

    for i in range(width):
        share = i / width
        linear = i / (width - 1) - 0.5
        z = ((i % head) - (head - 1) / 2) / ((head - 1) / 2)
        zigzag = z * abs(z)
        for name, exponent in (("r", 0.2), ("g", 0.2), ("w", 0.9), ("a", 0.9), ("k", 0.7), ("v", 0.7)):
            put(f"att.x_{name}", 1.0 - share ** (exponent * down))
        put("ffn.x_k", 1.0 - share ** (down**4))
        put("att.w0", -6.0 + 6.0 * (i / (width - 1)) ** (1.0 + up**0.3) + 0.5 + 2.5 * zigzag)
        put("att.a0", -0.19 + 0.3 * zigzag + 0.4 * linear)
        put("att.v0", 0.73 - 0.4 * linear)
        put("att.k_k", 0.71 - 0.1 * linear)
        put("att.k_a", 1.02)
        put("att.r_k", -0.04)
        put("att.ln_x.weight", ((layer + 1) / layers) ** 0.7)
        put("att.ln_x.bias", 0.0)
        for norm in ("ln0", "ln1", "ln2") if layer == 0 else ("ln1", "ln2"):
            put(f"{norm}.weight", 1.0)
            put(f"{norm}.bias", 0.0)
    return table


@pytest.mark.parametrize(("layers", "width", "head"), [(1, 128, 64), (2, 128, 64), (5, 96, 32), (12, 64, 64)])
def test_every_value_that_is_not_drawn_is_that_of_the_formulas(layers: int, width: int, head: int) -> None:
    values = initial(layers, width, head)
    left = set(values)
    for layer in range(layers):
        for name, numbers in deterministic(layer, layers, width, head).items():
            full = f"blocks.{layer}.{name}"
            want = torch.tensor(numbers, dtype=torch.float64)
            error = (values[full].flatten() - want).abs().max().item()
            assert error <= 2**-23 * max(1.0, want.abs().max().item()), (full, error)
            left.remove(full)
        for name in ("att.w1", "att.a1", "att.v1", "att.g1", "att.output.weight", "ffn.value.weight"):
            assert not values[f"blocks.{layer}.{name}"].any(), name
            left.remove(f"blocks.{layer}.{name}")
    assert values["ln_out.weight"].eq(1).all()
    assert not values["ln_out.bias"].any()
    drawn = {"att.receptance.weight", "att.key.weight", "att.value.weight", "ffn.key.weight"}
    drawn |= {f"att.{kind}2" for kind in "wavg"}
    blocks = {f"blocks.{layer}.{name}" for layer in range(layers) for name in drawn}
    assert left == blocks | {"emb.weight", "head.weight", "ln_out.weight", "ln_out.bias"}


def check_orthogonal(name: str, x: Tensor, gain: float) -> None:
    """Orthonormal rows or columns times `gain`, uniformly distributed among all such matrices."""
    rows, columns = x.shape
    product = x @ x.T if rows <= columns else x.T @ x
    identity = torch.eye(min(rows, columns), dtype=torch.float64)
    torch.testing.assert_close(product, gain**2 * identity, atol=2e-6 * gain**2, rtol=0, msg=name)
    # Entries have mean 0 and variance gain^2 / longer side. The bounds are four standard errors.
    spread = gain / math.sqrt(max(rows, columns))
    assert abs(x.mean().item()) < 4 * spread / math.sqrt(x.numel()), name
    diagonal = x.diagonal()
    assert abs(diagonal.mean().item()) < 4 * spread / math.sqrt(len(diagonal)), name


@pytest.mark.parametrize("layers", [1, 3])
def test_every_drawn_value_has_its_distribution(layers: int) -> None:
    width = 128
    ranks = {"w": 32, "a": 48, "v": 16, "g": 200}  # one of them is larger than the width
    names = {"w": "decay", "a": "a", "v": "v", "g": "gate"}
    values = initial(layers, width, 64, **{f"{names[kind]}_low_rank_dim": rank for kind, rank in ranks.items()})
    seen = []
    for layer in range(layers):
        gains = {"att.receptance.weight": 1.0, "att.value.weight": 1.0, "att.key.weight": 0.1, "ffn.key.weight": 1.0}
        for kind, rank in ranks.items():
            gains[f"att.{kind}2"] = 0.1 * (math.sqrt(rank / width) if rank > width else 1.0)
        for name, gain in gains.items():
            full = f"blocks.{layer}.{name}"
            check_orthogonal(full, values[full], gain)
            seen.append(values[full].flatten()[:64] / gain)
    # No two of them were drawn alike.
    pairs = torch.corrcoef(torch.stack(seen)) - torch.eye(len(seen))
    assert pairs.abs().max() < 5 / math.sqrt(64)
    emb = values["emb.weight"]
    assert emb.abs().max() <= 1e-4
    assert emb.abs().max() > 0.999e-4
    assert abs(emb.mean().item()) < 4 * 1e-4 / math.sqrt(3 * emb.numel())
    # The standard deviation of a uniform sample errs by sqrt(1 / 5 n) of itself.
    assert emb.std().item() == pytest.approx(1e-4 / math.sqrt(3), rel=4 * math.sqrt(0.2 / emb.numel()))


@pytest.mark.parametrize(
    ("rows", "gain"), [(64, 0.5), (128, 0.5), (160, 0.5 * math.sqrt(160 / 128)), (1024, math.sqrt(2))]
)
def test_the_gain_of_the_head_follows_the_vocabulary(rows: int, gain: float) -> None:
    head = initial(1, 128, 64, vocab_size=rows, mask_token_id=0)["head.weight"]
    check_orthogonal("head", head, gain)


def test_a_new_model_predicts_nothing_yet_whatever_it_reads() -> None:
    """Zero output projections: the logits of a token depend on that token's embedding alone."""
    model = build(
        "rwkv7", seed=1, vocab_size=V, hidden_size=64, num_hidden_layers=2, mask_token_id=0, direction="causal"
    )
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        logits = model(ids).logits
        alone = model(ids.view(40, 1)).logits.view(2, 20, -1)
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-6)


def test_the_number_of_threads_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    values = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            values.append(initial(1, 128, 64))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for name, tensor in values[0].items():
        assert torch.equal(tensor, values[1][name]), name


@pytest.mark.parametrize(
    ("width", "current", "released"),
    [
        (768, (64, 64, 32, 128), (64, 64, 32, 128)),
        (1024, (64, 64, 64, 160), (64, 64, 32, 160)),
        (2048, (128, 128, 64, 224), (96, 96, 64, 256)),
        (2560, (128, 128, 96, 256), (96, 96, 64, 320)),
        (4096, (160, 160, 96, 320), (128, 128, 96, 480)),
    ],
)
def test_both_published_rules_of_ranks(width: int, current: tuple[int, ...], released: tuple[int, ...]) -> None:
    assert lora_ranks(width) == lora_ranks(width, "current") == current
    assert lora_ranks(width, "released") == released
