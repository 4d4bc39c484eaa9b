"""RWKV-7: equations against a token-by-token fp64 reading of them, initial values, who sees whom, round trips."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlm_dist.models.documents import Documents
from dlm_dist.models.rwkv7 import (
    LoraRanks,
    RWKV7Config,
    RWKV7ForDiffusion,
    TimeMix,
    lora_ranks,
)
from dlm_dist.models.rwkv7_layers import DepthSeed

V, C, N, L = 61, 64, 16, 3
KINDS = {
    "causal": {"direction": "causal"},
    "tied": {"direction": "bidirectional", "tie_directions": True},
    "separate": {"direction": "bidirectional", "tie_directions": False, "direction_gate_init": 4.0},
    "alternate": {"direction": "alternate"},
    "seed": {"direction": "dw_jrt", "dw_jrt_scale": 2.0},
    "gated seed": {"direction": "dw_jrt", "dw_jrt_gate": True},
    "inject": {"direction": "dw_jrt", "dw_jrt_variant": "inject", "dw_jrt_scale": 0.5},
}


def make(kind: str = "causal", trained: bool = True, **changes) -> RWKV7ForDiffusion:
    """A small model; `trained` moves every parameter off its initial value, so that no term is switched off."""
    sizes = {"vocab_size": V, "hidden_size": C, "num_hidden_layers": L, "head_size": N, "mask_token_id": V - 1}
    low_rank = {f"{x}_low_rank_dim": 8 for x in ("decay", "a", "v", "gate")}
    model = RWKV7ForDiffusion(RWKV7Config(**{**sizes, **low_rank, **KINDS[kind], **changes}))
    model.initialize_(5)
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                scale = 1.0 if name == "emb.weight" else 0.5 if name.endswith("w0") else 0.1
                p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


def tokens(batch: int = 2, length: int = 40) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(2))


# The equations, one token after the other, on plain tensors of a state dict.


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5) * weight + bias


def time_mix(
    p: dict[str, Tensor], xs: list[Tensor], v_firsts: list[Tensor] | None, start: Tensor | None, leak: Tensor | None
) -> tuple[list, list, Tensor]:
    """All tokens of one document through one time mix; `p` holds its parameters without their prefix."""
    heads = C // N
    state = torch.zeros(heads, N, N, dtype=torch.float64) if start is None else start.clone()  # [value, key]
    last = torch.zeros(C, dtype=torch.float64)
    outs, values = [], []
    for t, x in enumerate(xs):
        mixed = {s: x + (last - x) * p[f"x_{s}"].flatten() for s in "rwkvag"}
        last = x
        r = p["receptance.weight"] @ mixed["r"]
        k0 = p["key.weight"] @ mixed["k"]
        v = p["value.weight"] @ mixed["v"]
        d = p["w0"].flatten() + torch.tanh(mixed["w"] @ p["w1"]) @ p["w2"]
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(d))
        a = torch.sigmoid(p["a0"].flatten() + (mixed["a"] @ p["a1"]) @ p["a2"])
        g = torch.sigmoid(mixed["g"] @ p["g1"]) @ p["g2"]
        if v_firsts is not None:
            v = v + (v_firsts[t] - v) * torch.sigmoid(p["v0"].flatten() + (mixed["v"] @ p["v1"]) @ p["v2"])
        values.append(v)
        k = k0 * (1 + (a - 1) * p["k_a"].flatten())
        y = []
        for h in range(heads):
            at = slice(h * N, (h + 1) * N)
            kk = (k0 * p["k_k"].flatten())[at]
            kk = kk / max(float(kk.norm()), 1e-12)
            removed = state[h] @ (-kk)
            state[h] = state[h] * w[at] + torch.outer(removed, kk * a[at]) + torch.outer(v[at], k[at])
            if leak is not None:
                state[h] = state[h] + leak[h] * (1 - w[at])
            o = state[h] @ r[at]
            o = (o - o.mean()) / torch.sqrt(o.var(unbiased=False) + 64e-5)
            o = o * p["ln_x.weight"][at] + p["ln_x.bias"][at]
            y.append(o + (r[at] * k[at] * p["r_k"][h]).sum() * v[at])
        outs.append(p["output.weight"] @ (torch.cat(y) * g))
    return outs, values if v_firsts is None else v_firsts, state


def depth_start(config: RWKV7Config, p: dict[str, Tensor], below: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The state that a layer starts from and the one that leaks in, given the final state of the layer below."""
    if below is None:
        return None, None
    if config.dw_jrt_variant == "inject":
        return config.dw_jrt_scale * below, torch.sigmoid(p["seed_gate"]).view(-1, 1, 1) * below
    gate = torch.sigmoid(p["seed_gate"]).view(-1, 1, 1) if config.dw_jrt_gate else 1.0
    return gate * config.dw_jrt_scale * below, None


def network(model: RWKV7ForDiffusion, ids: Tensor) -> Tensor:
    """Logits [T, V] of one document [T]."""
    p = {name: t.detach().double() for name, t in model.state_dict().items()}

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in p.items() if name.startswith(prefix)}

    xs = [p["emb.weight"][i] for i in ids]
    first = first_back = below = None
    for i in range(model.config.num_hidden_layers):
        b, att = under(f"blocks.{i}."), under(f"blocks.{i}.att.")
        if i == 0:
            xs = [layer_norm(x, b["ln0.weight"], b["ln0.bias"]) for x in xs]
        turned = model.direction == "alternate" and i % 2 == 1
        if turned:
            xs, first = xs[::-1], first[::-1]
        normed = [layer_norm(x, b["ln1.weight"], b["ln1.bias"]) for x in xs]
        mixed, first, state = time_mix(att, normed, first, *depth_start(model.config, att, below))
        below = state if model.direction == "dw_jrt" else None
        if model.direction == "bidirectional":
            back_weights = att if model.config.tie_directions else under(f"blocks.{i}.att.backward_mix.")
            back, first_back, _ = time_mix(back_weights, normed[::-1], first_back, None, None)
            gates = [torch.sigmoid(b["att.direction_gate.weight"] @ x + b["att.direction_gate.bias"]) for x in normed]
            mixed = [g * f + (1 - g) * r for g, f, r in zip(gates, mixed, back[::-1], strict=True)]
        xs = [x + m for x, m in zip(xs, mixed, strict=True)]
        normed = [layer_norm(x, b["ln2.weight"], b["ln2.bias"]) for x in xs]
        shifted = [torch.zeros_like(xs[0]), *normed[:-1]]
        for t, (x, before) in enumerate(zip(normed, shifted, strict=True)):
            hidden = b["ffn.key.weight"] @ (x + (before - x) * b["ffn.x_k"].flatten())
            xs[t] = xs[t] + b["ffn.value.weight"] @ torch.relu(hidden) ** 2
        if turned:
            xs, first = xs[::-1], first[::-1]
    return torch.stack([p["head.weight"] @ layer_norm(x, p["ln_out.weight"], p["ln_out.bias"]) for x in xs])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_follow_the_equations(kind: str) -> None:
    model, ids = make(kind), tokens(2, 19)
    want = torch.stack([network(model, row) for row in ids])
    scale = want.abs().max()
    with torch.no_grad():
        assert (model(ids).logits.double() - want).abs().max() / scale < 1e-5
        assert (model.double()(ids).logits - want).abs().max() / scale < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_give_the_logits_they_give_alone(kind: str) -> None:
    model, ids = make(kind), tokens(2, 40)
    # Equal ids on both sides of the row end are different documents; -1 is a truncated tail.
    document_ids = torch.tensor([[0] * 13 + [1] + [2] * 26, [2] * 21 + [5] * 9 + [-1] * 10])
    with torch.no_grad():
        packed = model(ids, document_ids=document_ids).logits
        for row, start, end in ((0, 0, 13), (0, 13, 14), (0, 14, 40), (1, 0, 21), (1, 21, 30)):
            alone = model(ids[row : row + 1, start:end]).logits[0]
            torch.testing.assert_close(packed[row, start:end], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_other_documents_and_the_truncated_tail_have_no_influence_at_all(kind: str) -> None:
    model, ids = make(kind), tokens(2, 40)
    document_ids = torch.tensor([[0] * 12 + [1] * 20 + [2] * 8, [0] * 25 + [-1] * 15])
    changed = ids.clone()
    changed[0, 12:32] = (changed[0, 12:32] + 1) % V
    changed[1, 25:] = (changed[1, 25:] + 1) % V
    with torch.no_grad():
        before = model(ids, document_ids=document_ids).logits
        after = model(changed, document_ids=document_ids).logits
    same = (before == after).all(-1)
    assert same[0, :12].all()
    assert same[0, 32:].all()
    assert same[1, :25].all()
    assert not same[0, 12:32].any()
    gradient_of = model.emb.weight
    loss = model(ids, document_ids=document_ids).logits[1, :25].square().sum()
    (gradient,) = torch.autograd.grad(loss, gradient_of)
    only_tail = set(ids[1, 25:].tolist()) - set(ids[1, :25].tolist())
    assert only_tail
    assert not gradient[sorted(only_tail)].any()


def test_causal_logits_ignore_the_future_and_those_of_other_directions_see_it() -> None:
    ids = tokens(1, 40)
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % V
    for kind in KINDS:
        model = make(kind)
        with torch.no_grad():
            same = (model(ids).logits == model(changed).logits).all(-1)[0]
        assert bool(same[:20].all()) == (kind == "causal"), kind
        assert not same[20:].any()
        if kind != "causal":
            assert not same[:20].any()


WITH_BLOCKS = [kind for kind in KINDS if KINDS[kind]["direction"] != "dw_jrt"]
# Blocks of any length, in a row that is one document and in one of two with a cut tail.
BLOCKS = torch.tensor([[0] * 3 + [1] * 2 + [2] + [3] * 6, [0] + [1] * 4 + [2] * 3 + [3] + [4] * 3])
DOCUMENTS = torch.tensor([[0] * 12, [0] * 5 + [1] * 4 + [-1] * 3])
SPANS = [(0, 0, 12), (1, 0, 5), (1, 5, 9), (1, 9, 12)]


@pytest.mark.parametrize("kind", WITH_BLOCKS)
def test_a_token_sees_no_later_block(kind: str) -> None:
    model, ids = make(kind), tokens(2, 12)
    with torch.no_grad():
        before = model(ids, document_ids=DOCUMENTS, block_ids=BLOCKS).logits
        for row, start, end in SPANS:
            for place in range(start, end):
                changed = ids.clone()
                changed[row, place] = (changed[row, place] + 1) % V
                moved = (model(changed, document_ids=DOCUMENTS, block_ids=BLOCKS).logits != before).any(-1)
                seen = torch.zeros_like(moved)
                seen[row, start:end] = BLOCKS[row, start:end] >= BLOCKS[row, place]
                if kind == "causal":
                    seen[row, :place] = False
                assert torch.equal(moved, seen), (row, place)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", WITH_BLOCKS)
def test_a_noisy_block_goes_on_from_the_clean_blocks_before_it(kind: str, dtype: torch.dtype) -> None:
    """Logits and gradients of each block beside a clean stream are those behind its clean prefix alone."""
    model, clean = make(kind).to(dtype), tokens(2, 12)
    noisy = torch.where(torch.rand(2, 12, generator=torch.Generator().manual_seed(5)) < 0.5, V - 1, clean)
    seeds = torch.randn(2, 12, V, generator=torch.Generator().manual_seed(6)).to(dtype)
    got = model(noisy, document_ids=DOCUMENTS, block_ids=BLOCKS, clean_ids=clean).logits
    want = torch.empty_like(got)
    for row, start, end in SPANS:
        for block in BLOCKS[row, start:end].unique():
            inside = [i for i in range(start, end) if BLOCKS[row, i] == block]
            first, last = inside[0], inside[-1] + 1
            ids = torch.cat([clean[row, start:first], noisy[row, first:last]])[None]
            alone = model(ids, block_ids=BLOCKS[row, start:last][None]).logits[0]
            want[row, first:last] = alone[first - start :]
    scale = want.detach().abs().max()
    bound = 1e-11 if dtype == torch.float64 else 2e-5
    assert (got - want).detach().abs().max() / scale < bound
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(got, list(parameters.values()), seeds)
    wanted = torch.autograd.grad(want, list(parameters.values()), seeds)
    for name, grad, other in zip(parameters, grads, wanted, strict=True):
        assert (grad - other).norm() <= 20 * bound * other.norm() + 1e-6 * bound, name


def test_blocks_that_cannot_be_are_refused() -> None:
    ids = tokens(2, 12)
    with pytest.raises(ValueError, match="need block_ids"):
        make()(ids, clean_ids=ids)
    with pytest.raises(ValueError, match="dw_jrt takes no block_ids"):
        make("seed")(ids, block_ids=BLOCKS)
    seeded = make("seed").blocks[1].att
    blocks = Documents.with_blocks(torch.zeros(2, 12), BLOCKS, clean_follows=True)
    x = torch.zeros(1, 48, C)
    with pytest.raises(ValueError, match="takes no documents with blocks"):
        seeded(x, x, blocks, below=torch.zeros(2, C // N, N, N))
    with pytest.raises(ValueError, match=r"block_ids are \[2, 11\], but input_ids \[2, 12\]"):
        make()(ids, block_ids=BLOCKS[:, :11])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_of_supervised_rows_is_that_of_their_logits(kind: str, packed: bool) -> None:
    model, ids = make(kind), tokens(2, 20)
    document_ids = torch.tensor([[0] * 7 + [1] * 13, [0] * 20]) if packed else None
    supervised, targets = torch.tensor([0, 3, 19, 25, 39]), torch.tensor([4, 1, 0, 60, 9])
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0])
    logits = model(ids, document_ids=document_ids).logits.flatten(0, 1)[supervised]
    rows = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    want = torch.autograd.grad((rows * weights).sum(), list(model.parameters()))
    choice = {"supervised": supervised, "targets": targets, "weights": weights}
    loss, per_row = model(ids, document_ids=document_ids, per_row=True, **choice)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (rows * weights).sum())
    torch.testing.assert_close(per_row, rows)
    got = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), g, w in zip(model.named_parameters(), got, want, strict=True):
        torch.testing.assert_close(g, w, atol=2e-5, rtol=1e-3, msg=name)
    none = torch.zeros(0, dtype=torch.long)
    empty = model(ids, supervised=none, targets=none, weights=torch.zeros(0))
    assert empty.item() == 0.0
    assert not any(g.any() for g in torch.autograd.grad(empty, list(model.parameters())))
    with pytest.raises(ValueError, match="targets"):
        model(ids, supervised=supervised)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_and_the_unused_ones_get_zero(kind: str) -> None:
    model = make(kind)
    model(tokens()).logits.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        unused = name.startswith("blocks.0.att") and name.split(".")[-1] in ("v0", "v1", "v2")
        assert bool(p.grad.any()) != unused, name


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    model, ids = make(kind).train(), tokens()
    document_ids = torch.tensor([[0] * 13 + [1] * 27, [0] * 40])
    plain = torch.autograd.grad(model(ids, document_ids=document_ids).logits.sum(), list(model.parameters()))
    model.gradient_checkpointing_enable()
    forwards = []
    model.blocks[1].att.register_forward_hook(lambda *_: forwards.append(1))
    saving = torch.autograd.grad(model(ids, document_ids=document_ids).logits.sum(), list(model.parameters()))
    assert len(forwards) == 2, "the block is run again in the backward pass"
    assert all(torch.equal(a, b) for a, b in zip(plain, saving, strict=True))


def test_initial_values_are_those_of_the_table() -> None:
    """Every deterministic value of layer l of L, written out once more by element."""
    model = make(trained=False, hidden_size=64, num_hidden_layers=3)
    p = {name: t.detach().double() for name, t in model.state_dict().items()}
    for layer in range(3):
        r01, r10 = layer / 2, 1 - layer / 3

        def value(name: str, index: int, layer: int = layer) -> float:
            return p[f"blocks.{layer}.{name}"].flatten()[index].item()

        for i in (0, 1, 9, 31, 63):
            z = ((i % N) - (N - 1) / 2) / ((N - 1) / 2)
            zigzag, linear = z * abs(z), i / 63 - 0.5
            want = {f"att.x_{s}": 1 - (i / 64) ** (0.2 * r10) for s in "rg"}
            want |= {f"att.x_{s}": 1 - (i / 64) ** (0.9 * r10) for s in "wa"}
            want |= {f"att.x_{s}": 1 - (i / 64) ** (0.7 * r10) for s in "kv"}
            want["ffn.x_k"] = 1 - (i / 64) ** (r10**4)
            want["att.w0"] = -6 + 6 * (i / 63) ** (1 + r01**0.3) + 0.5 + 2.5 * zigzag
            want["att.a0"] = -0.19 + 0.3 * zigzag + 0.4 * linear
            want["att.v0"] = 0.73 - 0.4 * linear
            want |= {"att.k_k": 0.71 - 0.1 * linear, "att.k_a": 1.02, "att.r_k": -0.04}
            want |= {"att.ln_x.weight": ((layer + 1) / 3) ** 0.7, "att.ln_x.bias": 0.0}
            want |= {"ln1.weight": 1.0, "ln1.bias": 0.0, "ln2.weight": 1.0, "ln2.bias": 0.0}
            for name, number in want.items():
                assert value(name, i) == pytest.approx(number, abs=1e-6), (layer, name, i)
        zeros = ("att.w1", "att.a1", "att.v1", "att.g1", "att.output.weight", "ffn.value.weight")
        assert not any(p[f"blocks.{layer}.{name}"].any() for name in zeros)
    assert p["blocks.0.ln0.weight"].eq(1).all()
    assert p["ln_out.bias"].eq(0).all()


def test_random_initial_values_have_their_distributions() -> None:
    model = make(trained=False)
    p = {name: t.detach().double() for name, t in model.state_dict().items()}
    emb = p["emb.weight"]
    assert emb.abs().max() <= 1e-4
    # Uniform(-c, c) has the standard deviation c / sqrt(3); its estimate over n values errs by sqrt(1 / 5 n) of it.
    assert emb.std().item() == pytest.approx(1e-4 / math.sqrt(3), rel=4 * math.sqrt(0.2 / emb.numel()))
    assert abs(emb.mean().item()) < 4 * 1e-4 / math.sqrt(3 * emb.numel())
    gains = {"att.receptance.weight": 1.0, "att.value.weight": 1.0, "att.key.weight": 0.1, "ffn.key.weight": 1.0}
    gains |= {f"att.{x}2": 0.1 for x in "wavg"}
    for layer in range(L):
        for name, gain in gains.items():
            orthogonal(p[f"blocks.{layer}.{name}"], gain)
    orthogonal(p["head.weight"], 0.5)
    wide = make(trained=False, vocab_size=256).state_dict()["head.weight"].double()
    orthogonal(wide, 0.5 * math.sqrt(256 / C))


def orthogonal(x: Tensor, gain: float) -> None:
    rows, columns = x.shape
    product = x @ x.T if rows <= columns else x.T @ x
    torch.testing.assert_close(product, gain**2 * torch.eye(min(rows, columns)).double(), atol=1e-5, rtol=0)


def test_one_layer_has_finite_initial_values() -> None:
    model = make(trained=False, num_hidden_layers=1)
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.blocks[0].att.ln_x.weight.eq(1).all()
    assert model(tokens()).logits.isfinite().all()


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    causal, both = make("causal", trained=False), make("separate", trained=False)
    for name, p in causal.named_parameters():
        assert torch.equal(p, both.get_parameter(name)), name
    gate = both.blocks[1].att.direction_gate
    assert not gate.weight.any()
    assert gate.bias.eq(4.0).all()
    seeded = make("inject", trained=False, dw_jrt_gate_init=-1.5)
    assert seeded.blocks[2].att.seed_gate.eq(-1.5).all()
    assert not hasattr(seeded.blocks[0].att, "seed_gate"), "layer 0 has no layer below"
    forward, backward = both.blocks[0].att, both.blocks[0].att.backward_mix
    assert torch.equal(forward.w0, backward.w0)
    assert not torch.equal(forward.receptance.weight, backward.receptance.weight)
    state = torch.random.get_rng_state()
    causal.initialize_(6)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(causal.emb.weight, both.emb.weight)
    causal.initialize_(5)
    assert torch.equal(causal.emb.weight, both.emb.weight)
    assert torch.equal(causal.head.weight, both.head.weight)


def test_ranks_follow_the_published_tables() -> None:
    current = {768: (64, 64, 32, 128), 1024: (64, 64, 64, 160), 2048: (128, 128, 64, 224), 2560: (128, 128, 96, 256)}
    released = {768: (64, 64, 32, 128), 1024: (64, 64, 32, 160), 2048: (96, 96, 64, 256), 2560: (96, 96, 64, 320)}
    current[4096], released[4096] = (160, 160, 96, 320), (128, 128, 96, 480)
    for rule, table in (("current", current), ("released", released)):
        for width, ranks in table.items():
            assert lora_ranks(width, rule) == LoraRanks(*ranks)
    assert RWKV7Config(hidden_size=768, v_low_rank_dim=16).lora_ranks == LoraRanks(64, 64, 16, 128)
    assert RWKV7Config(hidden_size=4096, low_rank_rule="released").lora_ranks == LoraRanks(128, 128, 96, 480)
    with pytest.raises(ValueError, match="rank rule"):
        lora_ranks(768, "newest")


def test_a_blinkdl_state_dict_loads_as_it_is() -> None:
    vector, square, rank = (1, 1, C), (C, C), 8
    shapes = {"emb.weight": (V, C), "head.weight": (V, C), "ln_out.weight": (C,), "ln_out.bias": (C,)}
    for i in range(L):
        norms = ("ln1", "ln2", "ln0") if i == 0 else ("ln1", "ln2")
        block: dict[str, tuple[int, ...]] = {f"{n}.{x}": (C,) for n in norms for x in ("weight", "bias")}
        block |= {f"att.x_{s}": vector for s in "rwkvag"} | {f"att.{n}": vector for n in ("w0", "a0", "v0")}
        block |= {f"att.{n}1": (C, rank) for n in "wavg"} | {f"att.{n}2": (rank, C) for n in "wavg"}
        block |= {"att.k_k": vector, "att.k_a": vector, "att.r_k": (C // N, N)}
        block |= {f"att.{n}.weight": square for n in ("receptance", "key", "value", "output")}
        block |= {"att.ln_x.weight": (C,), "att.ln_x.bias": (C,), "ffn.x_k": vector}
        block |= {"ffn.key.weight": (4 * C, C), "ffn.value.weight": (C, 4 * C)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    model = make()
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shapes
    theirs = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    model.load_state_dict(theirs, strict=True)
    assert torch.equal(model.blocks[2].att.g2, theirs["blocks.2.att.g2"].float())


@pytest.mark.parametrize("kind", KINDS)
def test_roles_cover_every_parameter(kind: str) -> None:
    model = make(kind)
    roles = model.parameter_roles()
    assert list(roles) == [name for name, _ in model.named_parameters()]
    by_role = {role: {n for n, r in roles.items() if r == role} for role in set(roles.values())}
    assert by_role["embedding"] == {"emb.weight"}
    assert by_role["head"] == {"head.weight"}
    mixes = ("att", "att.backward_mix") if kind == "separate" else ("att",)
    assert by_role["decay_base"] == {f"blocks.{i}.{m}.w0" for i in range(L) for m in mixes}
    assert len(by_role["lora"]) == 8 * L * len(mixes)
    assert all(model.get_parameter(n).dim() == 2 and n.endswith(".weight") for n in by_role["matrix"])
    gates = 1 if kind in ("tied", "separate") else 0
    assert len(by_role["matrix"]) == L * (4 * len(mixes) + 2 + gates)
    assert set(by_role) == {"matrix", "embedding", "head", "lora", "vector", "decay_base"}


@pytest.mark.parametrize("kind", KINDS)
def test_flops_count_every_weight_of_a_matrix_product_once_per_use(kind: str) -> None:
    model = make(kind)
    names = {n: p.numel() for n, p in model.named_parameters() if model.parameter_roles()[n] in ("matrix", "lora")}
    used = sum(
        size * (2 if kind == "tied" and ".att." in name and "gate" not in name else 1)
        for name, size in names.items()
        if not (name.startswith("blocks.0.att") and name.split(".")[-1] in ("v1", "v2"))
    )
    recurrence = L * 9 * C * N * (2 if kind in ("tied", "separate") else 1)
    if kind == "inject":
        recurrence += (L - 1) * (9 + 4) * C * N  # a second scan, and two matrix-vector products per head
    assert model.flops_per_token(1000) == 2 * used + recurrence
    assert model.head_flops_per_row() == 2 * V * C


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_give_the_same_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(kind).to(dtype)
    model.save_pretrained(tmp_path)
    again = RWKV7ForDiffusion.from_pretrained(tmp_path, dtype=dtype)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    mine, theirs = model.state_dict(), again.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert theirs[name].dtype == dtype
        assert torch.equal(tensor, theirs[name]), name
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, again(ids).logits)


def test_causal_weights_warm_start_a_bidirectional_model(tmp_path: Path) -> None:
    causal = make("causal")
    causal.save_pretrained(tmp_path)
    both = RWKV7ForDiffusion.from_pretrained(tmp_path, direction="bidirectional", direction_gate_init=4.0)
    gate = both.blocks[0].att.direction_gate
    assert not gate.weight.any()
    assert gate.bias.eq(4.0).all()
    ids = tokens()
    with torch.no_grad():
        near, mixed = causal(ids).logits, both(ids).logits
        for block in both.blocks:
            block.att.direction_gate.bias.fill_(40.0)
        torch.testing.assert_close(both(ids).logits, near, atol=1e-5, rtol=1e-5)
    assert not torch.equal(near, mixed)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_runs_and_keeps_the_decay_in_fp32(kind: str) -> None:
    model, ids = make(kind), tokens()
    with torch.no_grad():
        exact = model(ids).logits
    model = model.to(torch.bfloat16)
    half = model(ids).logits
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 0.05
    choice = {"supervised": torch.arange(5), "targets": torch.arange(5), "weights": torch.ones(5)}
    loss = model(ids, **choice)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    att = model.blocks[0].att
    with torch.no_grad():
        att.w0.fill_(-8.0)
        att.w2.zero_()
        log_w = att._log_decay(torch.zeros(1, 3, C, dtype=torch.bfloat16))
    assert log_w.dtype == torch.float32
    want = -math.exp(-0.5) / (1 + math.exp(8.0))  # w = 0.9998, which bf16 would round to 1
    assert log_w.flatten()[0].item() == pytest.approx(want, rel=1e-5)


def test_the_time_mix_stands_alone() -> None:
    first, second = TimeMix(C, head_size=N, num_layers=2), TimeMix(C, N, layer=1, num_layers=2)
    x = torch.randn(2, 10, C, generator=torch.Generator().manual_seed(3))
    out, v_first, state = first(x)
    assert out.shape == x.shape
    assert state.wkv.shape == (2, C // N, N, N)
    assert not out.any(), "the output projection starts at zero"
    torch.nn.init.eye_(second.output.weight)
    assert second(x, v_first)[0].any()
    model = make(trained=False, num_hidden_layers=2, decay_low_rank_dim=32, a_low_rank_dim=32)
    assert torch.equal(model.blocks[1].att.w0, second.w0)
    with pytest.raises(ValueError, match="v_first"):
        second(x)
    with pytest.raises(ValueError, match="multiple of head_size"):
        TimeMix(C, head_size=24)


def test_a_reverse_mix_is_a_causal_one_on_reversed_documents() -> None:
    forward = TimeMix(C, N, layer=1, num_layers=2, seed=3)
    backward = TimeMix(C, N, layer=1, num_layers=2, seed=3, direction="reverse")
    both = TimeMix(C, N, layer=1, num_layers=2, seed=3, direction="bidirectional", tied=True, gate_init=-1.0)
    for mix in (forward, backward, both):
        torch.nn.init.eye_(mix.output.weight)
    x, v_first = torch.randn(2, 1, 10, C, generator=torch.Generator().manual_seed(3))
    documents = Documents.from_ids(torch.tensor([[0] * 4 + [1] * 6]))
    turned = [torch.cat([t[:, :4].flip(1), t[:, 4:].flip(1)], 1) for t in (x, v_first)]
    want = forward(*turned, documents).out
    want = torch.cat([want[:, :4].flip(1), want[:, 4:].flip(1)], 1)
    torch.testing.assert_close(backward(x, v_first, documents).out, want)
    doubled = torch.cat([v_first, turned[1]], 1)
    alpha = torch.sigmoid(torch.tensor(-1.0))
    mixed = alpha * forward(x, v_first, documents).out + (1 - alpha) * want
    torch.testing.assert_close(both(x, doubled, documents).out, mixed)
    with pytest.raises(ValueError, match="causal, reverse, bidirectional"):
        TimeMix(C, N, direction="alternate")
    with pytest.raises(ValueError, match="depth_seed needs direction 'causal'"):
        TimeMix(C, N, layer=1, num_layers=2, direction="reverse", depth_seed=DepthSeed())
    with pytest.raises(ValueError, match="layer below"):
        forward(x, v_first, below=torch.zeros(1, C // N, N, N))
    with pytest.raises(ValueError, match="go on from"):
        backward(x, v_first, resume=forward(x, v_first).state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_incremental_logits_are_those_of_one_pass(dtype: torch.dtype) -> None:
    model, ids = make().to(dtype), tokens(2, 40)
    with torch.no_grad():
        want = model(ids).logits
        state, parts = None, []
        # A prompt, single tokens, a few at once: whatever the cuts, the state carries on.
        for cut in ids.split([23, 1, 1, 1, 7, 1, 6], 1):
            logits, state = model.incremental(cut, state)
            parts.append(logits)
    got = torch.cat(parts, 1)
    bounds = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}
    assert (got - want).abs().max() / want.abs().max() < bounds[dtype]
    assert all(s.att.wkv.shape == (2, C // N, N, N) and s.ffn_previous.shape == (2, C) for s in state)
    for kind in ("tied", "alternate", "seed"):
        with pytest.raises(ValueError, match="sees later tokens"):
            make(kind).incremental(ids)


def test_the_kernel_is_chosen_by_name() -> None:
    model, ids = make(), tokens()
    model.set_kernel("pytorch")
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
        model.set_kernel("fla")
        with pytest.raises(ValueError, match="fla cannot run here: it needs a CUDA device"):
            model(ids)
    with pytest.raises(ValueError, match="choose one of auto, fla, pytorch"):
        model.set_kernel("pytroch")
    with pytest.raises(ValueError, match="choose one of auto, fla, pytorch"):
        TimeMix(C, N, kernel="triton")
    with pytest.raises(ValueError, match=r"document_ids are \[3, 2\], but input_ids \[2, 3\]"):
        model(torch.zeros(2, 3, dtype=torch.long), document_ids=torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "alternat"}, "alternat"),
        ({"direction": "dw_jrt", "dw_jrt_variant": "leak"}, "seed or inject"),
        ({"direction": "dw_jrt", "dw_jrt_variant": "inject", "dw_jrt_gate": True}, "always has a gate"),
        ({"low_rank_rule": "old"}, "current, released"),
        ({"head_size": 48}, "multiple of head_size"),
        ({"head_size": 0}, "multiple of head_size"),
        ({"v_low_rank_dim": 0}, "v_low_rank_dim is 0: expected at least 1"),
        ({"mask_token_id": V}, "outside the vocabulary"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        make(**change)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_the_fused_model_agrees_with_the_plain_one(kind: str, packed: bool) -> None:
    """bf16 logits and gradients with fla's kernels and without, both against fp32."""
    head_size = 64
    ids = tokens(2, 200).cuda()
    document_ids = torch.tensor([[0] * 70 + [1] + [2] * 129, [0] * 150 + [-1] * 50]).cuda() if packed else None
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, kernel, dtype in (
        ("exact", "pytorch", torch.float32),
        ("plain", "pytorch", torch.bfloat16),
        ("fused", "auto", torch.bfloat16),
    ):
        model = make(kind, hidden_size=128, head_size=head_size).to("cuda", dtype)
        model.set_kernel(kernel)
        logits = model(ids, document_ids=document_ids).logits
        seeds = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(logits)
        grads = torch.autograd.grad(logits, list(model.parameters()), seeds)
        found[name] = (logits.detach().float(), torch.cat([grad.flatten().float() for grad in grads]))
    for i, what in enumerate(("logits", "gradients")):
        error = {n: ((found[n][i] - found["exact"][i]).norm() / found["exact"][i].norm()).item() for n in found}
        assert error["fused"] < 1.5 * error["plain"] + 0.02, (what, error)
