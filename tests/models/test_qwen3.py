"""Qwen3 as a diffusion backbone: equal to transformers where it must be, and who sees whom."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from dlm_dist.models import build
from dlm_dist.models.qwen3 import Qwen3DiffusionConfig, Qwen3ForDiffusion

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mask_token_id": 96,
}


def _model(seed: int = 0, **changes: Any) -> Qwen3ForDiffusion:
    model = build("qwen3", seed=seed, **{**SIZES, **changes})
    assert isinstance(model, Qwen3ForDiffusion)
    return model


def _ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [False, True])
def test_causal_logits_are_those_of_transformers_to_the_bit(tied: bool) -> None:
    model = _model(direction="causal", tie_word_embeddings=tied)
    peer_sizes = {key: value for key, value in SIZES.items() if key != "mask_token_id"}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    peer = Qwen3ForCausalLM(Qwen3Config(**peer_sizes, tie_word_embeddings=tied, rope_parameters=rope))
    peer.load_state_dict(model.state_dict())
    ids = _ids(3, 19)
    assert torch.equal(model(ids).logits, peer(ids).logits)


@pytest.mark.parametrize("cuts", [[1] * 13, [5, 1, 1, 6], [6, 7], [13]])
def test_incremental_logits_are_those_of_one_pass(cuts: list[int]) -> None:
    model = _model(direction="causal").eval()
    ids = _ids(2, 13)
    whole = model(ids).logits
    state, parts = None, []
    for part in ids.split(cuts, dim=1):
        logits, state = model.incremental(part, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="of direction bidirectional sees later tokens"):
        _model().incremental(ids)


def test_bidirectional_is_the_default_and_later_tokens_change_earlier_logits() -> None:
    ids = _ids(1, 10)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 96
    both, causal = _model(), _model(direction="causal")
    assert both.direction == "bidirectional"
    assert (both(ids).logits - both(changed).logits)[0, 0].abs().max() > 1e-4
    assert torch.equal(causal(ids).logits[0, :-1], causal(changed).logits[0, :-1])


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
def test_packed_documents_equal_separate_ones(direction: str) -> None:
    model = _model(direction=direction)
    first, second = _ids(1, 7, seed=1), _ids(1, 9, seed=2)
    documents = torch.tensor([[4] * 7 + [5] * 9])
    packed = model(torch.cat([first, second], dim=1), document_ids=documents).logits
    assert torch.allclose(packed[:, :7], model(first).logits, atol=2e-6)
    assert torch.allclose(packed[:, 7:], model(second).logits, atol=2e-6)
    leaked = model(torch.cat([first, second], dim=1)).logits
    assert not torch.allclose(packed[:, 7:], leaked[:, 7:], atol=1e-3)


def test_a_missing_tail_is_seen_by_nobody_and_gives_finite_gradients() -> None:
    model = _model()
    ids = _ids(1, 12)
    documents = torch.tensor([[0] * 8 + [-1] * 4])
    logits = model(ids, document_ids=documents).logits
    assert torch.allclose(logits[:, :8], model(ids[:, :8]).logits, atol=2e-6)
    logits.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_attention_bias_is_added_on_top_of_documents_and_direction() -> None:
    ids = _ids(2, 8)
    documents = torch.tensor([[0] * 5 + [1] * 3, [0] * 2 + [1] * 6])
    for direction in ("bidirectional", "causal"):
        model = _model(direction=direction)
        nothing = torch.zeros(2, 1, 8, 8)
        assert torch.allclose(model(ids, attention_bias=nothing).logits, model(ids).logits, atol=2e-6)
        packed = model(ids, document_ids=documents).logits
        both = model(ids, document_ids=documents, attention_bias=nothing).logits
        assert torch.allclose(both, packed, atol=2e-6)
    model = _model()
    hidden_last = torch.zeros(1, 1, 8, 8)
    hidden_last[..., -1] = -torch.inf
    hidden_last[..., -1, -1] = 0.0
    without = model(ids, attention_bias=hidden_last).logits
    assert torch.allclose(without[:, :-1], model(ids[:, :-1]).logits, atol=2e-6)
    learned = torch.randn(2, 1, 8, 8, requires_grad=True)
    model(ids, attention_bias=learned).logits.square().sum().backward()
    assert learned.grad is not None
    assert learned.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"attention_bias must be \[2, 1, 8, 8\]"):
        model(ids, attention_bias=torch.zeros(2, 8, 8))


def test_no_mask_tensor_without_documents() -> None:
    for direction in ("bidirectional", "causal"):
        model = _model(direction=direction)
        model(_ids(2, 8))
        assert model.attention_ran == "sdpa"
        model(_ids(2, 8), document_ids=torch.zeros(2, 8, dtype=torch.long))
        assert model.attention_ran == "sdpa with a mask"


BLOCKS = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, 3, 3], [0, 1, 1, 2, 3, 4, 5, 6, 7, 8]])
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1], [0] * 7 + [-1] * 3])


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_token_sees_no_later_block_and_no_other_document(direction: str, packed: bool) -> None:
    model, ids = _model(direction=direction), _ids(2, 10)
    documents = DOCUMENTS if packed else None
    with torch.no_grad():
        before = model(ids, document_ids=documents, block_ids=BLOCKS).logits
        for place in range(10):
            changed = ids.clone()
            changed[:, place] = (changed[:, place] + 1) % 96
            moved = (model(changed, document_ids=documents, block_ids=BLOCKS).logits != before).any(-1)
            seen = BLOCKS[:, place : place + 1] <= BLOCKS
            if direction == "causal":
                seen = seen & (torch.arange(10) >= place)
            if packed:
                seen = seen & (DOCUMENTS[:, place : place + 1] == DOCUMENTS)
            assert torch.equal(moved, seen), place


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_noisy_block_sees_the_clean_blocks_before_it(direction: str, packed: bool) -> None:
    """The logits of each block beside a clean stream are those behind its clean prefix alone."""
    model, clean = _model(direction=direction), _ids(2, 10)
    noisy = torch.where(torch.rand(2, 10, generator=torch.Generator().manual_seed(5)) < 0.5, 96, clean)
    with torch.no_grad():
        documents = DOCUMENTS if packed else None
        got = model(noisy, document_ids=documents, block_ids=BLOCKS, clean_ids=clean).logits
        assert got.shape == (2, 10, 97)
        for row in range(2):
            spans = [(d, s) for d, s in ((0, (0, 5)), (1, (5, 10)))] if row == 0 and packed else [(0, (0, 10))]
            if row == 1 and packed:
                spans = [(0, (0, 7)), (-1, (7, 10))]
            for _, (start, end) in spans:
                for block in BLOCKS[row, start:end].unique():
                    there = [i for i in range(start, end) if BLOCKS[row, i] == block]
                    first, last = there[0], there[-1] + 1
                    ids = torch.cat([clean[row, start:first], noisy[row, first:last]])[None]
                    alone = model(ids, block_ids=BLOCKS[row, start:last][None]).logits[0, first - start :]
                    torch.testing.assert_close(got[row, first:last], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="need block_ids"):
        model(noisy, clean_ids=clean)


def test_with_prompt_and_own_block_other_blocks_have_no_influence() -> None:
    model, ids = _model(), _ids(2, 10)
    with torch.no_grad():
        before = model(ids, block_ids=BLOCKS, prompt_and_own_block=True).logits
        for place in range(10):
            changed = ids.clone()
            changed[:, place] = (changed[:, place] + 1) % 96
            moved = (model(changed, block_ids=BLOCKS, prompt_and_own_block=True).logits != before).any(-1)
            assert torch.equal(moved[:, place], torch.ones(2, dtype=torch.bool))
            own = BLOCKS[:, place : place + 1] == BLOCKS
            prompt = BLOCKS[:, place] == 0
            assert torch.equal(moved, own | prompt[:, None]), place
    with pytest.raises(ValueError, match="needs block_ids"):
        model(ids, prompt_and_own_block=True)


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_equal_those_of_full_logits(tied: bool) -> None:
    ids = _ids(2, 9)
    supervised = torch.tensor([0, 3, 10, 17])
    targets = torch.tensor([5, 6, 7, 96])
    weights = torch.tensor([0.5, 1.0, 2.0, 0.25])
    blocked, full = _model(tie_word_embeddings=tied), _model(tie_word_embeddings=tied)
    loss, rows = blocked(ids, supervised=supervised, targets=targets, weights=weights, per_row=True)
    loss.backward()
    logits = full(ids).logits.flatten(0, 1)[supervised]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (losses * weights).sum().backward()
    assert loss.dim() == 0
    assert loss.dtype == torch.float32
    assert torch.allclose(rows, losses, rtol=1e-6)
    for (name, ours), theirs in zip(blocked.named_parameters(), full.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7), name


def test_no_supervised_rows_leave_zero_gradients_on_every_parameter() -> None:
    model = _model(tie_word_embeddings=True)
    none = torch.empty(0, dtype=torch.long)
    loss = model(_ids(2, 5), supervised=none, targets=none, weights=torch.empty(0))
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.count_nonzero(parameter.grad) == 0 for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    ids, documents = _ids(2, 9), torch.tensor([[0] * 4 + [1] * 5] * 2)
    plain, checkpointed = _model().train(), _model().train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, checkpointed):
        model(ids, document_ids=documents).logits.square().sum().backward()
    assert checkpointed.is_gradient_checkpointing
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_initial_values_are_keyed_by_seed_and_name_and_distributed_as_transformers_does() -> None:
    model, again, other = _model(seed=3, hidden_size=64), _model(seed=3, hidden_size=64), _model(seed=4, hidden_size=64)
    deeper = _model(seed=3, hidden_size=64, num_hidden_layers=3)
    deeper_values = dict(deeper.named_parameters())
    for (name, value), same, different in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(value, same)
        assert torch.equal(value, deeper_values[name])
        if value.dim() == 1:
            assert torch.equal(value, torch.ones_like(value)), name
            continue
        assert not torch.equal(value, different)
        count = value.numel()
        assert abs(float(value.detach().mean())) < 5 * 0.02 / math.sqrt(count), name
        assert float(value.detach().std()) == pytest.approx(0.02, rel=5 / math.sqrt(2 * count)), name
    rounded = _model(hidden_size=64).to(torch.bfloat16)
    rounded.initialize_(3)
    assert torch.equal(rounded.lm_head.weight, model.lm_head.weight.bfloat16())


def test_initialising_does_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    _model(seed=7)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_exactly_one_role(tied: bool) -> None:
    model = _model(tie_word_embeddings=tied, attention_bias=True)
    roles = model.parameter_roles()
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert roles.get("lm_head.weight") == (None if tied else "head")
    assert roles["model.layers.0.self_attn.q_proj.weight"] == "matrix"
    assert roles["model.layers.0.self_attn.q_proj.bias"] == "vector"
    assert roles["model.layers.1.self_attn.k_norm.weight"] == "vector"
    assert set(roles.values()) <= {"matrix", "embedding", "head", "vector"}


def test_flops_are_those_that_pytorch_counts() -> None:
    length = 16
    model = _model(num_key_value_heads=4)
    # PyTorch counts no FLOPs for its fused CPU attention, so the plain one is asked for.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(_ids(1, length))
    ours = length * (model.flops_per_token(length) + model.head_flops_per_row())
    assert ours == counter.get_total_flops()
    causal = _model(num_key_value_heads=4, direction="causal")
    saved = model.flops_per_token(length) - causal.flops_per_token(length)
    assert saved == 2 * 2 * 2 * 32 * (length - 1) / 2  # layers, scores and values, 2 FLOPs, width, unseen keys


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_round_trip(tied: bool, tmp_path: Path) -> None:
    model = _model(tie_word_embeddings=tied, direction="causal")
    model.save_pretrained(tmp_path)
    loaded = Qwen3ForDiffusion.from_pretrained(tmp_path)
    ids = _ids(1, 8)
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert loaded.config.direction == "causal"
    assert loaded.config.mask_token_id == 96
    assert loaded.config.rope_parameters["rope_theta"] == 1e6
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="direction is 'backward'"):
        _model(direction="backward")
    with pytest.raises(ValueError, match="mask_token_id 97 lies outside the vocabulary of 97"):
        _model(mask_token_id=97)
    with pytest.raises(ValueError, match="num_attention_heads 4 is no multiple of num_key_value_heads 3"):
        _model(num_key_value_heads=3)
    with pytest.raises(ValueError, match="name such layers in layer_patterns"):
        _model(use_sliding_window=True)
    with pytest.raises(ValueError, match="choose by set_attention_kernel"):
        Qwen3ForDiffusion._from_config(Qwen3DiffusionConfig(**SIZES), attn_implementation="eager")
    with pytest.raises(ValueError, match="need targets"):
        _model()(_ids(1, 4), supervised=torch.tensor([0]))
