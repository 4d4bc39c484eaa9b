"""Who sees whom: what must not be seen changes no logit and what must be does, by every kernel that realises it."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm_dist.models import attention, build, load
from dlm_dist.models.qwen3 import Qwen3DiffusionConfig, Qwen3ForDiffusion
from dlm_dist.models.visibility import LayerPattern, Visibility, pair_words, turn_blocks

CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mask_token_id": 96,
}
# Two documents, and one with a tail that is cut off.
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 5, [0] * 9 + [-1] * 3])
PROMPTS = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]]).bool()
LENGTH = 12


def model(**changes: Any) -> Qwen3ForDiffusion:
    """Weights large enough that whatever is seen moves a logit."""
    made = build("qwen3", **{**SIZES, **changes})
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data.add_(noise, alpha=0.1)
    assert isinstance(made, Qwen3ForDiffusion)
    return made.eval()


def ids(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def influence(made: Any, **labels: Any) -> Tensor:
    """[B, T, T] bool: which tokens' logits move as each token is changed."""
    read = ids()
    before = made(read, **labels).logits
    columns = []
    for place in range(LENGTH):
        changed = read.clone()
        changed[:, place] = (changed[:, place] + 1) % 96
        columns.append((made(changed, **labels).logits != before).any(-1))
    return torch.stack(columns, dim=-1)


def through(*layers: Tensor) -> Tensor:
    """What reaches a token through several layers, each [B, T, T] bool: first layer first."""
    reach = torch.eye(LENGTH).expand(2, LENGTH, LENGTH)
    for layer in layers:
        reach = layer.float() @ reach
    return reach > 0


QUERY, KEY = torch.arange(LENGTH)[None, :, None], torch.arange(LENGTH)[None, None, :]
SAME_DOCUMENT = DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :]


def test_turns_of_a_chat_are_blocks_that_start_anew_in_each_document() -> None:
    assert turn_blocks(PROMPTS).tolist() == [
        [0] * 3 + [1] * 4 + [2] * 2 + [3] * 3,
        [0] * 2 + [1] * 3 + [2] * 2 + [3] * 5,
    ]
    assert turn_blocks(PROMPTS, 2).tolist() == [
        [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5],
        [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 5, 6],
    ]
    # The second document begins with a prompt in the first row; in the second row the tail begins with an answer.
    assert turn_blocks(PROMPTS, 2, DOCUMENTS).tolist() == [
        [0, 0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2],
        [0, 0, 1, 1, 2, 3, 3, 4, 4, 1, 1, 2],
    ]
    assert turn_blocks(~PROMPTS[:1, :5]).tolist() == [[1, 1, 1, 2, 2]], "nothing is block 0 but a prompt"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block_length", [None, 2])
@pytest.mark.parametrize("literal", [False, True])
def test_prompts_and_answers_see_what_is_before_them_and_themselves(
    packed: bool, block_length: int | None, literal: bool
) -> None:
    documents = DOCUMENTS if packed else None
    blocks = turn_blocks(PROMPTS, block_length, documents)
    got = influence(model(), block_ids=blocks, document_ids=documents, prompt_and_own_block=literal)
    query, key = blocks[:, :, None], blocks[:, None, :]
    expected = (key == query) | (key == 0) if literal else key <= query
    assert torch.equal(got, expected & SAME_DOCUMENT if packed else expected)


@pytest.mark.parametrize("block_length", [None, 2])
def test_rwkv7_sees_the_turns_of_a_chat_too(block_length: int | None) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "head_size": 16, "mask_token_id": 96}
    made = build("rwkv7", direction="bidirectional", **sizes).eval()
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data.add_(noise, alpha=0.2)
    documents = torch.tensor([[0] * 7 + [1] * 5, [0] * 2 + [1] * 3 + [2] * 7])
    blocks = turn_blocks(PROMPTS, block_length, documents)
    expected = (blocks[:, None, :] <= blocks[:, :, None]) & (documents[:, None, :] == documents[:, :, None])
    assert torch.equal(influence(made, block_ids=blocks, document_ids=documents), expected)


PATTERNS: dict[str, Tensor] = {
    "bidirectional": torch.ones(1, LENGTH, LENGTH).bool(),
    "causal": KEY <= QUERY,
    "block_causal:5": KEY // 5 <= QUERY // 5,
    "window:2": (QUERY - KEY).abs() <= 2,
}


@pytest.mark.parametrize("names", [*itertools.product(PATTERNS, repeat=2)])
def test_each_layer_leaves_what_its_pattern_says(names: tuple[str, str]) -> None:
    got = influence(model(layer_patterns=list(names)))
    assert torch.equal(got, through(*(PATTERNS[name] for name in names)).expand(2, -1, -1))


def test_patterns_are_repeated_over_the_layers_and_narrow_documents_and_direction() -> None:
    names = ["window:1", "causal"]
    got = influence(model(layer_patterns=names, num_hidden_layers=3), document_ids=DOCUMENTS)
    near, causal = PATTERNS["window:2"] & ((QUERY - KEY).abs() <= 1) & SAME_DOCUMENT, PATTERNS["causal"] & SAME_DOCUMENT
    assert torch.equal(got, through(near, causal, near))
    causal_model = model(layer_patterns=["window:2"], direction="causal")
    near = PATTERNS["window:2"] & PATTERNS["causal"]
    assert torch.equal(influence(causal_model), through(near, near).expand(2, -1, -1))


@pytest.mark.parametrize("pattern", ["causal", "block_causal:3", "window:2"])
def test_packed_documents_equal_separate_ones_in_every_pattern(pattern: str) -> None:
    made = model(layer_patterns=[pattern, "bidirectional"])
    with torch.no_grad():
        packed = made(ids(1), document_ids=DOCUMENTS[:1]).logits
        for start, end in ((0, 7), (7, 12)):
            alone = made(ids(1)[:, start:end]).logits
            torch.testing.assert_close(packed[:, start:end], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("block_length", [None, 2])
def test_packed_chats_equal_separate_ones(block_length: int | None, literal: bool) -> None:
    made, documents = model(), DOCUMENTS[:1]
    blocks = turn_blocks(PROMPTS[:1], block_length, documents)
    with torch.no_grad():
        packed = made(ids(1), block_ids=blocks, document_ids=documents, prompt_and_own_block=literal).logits
        for start, end in ((0, 7), (7, 12)):
            own = turn_blocks(PROMPTS[:1, start:end], block_length)
            alone = made(ids(1)[:, start:end], block_ids=own, prompt_and_own_block=literal).logits
            torch.testing.assert_close(packed[:, start:end], alone, atol=1e-5, rtol=1e-5)


def test_a_bias_is_added_in_every_layer_where_its_pattern_leaves_a_pair_open() -> None:
    bias = torch.zeros(2, 1, LENGTH, LENGTH)
    bias[..., 4] = -torch.inf
    bias[..., 4, 4] = 0.0
    made = model(layer_patterns=["causal", "window:2"])
    got = influence(made, attention_bias=bias)
    assert made.attention_ran == "sdpa with a mask"
    open_pairs = (bias[:, 0] == 0.0) & PATTERNS["causal"], (bias[:, 0] == 0.0) & PATTERNS["window:2"]
    assert torch.equal(got, through(*open_pairs))


def test_a_bias_reaches_both_streams_of_block_diffusion() -> None:
    made, blocks = model(num_hidden_layers=1), torch.arange(LENGTH)[None].repeat(2, 1) // 4
    streams = {"block_ids": blocks, "clean_ids": ids(seed=7)}
    bias = torch.zeros(1, 1, 2 * LENGTH, 2 * LENGTH)
    torch.testing.assert_close(made(ids(), attention_bias=bias, **streams).logits, made(ids(), **streams).logits)
    bias[..., :LENGTH, LENGTH:] = -torch.inf  # nothing clean is left to what is noisy
    own = (blocks[:, :, None] == blocks[:, None, :])[:, None]
    alone = made(ids(), attention_bias=torch.zeros(own.shape).masked_fill(~own, -torch.inf)).logits
    torch.testing.assert_close(made(ids(), attention_bias=bias, **streams).logits, alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"attention_bias must be \[2, 1, 24, 24\]"):
        made(ids(), attention_bias=bias[..., :LENGTH, :LENGTH], **streams)


def test_patterns_are_part_of_the_model_that_is_saved(tmp_path: Path) -> None:
    made = model(layer_patterns=["window:2", "causal"])
    made.save_pretrained(tmp_path)
    assert '"window:2"' in (tmp_path / "config.json").read_text()
    again = load(tmp_path)
    assert again.config.layer_patterns == ["window:2", "causal"]
    assert torch.equal(again(ids()).logits, made(ids()).logits)
    assert not torch.equal(again(ids()).logits, model()(ids()).logits)


def test_patterns_that_cannot_be_are_named() -> None:
    def made(direction: str, *names: str) -> Qwen3DiffusionConfig:
        return Qwen3DiffusionConfig(**SIZES, direction=direction, layer_patterns=list(names))

    for wrong in ("sideways", "window:0", "window", "block_causal:-1", "causal:3"):
        with pytest.raises(ValueError, match=f"which {wrong} is not"):
            made("bidirectional", wrong)
    for wrong in ("bidirectional", "block_causal:4"):
        with pytest.raises(ValueError, match="since the direction is causal"):
            made("causal", "causal", wrong)
    with pytest.raises(ValueError, match="from 1 to 2 entries"):
        made("bidirectional", *["causal"] * 3)


@pytest.mark.parametrize("patterns", [["window:3"], ["window:2", "causal"]])
@pytest.mark.parametrize("cuts", [[1] * LENGTH, [5, 1, 6], [LENGTH]])
def test_a_causal_model_with_windows_runs_incrementally(patterns: list[str], cuts: list[int]) -> None:
    made = model(direction="causal", layer_patterns=patterns)
    with torch.no_grad():
        state, parts = None, []
        for part in ids().split(cuts, dim=1):
            logits, state = made.incremental(part, state)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), made(ids()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patterns", [["window:3"], ["causal", "block_causal:2"], ["bidirectional", "window:5"]])
@pytest.mark.parametrize("cuts", [[4] * 3, [8, 4], [12]])
def test_a_model_with_patterns_runs_block_by_block(patterns: list[str], cuts: list[int]) -> None:
    made = model(layer_patterns=patterns)
    with torch.no_grad():
        whole = made(ids(), block_ids=torch.arange(LENGTH)[None].repeat(2, 1) // 4).logits
        state, parts = None, []
        for part in ids().split(cuts, dim=1):
            logits, state = made.incremental(part, state, block_length=4)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_mean_keys_are_those_of_the_mask() -> None:
    for text in ("bidirectional", "causal", "block_causal:5", "block_causal:40", "window:1", "window:5", "window:99"):
        pattern = LayerPattern.parse(text)
        for causal, length in itertools.product((False, True), (1, 7, 12)):
            mask = Visibility(1, length, CPU, causal=causal).in_layer(pattern).dense()
            assert pattern.mean_keys(length, causal) == pytest.approx(float(mask.sum()) / length), (text, causal)
        for causal in (False, True):
            blocks = torch.arange(12)[None] // 4
            rule = Visibility(1, 12, CPU, block_ids=blocks, causal=causal, two_streams=True).in_layer(pattern)
            seen = rule.dense()[0, 0].sum(dim=1).double()
            for stream in seen.chunk(2):
                assert pattern.mean_keys(12, causal, 4) == pytest.approx(stream.mean().item()), (text, causal)


def rules() -> dict[str, Visibility]:
    """Every kind of rule over rows of 200 tokens, so that some tiles of 128 are whole and some are not."""
    blocks = torch.arange(200)[None].repeat(2, 1) // 30
    documents = torch.tensor([[0] * 70 + [1] * 130, [2] * 199 + [-1]])
    plain = Visibility(2, 200, CPU)
    turns = turn_blocks((torch.arange(200) % 50 < 10)[None].repeat(2, 1), 16, documents)
    annealing = torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([2**31, 2**30])
    found = {
        "documents": dataclasses.replace(plain, document_ids=documents),
        "blocks": dataclasses.replace(plain, block_ids=blocks, causal=True),
        "prompt and own block": dataclasses.replace(plain, block_ids=blocks, prompt_and_own_block=True),
        "chat": dataclasses.replace(plain, document_ids=documents, block_ids=turns),
        "two streams": dataclasses.replace(plain, document_ids=documents, block_ids=blocks, two_streams=True),
        "annealing": dataclasses.replace(plain, document_ids=documents, annealing=annealing),
    }
    for text in ("causal", "block_causal:30", "window:20"):
        found[f"{text} layer"] = found["documents"].in_layer(LayerPattern.parse(text))
    found["window alone"] = plain.in_layer(LayerPattern(window=20))
    return found


@pytest.mark.parametrize("name", rules())
def test_the_rule_for_flex_attention_is_the_dense_mask(name: str) -> None:
    from torch.nn.attention.flex_attention import create_mask

    rule = rules()[name]
    mask = create_mask(
        lambda row, head, query, key: rule.sees(row, query, key), rule.rows, None, rule.width, rule.width, device="cpu"
    )
    assert torch.equal(mask, rule.dense())
    assert rule.dense().any(-1).all(), "some kernels make NaN of a row that sees nothing"


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Shapes that change make torch compile for any shape, which its kernels for the CPU cannot."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", rules())
def test_flex_attention_sees_what_the_dense_mask_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels of torch for the CPU: their forward pass, which is all that they have there."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "create_block_mask", attention.compiled_create_block_mask())

    rule = rules()[name]
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 2, rule.width, 16, generator=generator) for _ in range(3))
    with torch.no_grad():
        got = torch.compile(flex_attention)(query, key, value, block_mask=attention.block_mask(rule))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=rule.dense())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def labels(length: int, device: torch.device) -> dict[str, Tensor]:
    """A chat in packed documents."""
    documents = torch.tensor([[0] * (length // 3) + [1] * (length - length // 3), [2] * length]).to(device)
    is_prompt = (torch.arange(length, device=device) % 50 < 10)[None].repeat(2, 1)
    return {"document_ids": documents, "block_ids": turn_blocks(is_prompt, 16, documents)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_compiled_again_for_other_labels_and_windows_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(attention, "create_block_mask", attention.compiled_create_block_mask())
    made, graphs = model(layer_patterns=["window:20", "window:40", "block_causal:30"], num_hidden_layers=3), []
    for seed in range(3):
        documents = torch.randint(3, (2, 150), generator=torch.Generator().manual_seed(seed)).sort(1).values
        with torch.no_grad():
            made.set_attention_kernel("sdpa")
            plain = made(ids(2, 150, seed), document_ids=documents).logits
            made.set_attention_kernel("flex")
            flex = made(ids(2, 150, seed), document_ids=documents).logits
        torch.testing.assert_close(flex, plain, atol=1e-4, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[2] == graphs[1] == graphs[0]


@pytest.mark.filterwarnings("ignore")
def test_a_model_runs_flex_attention_where_it_is_asked_to() -> None:
    made, read = model(layer_patterns=["window:40"]), ids(2, 150)
    annealed = {"annealing": torch.tensor([[1, 2, 2**31], [3, 4, 2**30]]), **labels(150, CPU)}
    with torch.no_grad():
        plain = made(read, **annealed).logits
        assert made.attention_ran == "sdpa with a mask"
        made.set_attention_kernel("flex")
        flex = made(read, **annealed).logits
        assert made.attention_ran == "flex"
        made(read, attention_bias=torch.zeros(1, 1, 150, 150))
        assert made.attention_ran == "sdpa with a mask"
    torch.testing.assert_close(flex, plain, atol=1e-4, rtol=1e-4)


def test_which_kernel_computes_masked_attention() -> None:
    cuda = torch.device("cuda")
    assert attention.choose("auto", CPU, 64, 0.0).kernel == "sdpa"
    assert attention.choose("auto", cuda, 64, 0.0).kernel == "flex"
    assert attention.choose("sdpa", cuda, 64, 0.0).kernel == "sdpa"
    for head_dim, dropout, reason in ((8, 0.0, "too small"), (64, 0.1, "no dropout")):
        choice = attention.choose("auto", cuda, head_dim, dropout)
        assert choice.kernel == "sdpa"
        assert reason in choice.reason
        with pytest.raises(ValueError, match=reason):
            attention.choose("flex", cuda, head_dim, dropout)
    with pytest.raises(ValueError, match="choose one of auto, sdpa, flex"):
        model().set_attention_kernel("flash")


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("two_streams", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_on_cuda_is_sdpa_forward_and_backward(dtype: torch.dtype, two_streams: bool) -> None:
    """Logits and gradients of a whole model."""
    cuda, length = torch.device("cuda"), 1000
    read, extra = ids(2, length).to(cuda), dict(labels(length, cuda))
    if two_streams:
        extra["clean_ids"] = ids(2, length, seed=1).to(cuda)
    else:
        extra["annealing"] = torch.tensor([[1, 2, 2**31], [3, 4, 2**30]], device=cuda)
    results = []
    for kernel in ("sdpa", "auto"):
        made = model(layer_patterns=["window:300", "bidirectional"], head_dim=64).to(cuda, dtype).train()
        made.set_attention_kernel(kernel)
        logits = made(read, **extra).logits
        assert made.attention_ran == {"sdpa": "sdpa with a mask", "auto": "flex"}[kernel]
        logits.float().square().mean().backward()
        results.append([logits.float(), *(parameter.grad.float() for parameter in made.parameters())])
    allowed = 1e-4 if dtype == torch.float32 else 3e-2
    for flex, plain in zip(results[1], results[0], strict=True):
        assert (flex - plain).norm() <= allowed * plain.norm()


@pytest.mark.gpu
@NEEDS_CUDA
def test_the_mask_of_flex_attention_on_cuda_takes_no_memory_that_grows_with_the_square() -> None:
    cuda, length = torch.device("cuda"), 16384
    blocks = (torch.arange(length, device=cuda) // 32)[None]
    rule = Visibility(1, length, cuda, block_ids=blocks, two_streams=True)
    attention.block_mask(rule)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention.block_mask(rule)
    assert torch.cuda.max_memory_allocated() - before < rule.width**2 / 16


@pytest.mark.gpu
@NEEDS_CUDA
def test_the_words_of_pairs_are_the_same_on_cuda() -> None:
    keys, places = torch.tensor([[1], [2**32 - 1]]), torch.arange(3000)
    here = pair_words(keys[0], keys[1], places[:, None], places[None])
    there = pair_words(keys[0].cuda(), keys[1].cuda(), places[:, None].cuda(), places[None].cuda())
    assert torch.equal(here, there.cpu())
