"""Left-to-right sampling: from known distributions, with random numbers that belong to a row and a place."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlm_dist.generation.autoregressive import Sampling, continue_text
from dlm_dist.generation.samplers import generate
from dlm_dist.models import build
from tests import small_checkpoints

EOS, MASK, VOCABULARY = 7, 8, 9
TABLE = [0.4, 0.3, 0.15, 0.1, 0.05]


class KnownModel(nn.Module):
    """Next-token logits [V] from a table by the last token; remembers what it was asked."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.config = SimpleNamespace(mask_token_id=MASK, vocab_size=VOCABULARY)
        self.device = torch.device("cpu")
        self.asked: list[list[list[int]]] = []

    def incremental(self, input_ids: Tensor, state: int | None = None) -> tuple[Tensor, int]:
        assert not self.training
        assert (state is None) == (not self.asked)
        self.asked.append(input_ids.tolist())
        return self.table[input_ids], len(self.asked)


def one_after_the_other() -> KnownModel:
    """Every token is followed by the next id, 6 by end of text; a mask token would be likelier still."""
    table = torch.full((VOCABULARY, VOCABULARY), -10.0)
    for token in range(VOCABULARY - 1):
        table[token, (token + 1) % MASK] = 5.0
        table[token, MASK] = 50.0
    return KnownModel(table)


def test_a_prompt_is_read_behind_an_end_of_text_and_ends_with_one() -> None:
    model = one_after_the_other().train()
    ids = continue_text(model, [[2, 3], [3, 4]], 6, eos_id=EOS)
    assert ids.tolist() == [[2, 3, 4, 5, 6, EOS, EOS, EOS], [3, 4, 5, 6, EOS, EOS, EOS, EOS]]
    # The second row goes on while the first has not ended, and nobody is asked once both have.
    assert model.asked == [[[EOS, 2, 3], [EOS, 3, 4]], [[4], [5]], [[5], [6]], [[6], [EOS]]]
    assert model.training
    assert continue_text(one_after_the_other(), [], 3, eos_id=EOS).tolist() == [0, 1, 2]


def frequencies(sampling: Sampling, draws: int = 40_000) -> Tensor:
    """Shares [V] of what `sampling` draws from TABLE."""
    logits = torch.tensor(TABLE).log().expand(draws, -1)
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.bincount(sampling.choose(logits, uniform), minlength=len(TABLE)) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), TABLE),
        (Sampling(temperature=0.5), [p**2 / sum(q**2 for q in TABLE) for p in TABLE]),
        (Sampling(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=99), TABLE),
        (Sampling(temperature=1.0, top_p=0.8), [p / 0.85 for p in TABLE[:3]] + [0, 0]),
        (Sampling(temperature=1.0, top_k=2, top_p=0.5), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0, top_p=1e-9), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0, forbidden_ids=[0]), [0] + [p / 0.6 for p in TABLE[1:]]),
        (Sampling(temperature=0.0), [1, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_come_with_their_probabilities(sampling: Sampling, expected: list[float]) -> None:
    for found, p in zip(frequencies(sampling).tolist(), expected, strict=True):
        assert abs(found - p) <= 4 * math.sqrt(p * (1 - p) / 40_000)


def test_equal_logits_and_the_ends_of_the_unit_interval() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, -torch.inf]])
    assert Sampling().choose(logits, torch.tensor([0.9])).tolist() == [1]
    highest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    lowest = torch.zeros(1, dtype=torch.float64)
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=3, top_p=0.999)):
        assert sampling.choose(logits, lowest).tolist() == [0]
        assert sampling.choose(logits, highest).tolist() == [2]
    assert Sampling(temperature=1.0, top_k=1).choose(logits, highest).tolist() == [1]


@pytest.mark.parametrize("seeds", [5, [5, 6, 7]])
def test_a_row_does_not_depend_on_the_rows_beside_it(seeds: Any) -> None:
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
    prompts = [[1, 2], [3, 4], [1, 2]]
    together = continue_text(KnownModel(table), prompts, 20, eos_id=EOS, seed=seeds, temperature=1.0)
    for row, prompt in enumerate(prompts):
        seed = seeds if isinstance(seeds, int) else seeds[row]
        alone = continue_text(KnownModel(table), prompt, 20, eos_id=EOS, seed=seed, temperature=1.0)
        assert together[row].tolist() == alone.tolist()
    assert (together[0].tolist() == together[2].tolist()) == isinstance(seeds, int)


@pytest.mark.parametrize(
    ("backbone", "sizes"), [("qwen3", {"num_attention_heads": 2, "head_dim": 16}), ("rwkv7", {"head_size": 32})]
)
def test_the_likeliest_text_of_real_backbones_is_that_of_whole_passes(backbone: str, sizes: dict[str, Any]) -> None:
    model = build(
        backbone, vocab_size=40, hidden_size=64, num_hidden_layers=2, mask_token_id=39, direction="causal", **sizes
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    found = continue_text(model, [[1, 2, 3], [4, 5, 6]], 10, eos_id=38, forbidden_ids=[38])
    ids = torch.tensor([[38, 1, 2, 3], [38, 4, 5, 6]])
    for _ in range(10):
        logits = model(input_ids=ids).logits[:, -1, :38]
        ids = torch.cat([ids, logits.argmax(dim=1, keepdim=True)], dim=1)
    assert found.tolist() == ids[:, 1:].tolist()


def test_mistakes_are_named() -> None:
    model = one_after_the_other()
    for options, said in (
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": [1, 2]}, "seed has 2 values for 1 prompts"),
    ):
        with pytest.raises(ValueError, match=said):
            continue_text(model, [1], 3, eos_id=EOS, **options)
    with pytest.raises(ValueError, match="length is 0"):
        continue_text(model, [1], 0, eos_id=EOS)
    both = build(
        "qwen3", vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, head_dim=16, mask_token_id=8
    )
    with pytest.raises(ValueError, match="of direction bidirectional sees later tokens"):
        continue_text(both, [1], 3, eos_id=EOS)


def _checkpoint(folder: Path, objective: str, direction: str) -> Path:
    from data_pipeline.tokenizers import load

    return small_checkpoints.publish(folder, load("bytes"), {"objective.name": objective}, direction=direction)


def _command(checkpoint: Path, *arguments: str) -> int:
    from launcher.generate_command import add_generate_command

    parser = argparse.ArgumentParser()
    add_generate_command(parser.add_subparsers(required=True))
    options = ["--model", str(checkpoint), "--prompt", "import ", "--device", "cpu", "--length", "12"]
    parsed = parser.parse_args(["generate", *options, *arguments])
    status: int = parsed.run(parsed)
    return status


def test_the_command_writes_as_the_checkpoint_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    causal = _checkpoint(tmp_path / "causal", "ar", "causal")
    texts = []
    for seed in ("1", "1", "2"):
        assert _command(causal, "--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("import ") for text in texts)
    for option in (["--steps", "3"], ["--block-length", "4"], ["--remasking", "random"]):
        with pytest.raises(ValueError, match=f"{option[0]} is an option of mdlm, .*, but .* the objective ar"):
            _command(causal, *option)


def test_the_command_refuses_the_other_sampler(tmp_path: Path) -> None:
    for direction in ("bidirectional", "causal"):
        masked = _checkpoint(tmp_path / direction, "mdlm", direction)
        assert _command(masked, "--steps", "3") == 0
        for option in (["--top-k", "3"], ["--top-p", "0.5"]):
            with pytest.raises(ValueError, match=f"{option[0]} is an option of ar, card, but .* the objective mdlm"):
                _command(masked, *option)


def test_a_causal_model_without_a_mask_token_cannot_be_unmasked() -> None:
    model = one_after_the_other()
    model.config.mask_token_id = None
    assert continue_text(model, [1], 1, eos_id=EOS).tolist() == [1, MASK]
    with pytest.raises(ValueError, match="no mask_token_id"):
        generate(model, [1], 1, steps=1)
