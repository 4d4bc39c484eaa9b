"""Remasking decoding on models whose conditionals are known, so that each commit can be foretold."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlm_dist.generation.samplers import commit_quotas, denoise, generate, infill, parse_gaps
from dlm_dist.models import build
from dlm_dist.models.outputs import DenoiserOutput

VOCABULARY, MASK = 10, 9


class KnownModel(nn.Module):
    """Logits from a function of the ids; remembers what it was asked."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = logits
        self.config = SimpleNamespace(mask_token_id=MASK, vocab_size=VOCABULARY)
        self.device = torch.device("cpu")
        self.asked: list[Tensor] = []
        self.documents: list[Tensor | None] = []

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> DenoiserOutput:
        assert not self.training
        self.asked.append(input_ids.clone())
        self.documents.append(document_ids)
        return DenoiserOutput(logits=self.function(input_ids))

    def shown(self) -> list[list[list[int]]]:
        return [ids.tolist() for ids in self.asked]


def _by_position(probabilities: list[float]) -> KnownModel:
    """Position j holds token j with the given probability; the rest is shared by the other ids but the mask."""

    def logits(ids: Tensor) -> Tensor:
        table = torch.empty(*ids.shape, VOCABULARY)
        for j, p in enumerate(probabilities):
            table[:, j] = math.log((1 - p) / (VOCABULARY - 2))
            table[:, j, j] = math.log(p)
            table[:, j, MASK] = 50.0  # a model that would rather say "mask"
        return table

    return KnownModel(logits)


def _counting(ids: Tensor) -> Tensor:
    """Knows that a token is its left neighbour plus one (mod 9), and nothing where that one is hidden."""
    logits = torch.zeros(*ids.shape, VOCABULARY)
    for row in range(ids.shape[0]):
        for j in range(1, ids.shape[1]):
            if ids[row, j - 1] != MASK:
                logits[row, j, (ids[row, j - 1] + 1) % 9] = 5.0
    return logits


def test_a_shifted_model_is_read_one_place_earlier() -> None:
    """Place j of what the model reads holds the logits of the token behind it."""
    model = _by_position([0.9, 0.8, 0.7, 0.6, 0.5])
    ids = generate(model, [5], 3, 3, shifted_behind=8)
    assert model.shown()[0] == [[8, 5, MASK, MASK, MASK]]
    assert ids.tolist() == [5, 1, 2, 3]
    documents = torch.tensor([[-1, 0, 0, 0]])
    filled = infill(model, [[7, 5, MASK, 6]], 1, document_ids=documents, shifted_behind=8)
    assert filled.tolist() == [[7, 5, 2, 6]]
    shown = model.documents[-1]
    assert shown is not None
    assert shown.tolist() == [[-1, -1, 0, 0, 0]]


def test_the_surest_token_is_committed_first_and_the_mask_is_never_written() -> None:
    model = _by_position([0.9, 0.5, 0.7, 0.6])
    result = denoise(model, torch.full((1, 4), 5), torch.ones(1, 4, dtype=torch.bool), steps=4)
    assert result.tolist() == [[0, 1, 2, 3]]
    assert model.shown() == [[[9, 9, 9, 9]], [[0, 9, 9, 9]], [[0, 9, 2, 9]], [[0, 9, 2, 3]]]


def test_every_step_looks_again_at_what_was_committed() -> None:
    model = KnownModel(_counting)
    assert generate(model, [3], 5, steps=5).tolist() == [3, 4, 5, 6, 7, 8]
    assert [ids[0] for ids in model.shown()][2] == [3, 4, 5, 9, 9, 9]
    # In one step only the first token has a known neighbour; the others are guesses, ties going to the lowest id.
    assert generate(KnownModel(_counting), [3], 5, steps=1).tolist() == [3, 4, 0, 0, 0, 0]


def test_quotas_follow_lladas_rule() -> None:
    quotas = commit_quotas(torch.tensor([7, 3, 0, 8]), 4)
    assert quotas.tolist() == [[2, 2, 2, 1], [1, 1, 1, 0], [0, 0, 0, 0], [2, 2, 2, 2]]
    model = _by_position([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    denoise(model, torch.zeros(1, 7, dtype=torch.long), torch.ones(1, 7, dtype=torch.bool), steps=4)
    assert [row[0].count(MASK) for row in model.shown()] == [7, 5, 3, 1]


def test_rows_with_different_gaps_are_filled_side_by_side() -> None:
    ids = torch.tensor([[9, 9, 9, 9], [7, 9, 7, 9], [7, 7, 7, 7]])
    model = _by_position([0.4, 0.5, 0.6, 0.7])
    result = infill(model, ids, steps=3)
    assert result.tolist() == [[0, 1, 2, 3], [7, 1, 7, 3], [7, 7, 7, 7]]
    # Row 0 commits 2, 1, 1 tokens, row 1 commits 1, 1, 0.
    assert model.shown() == [
        [[9, 9, 9, 9], [7, 9, 7, 9], [7, 7, 7, 7]],
        [[9, 9, 2, 3], [7, 9, 7, 3], [7, 7, 7, 7]],
        [[9, 1, 2, 3], [7, 1, 7, 3], [7, 7, 7, 7]],
    ]


def test_steps_without_anything_to_commit_cost_no_call() -> None:
    model = _by_position([0.5, 0.5])
    denoise(model, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool), steps=50)
    assert len(model.asked) == 2
    complete = torch.tensor([[1, 2, 3]])
    assert torch.equal(infill(model, complete, steps=5), complete)
    assert len(model.asked) == 2


def test_blocks_go_left_to_right_whatever_the_confidence() -> None:
    model = _by_position([0.3, 0.4, 0.5, 0.6, 0.7])
    denoise(model, torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool), steps=5, block_length=2)
    assert [row[0] for row in model.shown()] == [
        [9, 9, 9, 9, 9],
        [9, 1, 9, 9, 9],
        [0, 1, 9, 9, 9],
        [0, 1, 9, 3, 9],
        [0, 1, 2, 3, 9],
    ]


def test_blocks_count_hidden_positions_of_a_row_not_columns() -> None:
    model = _by_position([0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    infill(model, torch.tensor([[9, 5, 5, 9, 5, 9]]), steps=2, block_length=2)
    assert [row[0] for row in model.shown()] == [[9, 5, 5, 9, 5, 9], [0, 5, 5, 3, 5, 9]]


def test_ties_go_to_the_left() -> None:
    model = _by_position([0.5] * 4)
    denoise(model, torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool), steps=2)
    assert model.shown()[1] == [[0, 1, 9, 9]]


def test_sampling_follows_the_tempered_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    temperature, rows = 2.0, 4000

    def logits(ids: Tensor) -> Tensor:
        table = torch.full((*ids.shape, VOCABULARY), -torch.inf)
        table[..., :3] = probabilities.log()
        return table

    drawn = generate(KnownModel(logits), torch.zeros(rows, 0), 1, steps=1, temperature=temperature, seed=11)
    frequency = torch.bincount(drawn.flatten(), minlength=VOCABULARY).double() / rows
    expected = torch.zeros(VOCABULARY, dtype=torch.float64)
    expected[:3] = torch.softmax(probabilities.double().log() / temperature, 0)
    assert ((frequency - expected).abs() <= 4 * (expected * (1 - expected) / rows).sqrt()).all()


def test_confidence_is_the_probability_without_noise_among_writable_ids() -> None:
    """Position 0 puts 0.6 on a forbidden id and the rest on one other: without that id it is sure of itself."""

    def logits(ids: Tensor) -> Tensor:
        table = torch.full((*ids.shape, VOCABULARY), -torch.inf)
        table[:, 0, 8], table[:, 0, 4] = math.log(0.6), math.log(0.4)
        table[:, 1, 1], table[:, 1, 2] = math.log(0.9), math.log(0.1)
        return table

    model = KnownModel(logits)
    assert infill(model, [9, 9], steps=2, forbidden_ids=[8]).tolist() == [4, 1]
    assert model.shown()[1] == [[4, 9]]
    model = KnownModel(logits)
    assert infill(model, [9, 9], steps=2).tolist() == [8, 1]
    assert model.shown()[1] == [[9, 1]]


def test_huge_logits_do_not_overflow_the_noise() -> None:
    model = KnownModel(lambda ids: torch.nn.functional.one_hot(ids.clamp(max=0) + 3, VOCABULARY) * 1e4)
    assert generate(model, [1], 6, steps=3, temperature=1.0).tolist() == [1, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"remasking": "random", "temperature": 0.7}])
def test_the_seed_decides_the_text(options: dict[str, Any]) -> None:
    def run(seed: int) -> list[int]:
        torch.rand(3)  # the global generator has no part in it
        model = KnownModel(lambda ids: torch.linspace(0, 1, VOCABULARY).expand(*ids.shape, -1) * ids[..., :1, None])
        result: list[int] = generate(model, [5], 30, steps=10, seed=seed, **options).tolist()
        return result

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_random_remasking_commits_in_random_order() -> None:
    orders = set()
    for seed in range(8):
        model = _by_position([0.9, 0.8, 0.7, 0.6])
        everything = torch.ones(1, 4, dtype=torch.bool)
        result = denoise(model, torch.zeros(1, 4, dtype=torch.long), everything, steps=4, remasking="random", seed=seed)
        assert result.tolist() == [[0, 1, 2, 3]]
        orders.add(str(model.shown()))
    assert len(orders) > 3


def test_an_end_of_text_cuts_the_answer_but_not_the_prompt() -> None:
    model = _by_position([0.9] * 8)
    result = generate(model, torch.tensor([[7, 3, 7]]), 5, steps=5, eos_id=5)
    assert result.tolist() == [[7, 3, 7, 3, 4, 5, 5, 5]]
    stopped = _by_position([0.9] * 8)
    assert generate(stopped, [5, 3], 6, steps=6, block_length=2, eos_id=5).tolist() == [5, 3, 2, 3, 4, 5, 5, 5]
    assert len(stopped.asked) == 4  # the third block is not decoded


def test_prompts_come_in_any_shape_and_may_be_empty() -> None:
    model = _by_position([0.9, 0.8, 0.7])
    assert generate(model, np.array([4], dtype=np.int32), 2, steps=2).tolist() == [4, 1, 2]
    assert generate(model, [], 3, steps=3).tolist() == [0, 1, 2]
    assert generate(model, torch.zeros(2, 0), 3, steps=3).tolist() == [[0, 1, 2]] * 2
    assert generate(model, [[4], [5]], 2, steps=1).dtype == torch.long


def test_document_ids_reach_the_model_and_its_mode_is_restored() -> None:
    model = _by_position([0.9, 0.8, 0.7]).train()
    documents = torch.tensor([[0, 0, -1]])
    infill(model, torch.tensor([[9, 9, 5]]), steps=1, document_ids=documents)
    assert model.documents == [documents]
    assert model.training


@pytest.mark.parametrize(
    ("backbone", "sizes"),
    [
        ("qwen3", {"num_attention_heads": 2, "head_dim": 16}),
        ("rwkv7", {"head_size": 32, "direction": "bidirectional"}),
        ("rwkv7", {"head_size": 32, "direction": "causal"}),
    ],
)
def test_real_backbones_generate_and_infill(backbone: str, sizes: dict[str, Any]) -> None:
    model = build(backbone, vocab_size=40, hidden_size=64, num_hidden_layers=1, mask_token_id=39, **sizes)
    ids = generate(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), 8, steps=3, temperature=1.0, seed=2)
    assert ids.shape == (2, 11)
    assert ids[:, :3].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert not (ids == 39).any()
    filled = infill(model, [1, 39, 39, 2, 39], steps=2)
    assert filled[[0, 3]].tolist() == [1, 2]
    assert not (filled == 39).any()
    assert all(parameter.grad is None for parameter in model.parameters())


class Letters:
    """A tokenizer of single characters."""

    mask_id = MASK

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]


def test_gaps_are_parsed() -> None:
    assert parse_gaps("ab{{mask:3}}c", Letters()) == [0, 1, 9, 9, 9, 2]
    assert parse_gaps("{{mask:1}}{{mask:2}}", Letters()) == [9, 9, 9]
    assert parse_gaps("", Letters()) == []
    assert parse_gaps("abc", Letters()) == [0, 1, 2]


@pytest.mark.parametrize("gap", ["{{mask}}", "{{mask:0}}", "{{mask:x}}", "{{mask:3}", "{{mask: 3}}", "{{mask:-1}}"])
def test_malformed_gaps_are_named(gap: str) -> None:
    with pytest.raises(ValueError, match=r"at character 2 is no gap: write \{\{mask:N\}\}"):
        parse_gaps(f"ab{gap}", Letters())


def test_mistakes_are_named() -> None:
    model = _by_position([0.5] * 4)
    with pytest.raises(ValueError, match="steps is 0"):
        generate(model, [1], 3, steps=0)
    with pytest.raises(ValueError, match="steps is 1, but there are 2 blocks of 2 tokens"):
        generate(model, [1], 3, steps=1, block_length=2)
    with pytest.raises(ValueError, match="block_length is 0"):
        generate(model, [1], 3, steps=1, block_length=0)
    with pytest.raises(ValueError, match=r"temperature is -1\.0"):
        generate(model, [1], 3, steps=1, temperature=-1.0)
    with pytest.raises(ValueError, match="remasking is 'entropy'"):
        generate(model, [1], 3, steps=1, remasking="entropy")
    with pytest.raises(ValueError, match="length is 0"):
        generate(model, [1], 0, steps=1)
    with pytest.raises(ValueError, match=r"\[B, T\] with B >= 1"):
        generate(model, torch.zeros(0, 3), 1, steps=1)
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="no mask_token_id"):
        infill(model, [1, 2], steps=1)


def _command(*arguments: str) -> int:
    from launcher.generate_command import add_generate_command

    parser = argparse.ArgumentParser()
    add_generate_command(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["generate", *arguments, "--device", "cpu"])
    status: int = parsed.run(parsed)
    return status


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_pipeline.tokenizers import load

    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step-3"
    tokenizer = load("bytes")
    tokenizer.save(folder / "tokenizer")
    sizes = {"vocab_size": tokenizer.padded_vocab_size, "mask_token_id": tokenizer.mask_id}
    model = build("qwen3", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16, **sizes)
    model.save_pretrained(folder / "model")
    return folder


def test_the_command_continues_and_infills(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(checkpoint), "--length", "12", "--temperature", "1"]
    texts = []
    for seed in ("1", "1", "2"):
        assert _command(*options, "--prompt", "import ", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("import ") for text in texts)
    (tmp_path / "prompt.txt").write_text("def {{mask:4}}(x):")
    prompt_file = ["--prompt-file", str(tmp_path / "prompt.txt")]
    assert _command("--model", str(checkpoint / "model"), *prompt_file, "--infill", "--steps", "2") == 0
    filled = capsys.readouterr().out
    assert filled.startswith("def ")
    assert filled.endswith("(x):\n")
    assert "{{mask" not in filled


def test_the_command_names_mistakes(checkpoint: Path, tmp_path: Path) -> None:
    model = ["--model", str(checkpoint)]
    with pytest.raises(ValueError, match="no such folder"):
        _command("--model", str(tmp_path / "step-9"), "--prompt", "a")
    with pytest.raises(ValueError, match="has no gap"):
        _command(*model, "--prompt", "a", "--infill")
    with pytest.raises(ValueError, match="--length goes with"):
        _command(*model, "--prompt", "a{{mask:2}}", "--infill", "--length", "3")
    with pytest.raises(ValueError, match="steps is 0"):
        _command(*model, "--prompt", "a", "--steps", "0")
    with pytest.raises(FileNotFoundError):
        _command(*model, "--prompt-file", str(tmp_path / "none.txt"))
