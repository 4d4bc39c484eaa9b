"""The model FLOPs behind MFU, beside what PyTorch counts while a step of each objective really runs.

PyTorch's counter sees matrix products alone, and every one that runs; so what the formula leaves out or has elsewhere
is put in by name: logits that the backward pass computes again, pairs of tokens that a dense mask hides, and for RWKV-7
the recurrence, whose tests come after.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dlm_dist import models
from dlm_dist.config import BatchPlan
from dlm_dist.diffusion.objectives import OBJECTIVES, Vocabulary
from dlm_dist.kernels.wkv7_chunked import wkv7_chunked
from dlm_dist.models import rwkv7_layers
from dlm_dist.training.batches import gather_totals, prepare_step
from dlm_dist.training.flops import step_flops
from tests.diffusion.test_block_diffusion import rows

LENGTH, VOCABULARY = 16, Vocabulary(mask_id=30, eos_id=0, size=30)
CASES = {
    "mdlm": {},
    "mdlm, 2 draws": {"draws_per_row": 2},
    "mdlm, cut rows": {"random_length_prob": 0.5},
    "soft_ce": {},
    "wsd": {},
    "ar": {},
    "card": {},
    "block": {"block_lengths": ((0, 4),)},
    "block, later longer": {"block_lengths": ((0, 4), (0, 8))},
    "block, whole rows": {"block_lengths": ((0, 0),)},
}


def step_of(case: str):
    """(configuration, micro-batches, totals) of a step of 6 rows."""
    name = case.split(",")[0]
    objective = OBJECTIVES[name](seed=1, vocabulary=VOCABULARY, **CASES[case])
    read = rows(6, LENGTH)
    step = prepare_step(lambda at: read[at[0] : at[-1] + 1], objective, read.positions, BatchPlan(6, 3, 2), 0, 1)
    phases = CASES[case].get("block_lengths")
    config = SimpleNamespace(
        data=SimpleNamespace(sequence_length=LENGTH), objective=SimpleNamespace(name=name, block_lengths=phases)
    )
    return config, step.micro_batches, gather_totals(step, None, ready=False, alarm=False)


def product_flops(total, left, right, out_shape=None, **settings) -> int:
    """Of addmm_, which the counter does not know."""
    return 2 * left[0] * left[1] * right[1]


def counted(model, micro_batches, **settings) -> int:
    """FLOPs of the matrix products of forward and backward."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flops})
    # PyTorch counts none of its fused CPU attention, so the plain one is asked for.
    with sdpa_kernel(SDPBackend.MATH), counter:
        for inputs in micro_batches:
            model(**inputs, **settings).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("case", "layers"),
    [
        *((case, None) for case in CASES),
        ("mdlm", ["window:5", "block_causal:8"]),
        ("block", ["window:5", "block_causal:8"]),
        ("ar", ["window:5"]),
    ],
)
def test_qwen3_is_counted_to_the_last_flop(case, layers):
    causal = case in ("ar", "card")
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    direction = "causal" if causal else "bidirectional"
    model = models.build("qwen3", seed=0, **sizes, mask_token_id=30, direction=direction, layer_patterns=layers)
    config, micro_batches, totals = step_of(case)
    formula = step_flops(model, config, totals, position=0)
    settings = {"label_smoothing": 0.1} if case == "soft_ce" else {}
    found = counted(model, micro_batches, **settings)
    again = model.head_flops_per_row() * totals.supervised
    # A dense mask costs its hidden pairs too: of every token with all tokens of its row, in both streams.
    width = 2 * LENGTH if "clean_ids" in micro_batches[0] else LENGTH
    block = CASES[case].get("block_lengths", ((0, 0),))[0][1] or None if case.startswith("block") else None
    if case == "block, later longer":
        block = 8  # the first phase is empty
    seen = sum(pattern.mean_keys(LENGTH, causal, block) for pattern in model.config.patterns())
    hidden = 3 * totals.read * 2 * 2 * 32 * (2 * width - seen)
    assert found == pytest.approx(formula + again + hidden, rel=1e-12)
    if not causal and layers is None and not case.startswith("block"):
        assert hidden == 0


DIRECTIONS = {
    "causal": {"direction": "causal"},
    "tied": {"direction": "bidirectional", "tie_directions": True},
    "separate": {"direction": "bidirectional"},
    "alternate": {"direction": "alternate"},
    "inject": {"direction": "dw_jrt", "dw_jrt_variant": "inject"},
}
CHANNELS, LAYERS, HEAD = 32, 3, 8


def rwkv7(direction: str):
    ranks = {f"{name}_low_rank_dim": 8 for name in ("decay", "a", "v", "gate")}
    sizes = {"vocab_size": 40, "hidden_size": CHANNELS, "num_hidden_layers": LAYERS, "head_size": HEAD}
    return models.build("rwkv7", seed=0, **sizes, **ranks, mask_token_id=30, **DIRECTIONS[direction])


def scans(direction: str) -> int:
    """Recurrences over a row in all layers."""
    return {"tied": 2 * LAYERS, "separate": 2 * LAYERS, "inject": 2 * LAYERS - 1}.get(direction, LAYERS)


def no_recurrence(r, log_w, k, v, a, b, initial_state=None, cu_seqlens=None, kernel="auto"):
    """Stands for WKV-7 without a single product, in which every input has a gradient."""
    out = v * (r + log_w + k + a + b)
    states = len(v) if cu_seqlens is None else len(cu_seqlens) - 1
    state = v.new_zeros(states, *v.shape[2:], v.shape[-1])
    if initial_state is not None:
        return out + initial_state.sum(), state + initial_state + v.sum()
    return out, state + v.sum()


@pytest.mark.parametrize(
    ("case", "direction"),
    [
        ("ar", "causal"),
        ("mdlm, cut rows", "tied"),
        ("mdlm, 2 draws", "separate"),
        ("mdlm", "inject"),
        ("block", "tied"),
        ("block, later longer", "separate"),
        ("block", "alternate"),
    ],
)
def test_rwkv7_is_counted_to_the_last_flop_around_its_recurrence(case, direction, monkeypatch):
    monkeypatch.setattr(rwkv7_layers, "wkv7", no_recurrence)
    model = rwkv7(direction)
    config, micro_batches, totals = step_of(case)
    recurrence = 3 * totals.read * scans(direction) * 9 * CHANNELS * HEAD
    formula = step_flops(model, config, totals, position=0) - recurrence
    again = model.head_flops_per_row() * totals.supervised
    products = 0
    if "clean_ids" in micro_batches[0]:
        # What the states before blocks cost beside the recurrence: an N x N product per head and block, in the layers
        # that scan from left to right. Backward too, but for the first state, which is zero, and the last, which no
        # block starts from; the transfers of `no_recurrence` have no gradient.
        blocks, layers = len(micro_batches[0]["block_ids"].unique()), 2 if direction == "alternate" else LAYERS
        products = layers * 6 * (blocks + blocks - 2)
    found = counted(model, micro_batches)
    assert found == pytest.approx(formula + again + products * 2 * CHANNELS * HEAD**2, rel=1e-12)


def recurrence_of_products(r, log_w, k, v, a, b, initial_state=None, cu_seqlens=None, kernel="auto"):
    """WKV-7 token by token, everything but the decay as batched matrix products, which the counter sees."""
    assert cu_seqlens is None
    batch, length, heads, size = v.shape
    state = v.new_zeros(batch * heads, size, size) if initial_state is None else initial_state.flatten(0, 1)

    def column(x, t):
        return x[:, t].reshape(batch * heads, size, 1)

    outs = []
    for t in range(length):
        removed = torch.bmm(column(a, t).mT, state)
        state = column(log_w, t).exp() * state
        state = state + torch.bmm(column(b, t), removed) + torch.bmm(column(k, t), column(v, t).mT)
        outs.append(torch.bmm(column(r, t).mT, state).view(batch, heads, size))
    return torch.stack(outs, 1), state.view(batch, heads, size, size)


@pytest.mark.parametrize("direction", ["causal", "separate"])
def test_the_recurrence_of_rwkv7_has_9_n_flops_per_channel_and_token(direction, monkeypatch):
    """Of which the counter does not see the decay: N, and 2 N backward. The rest is counted but at a row's two ends."""
    model = rwkv7(direction)
    ids = torch.randint(0, 30, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    found = {}
    for kernel in (recurrence_of_products, no_recurrence):
        monkeypatch.setattr(rwkv7_layers, "wkv7", kernel)
        with FlopCounterMode(display=False) as counter:
            logits = model(ids).logits
        forward = counter.get_total_flops()
        with counter:
            logits.square().sum().backward()
        found[kernel] = np.array([forward, counter.get_total_flops()])
    forward, backward = found[recurrence_of_products] - found[no_recurrence]
    per_token = scans(direction) * CHANNELS * HEAD * ids.numel()
    assert forward == 8 * per_token
    # The state before the first token needs no gradient, nor does the one behind the last.
    assert backward == pytest.approx(16 * per_token, rel=2 / LENGTH)
    operands = [torch.rand(2, LENGTH, 4, HEAD, dtype=torch.float64) for _ in range(6)]
    operands[1] = -0.5 * operands[1]
    for ours, theirs in zip(recurrence_of_products(*operands), wkv7_chunked(*operands), strict=True):
        torch.testing.assert_close(ours, theirs)
