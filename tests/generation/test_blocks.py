"""Decoding in blocks: what is asked at each step is what training asks, and what is written is what was learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.rows import Rows
from dlm_dist import models
from dlm_dist.diffusion.model_inputs import model_inputs
from dlm_dist.diffusion.objectives import BlockDiffusion, CausalDiffusion, Vocabulary
from dlm_dist.generation import blocks, samplers
from dlm_dist.generation.autoregressive import continue_text
from dlm_dist.generation.blocks import generate_ahead, generate_blocks
from dlm_dist.generation.samplers import generate
from tests.generation.test_autoregressive import _checkpoint, _command
from tests.small_checkpoints import write_state

MASK, EOS, VOCABULARY = 12, 11, 13
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16},
    "rwkv7": {"hidden_size": 32, "head_size": 16},
}
KINDS = [
    ("qwen3", {"direction": "bidirectional"}),
    ("qwen3", {"direction": "causal"}),
    ("qwen3", {"direction": "bidirectional", "layer_patterns": ["bidirectional", "window:3", "block_causal:2"]}),
    ("rwkv7", {"direction": "bidirectional"}),
    ("rwkv7", {"direction": "bidirectional", "tie_directions": True}),
    ("rwkv7", {"direction": "alternate"}),
    ("rwkv7", {"direction": "causal"}),
]


def make(backbone: str, seed: int = 2, noise: float = 0.2, layers: int = 3, **changes: Any) -> Any:
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": layers, "mask_token_id": MASK, **SIZES[backbone], **changes}
    model = models.build(backbone, seed=seed, **sizes)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + len(name)))
        parameter.data.add_(drawn, alpha=noise)
    return model


class Recorded:
    """Remembers each block that the model is asked about, where it stands, and the logits."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[int, Tensor, Tensor]] = []
        self.read = 0
        incremental, advance = model.incremental, model.advance

        def remember(ids: Tensor, state: Any, size: int) -> Any:
            logits, end = incremental(ids, state, size)
            self.asked.append((self.read, ids.clone(), logits))
            return logits, end

        def go_on(ids: Tensor, state: Any, size: int) -> Any:
            self.read += ids.shape[1]
            return advance(ids, state, size)

        monkeypatch.setattr(model, "incremental", remember)
        monkeypatch.setattr(model, "advance", go_on)


@pytest.mark.parametrize("prompt", [0, 3, 8, 9])
@pytest.mark.parametrize(("backbone", "changes"), KINDS)
def test_each_step_asks_what_training_asks(
    backbone: str, changes: dict[str, Any], prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of a noisy block behind its context are those of training's forward over the whole noisy row."""
    model, size = make(backbone, **changes), 4
    forward = type(model).forward
    recorded = Recorded(model, monkeypatch)
    prompts = torch.randint(11, (2, prompt), generator=torch.Generator().manual_seed(prompt))
    ids = generate_blocks(model, prompts, 10, 7, block_length=size, temperature=1.0, seed=3)
    assert torch.equal(ids[:, :prompt], prompts)
    assert (ids < MASK).all()
    first, last = prompt // size, (prompt + 9) // size
    assert {place for place, _, _ in recorded.asked} == {size * block for block in range(first, last + 1)}
    assert recorded.read == size * last, "each finished block, and the prompt's, are read once"
    assert len(recorded.asked) <= 7
    width = size * (last + 1)
    clean = torch.cat([ids, torch.full((2, width - ids.shape[1]), MASK)], 1)
    block_ids = (torch.arange(width) // size).expand(2, -1)
    for place, block, logits in recorded.asked:
        noisy = torch.full_like(clean, MASK)
        noisy[:, place : place + size] = block
        shown = block != MASK
        assert torch.equal(block[shown], clean[:, place : place + size][shown]), "what is committed stays"
        with torch.no_grad():
            whole = forward(model, noisy, clean_ids=clean, block_ids=block_ids).logits
        torch.testing.assert_close(logits, whole[:, place : place + size], rtol=1e-4, atol=2e-5)
    if prompt % size:
        _, block, _ = recorded.asked[0]
        assert torch.equal(block[:, : prompt % size], prompts[:, -(prompt % size) :])
        assert (block[:, prompt % size :] == MASK).all()


@pytest.mark.parametrize(("backbone", "changes"), KINDS)
def test_a_context_may_be_read_in_any_number_of_calls_and_used_again(backbone: str, changes: dict[str, Any]) -> None:
    model = make(backbone, **changes).eval()
    ids = torch.randint(11, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        state = model.advance(ids[:, :12], None, 4)
        want, _ = model.incremental(ids[:, 12:], state, 4)
        parts = model.advance(ids[:, 4:12], model.advance(ids[:, :4], None, 4), 4)
        for again in (parts, state, state):
            got, _ = model.incremental(ids[:, 12:], again, 4)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if changes["direction"] != "causal":
        with pytest.raises(ValueError, match="only be run block by block"):
            model.advance(ids)


def test_a_scan_with_seeds_from_below_has_no_blocks() -> None:
    with pytest.raises(ValueError, match="dw_jrt takes no block_ids"):
        generate_blocks(make("rwkv7", direction="dw_jrt"), [1], 4, 4, block_length=2)


def _trained(objective: Any, model: Any, steps: int, rows_of: Any) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        batch = objective.corrupt(rows_of(8, 8 * step))
        loss = model(**model_inputs(batch, torch.device("cpu"))) / batch.denominator
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def _counting(count: int, first: int) -> Rows:
    """Rows that count 0 .. 6 round and round, from any number on."""
    tokens = (np.arange(16)[None] + np.random.default_rng(first).integers(0, 7, count)[:, None]) % 7
    zeros = np.zeros(count, dtype=np.int64)
    return Rows(tokens, np.zeros(tokens.shape, np.int32), np.arange(first, first + count), zeros, zeros + EOS)


@pytest.mark.parametrize("backbone", ["qwen3", "rwkv7"])
def test_a_model_continues_the_pattern_that_it_learned(backbone: str) -> None:
    objective = BlockDiffusion(seed=1, vocabulary=Vocabulary(MASK, EOS), block_lengths=((0, 4),))
    model = make(backbone, noise=0.0, layers=2 if backbone == "qwen3" else 1, direction="bidirectional")
    _trained(objective, model, 200, _counting)
    prompts = [[0, 1, 2], [4, 5, 6]]
    want = [[(p[0] + i) % 7 for i in range(14)] for p in prompts]
    for steps in (11, 4):
        assert generate_blocks(model, prompts, 11, steps, block_length=4).tolist() == want
    assert generate_blocks(model, prompts[0], 11, 11, block_length=4, threshold=0.5).tolist() == want[0]


def test_a_card_model_writes_several_tokens_at_once() -> None:
    objective = CausalDiffusion(seed=1, vocabulary=Vocabulary(MASK, EOS))
    model = make("rwkv7", noise=0.0, layers=1, direction="causal")
    _trained(objective, model, 150, _counting)
    want = [(2 + i) % 7 for i in range(14)]
    calls = []
    incremental = model.incremental
    model.incremental = lambda *arguments: calls.append(arguments[0].tolist()) or incremental(*arguments)
    assert generate_ahead(model, [2, 3, 4], 11, 11, block_length=4, eos_id=EOS, threshold=0.5).tolist() == want
    assert calls[0] == [[4, MASK, MASK, MASK]], "the last token and three masks predict four tokens"
    assert len(calls) < 11
    assert all(len(call[0]) == 4 for call in calls)


@pytest.mark.parametrize("backbone", ["qwen3", "rwkv7"])
def test_one_token_ahead_is_left_to_right(backbone: str) -> None:
    model = make(backbone, direction="causal")
    prompts = [[1, 2, 3], [4, 5, 6]]
    want = continue_text(model, prompts, 9, eos_id=EOS)
    assert torch.equal(generate_ahead(model, prompts, 9, 9, block_length=1, eos_id=EOS), want)
    with pytest.raises(ValueError, match="of direction bidirectional sees later tokens"):
        generate_ahead(make(backbone, direction="bidirectional"), prompts, 9, 9, block_length=1, eos_id=EOS)


def test_the_same_seed_writes_the_same_text_and_a_batch_of_equal_prompts_is_filled_side_by_side() -> None:
    model = make("rwkv7", direction="bidirectional")
    drawn = [
        generate_blocks(model, [[1, 2, 3], [3, 2, 1]], 20, 20, block_length=4, temperature=1.0, seed=seed).tolist()
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    # Without noise a row says what it would say alone.
    together = generate_blocks(model, [[1, 2, 3], [3, 2, 1]], 20, 10, block_length=4).tolist()
    alone = [generate_blocks(model, prompt, 20, 10, block_length=4).tolist() for prompt in ([1, 2, 3], [3, 2, 1])]
    assert together == alone


def test_an_end_of_text_ends_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("qwen3", direction="bidirectional")
    recorded = Recorded(model, monkeypatch)
    want = generate_blocks(model, [1, 2], 18, 18, block_length=4)
    end = int(want[5])  # a token of the second block is called the end
    calls = len(recorded.asked)
    ids = generate_blocks(model, [1, 2], 18, 18, block_length=4, eos_id=end)
    place = want[2:].tolist().index(end)
    assert ids[2:].tolist() == [*want[2 : 2 + place].tolist(), *[end] * (18 - place)]
    assert len(recorded.asked) - calls < calls, "nothing is asked behind the block of the end"


def test_a_block_of_the_whole_row_is_remasking() -> None:
    model = make("qwen3", direction="bidirectional")
    written = generate_blocks(model, [1, 2], 6, 6, block_length=8)
    assert torch.equal(written, generate(model, [1, 2], 6, 6))


def test_a_threshold_keeps_what_is_sure_and_saves_steps() -> None:
    model = make("qwen3", direction="bidirectional", noise=0.5)
    calls = []
    forward = model.forward
    model.forward = lambda *arguments, **named: calls.append(1) or forward(*arguments, **named)
    plain = generate(model, [1, 2], 8, 8)
    assert len(calls) == 8
    calls.clear()
    generate(model, [1, 2], 8, 8, threshold=0.2)
    assert len(calls) < 8
    calls.clear()
    assert torch.equal(generate(model, [1, 2], 8, 8, threshold=1 - 1e-12), plain)
    for mistake, said in (({"threshold": 1.0}, "threshold is 1.0"), ({"threshold": 0.0}, "threshold is 0.0")):
        with pytest.raises(ValueError, match=said):
            generate(model, [1], 2, 2, **mistake)
    with pytest.raises(ValueError, match="random remasking does not ask"):
        generate(model, [1], 2, 2, threshold=0.5, remasking="random")


@pytest.mark.parametrize("arguments", [{"length": 0, "steps": 1}, {"length": 9, "steps": 2}, {"block_length": 0}])
def test_mistakes_are_named(arguments: dict[str, int]) -> None:
    model = make("qwen3", direction="bidirectional")
    with pytest.raises(ValueError, match=r"length is 0|there are 3 blocks of 4|block_length is 0"):
        generate_blocks(model, [1, 2], **{"length": 9, "steps": 9, "block_length": 4} | arguments)


def test_the_command_writes_in_the_blocks_of_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    real = blocks.generate_blocks

    def remember(*arguments: Any, block_length: int, **options: Any) -> Tensor:
        used.append(block_length)
        return real(*arguments, block_length=block_length, **options)

    monkeypatch.setattr(blocks, "generate_blocks", remember)
    folder = _checkpoint(tmp_path / "block", "block", "bidirectional")
    state = {"data_pos": 10, "skipped_ranges": [], "sequence_length": 32}
    identity = {"objective.name": "block", "objective.block_lengths": [[320, 2], [320, 8], [0, 0]]}
    for data_pos in (9, 10, 20):
        write_state(folder, state | {"data_pos": data_pos, "identity": identity})
        assert _command(folder) == 0
        assert capsys.readouterr().out.startswith("import ")
    assert used == [2, 8], "the last phase is whole rows, which are masked diffusion"
    assert _command(folder, "--block-length", "3", "--threshold", "0.9", "--steps", "9") == 0
    assert used[-1] == 3
    for option in (["--top-k", "3"], ["--infill"]):
        with pytest.raises(ValueError, match=r"with the objective block|--infill the gaps"):
            _command(folder, *option)
    write_state(folder, {**state, "sequence_length": None, "identity": identity})
    with pytest.raises(ValueError, match="does not say how long the rows were: give --block-length"):
        _command(folder)


def test_the_command_writes_in_blocks_what_learned_one_block_of_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    real = samplers.generate
    monkeypatch.setattr(samplers, "generate", lambda *a, **k: used.append(k["block_length"]) or real(*a, **k))
    folder = _checkpoint(tmp_path / "wsd", "wsd", "bidirectional")
    identity = {"objective.name": "wsd", "objective.block_lengths": [[320, 2], [0, 8]]}
    state = {"data_pos": 10, "skipped_ranges": [], "sequence_length": 32, "identity": identity}
    write_state(folder, state)
    assert _command(folder) == _command(folder, "--block-length", "3") == 0
    assert used == [8, 3]


def test_the_command_reads_a_card_model_either_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _checkpoint(tmp_path / "card", "card", "causal")
    assert _command(folder, "--temperature", "1", "--top-k", "3") == 0
    assert _command(folder, "--block-length", "4", "--threshold", "0.9") == 0
    assert capsys.readouterr().out.count("import ") == 2
    with pytest.raises(ValueError, match="--threshold is an option of mdlm, block, card with --block-length, but"):
        _command(folder, "--threshold", "0.9")
    with pytest.raises(ValueError, match="--top-k is an option of ar, card, but"):
        _command(folder, "--block-length", "4", "--top-k", "3")
