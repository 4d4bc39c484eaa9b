"""`dlm generate`: continue a prompt, or fill the gaps of a text, with a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipeline.tokenizer_base import Tokenizer

_DEFAULT_LENGTH = 128


def add_generate_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt or fill the gaps of a text",
        description="Continue a prompt, or with --infill fill its gaps, written {{mask:N}} for N tokens. Tokens are "
        "committed surest first (low-confidence remasking). The text goes to standard output.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint: RUN/checkpoints/step-N")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what to continue or to fill; may be empty")
    prompt.add_argument("--prompt-file", metavar="FILE", type=Path, help="the same from a UTF-8 file, - for stdin")
    parser.add_argument("--infill", action="store_true", help="fill the gaps {{mask:N}} instead of continuing")
    parser.add_argument(
        "--length", type=int, metavar="N", help=f"tokens to add, not with --infill (default {_DEFAULT_LENGTH})"
    )
    parser.add_argument("--steps", type=int, metavar="S", help="model calls (default: one per token to fill)")
    parser.add_argument("--block-length", type=int, metavar="N", help="fill blocks of N tokens left to right")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) = likeliest token")
    parser.add_argument("--remasking", choices=("low_confidence", "random"), default="low_confidence")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu ... (default: CUDA if there is one)")
    parser.set_defaults(run=run_generate)


def run_generate(arguments: argparse.Namespace) -> int:
    """Print the text. Returns 0; raises ValueError or OSError for the user's mistakes."""
    if arguments.infill and arguments.length is not None:
        raise ValueError("--length goes with continuing a prompt; with --infill the gaps say how much to fill.")
    prompt = _prompt(arguments)
    folder = Path(arguments.model)

    import torch

    from data_pipeline.tokenizer_base import Tokenizer
    from dlm_dist.generation.samplers import DecodingOptions, generate, infill, parse_gaps
    from dlm_dist.models import load

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    model = load(folder)
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    tokenizer = Tokenizer.load(_tokenizer_folder(folder))
    options = DecodingOptions(
        block_length=arguments.block_length,
        temperature=arguments.temperature,
        seed=arguments.seed,
        remasking=arguments.remasking,
        forbidden_ids=_ids_without_text(tokenizer, model.config.vocab_size),
    )
    if arguments.infill:
        ids = parse_gaps(prompt, tokenizer)
        gaps = ids.count(tokenizer.mask_id)
        if gaps == 0:
            raise ValueError("--infill: the prompt has no gap; write {{mask:N}} where N tokens are to be filled in.")
        options["forbidden_ids"] = [*options["forbidden_ids"], tokenizer.eos_id]
        filled = infill(model, ids, _steps(arguments, gaps), **options)
    else:
        length = _DEFAULT_LENGTH if arguments.length is None else arguments.length
        steps = _steps(arguments, length)
        filled = generate(model, tokenizer.encode(prompt), length, steps, eos_id=tokenizer.eos_id, **options)
    text = filled.tolist()
    while text and text[-1] == tokenizer.eos_id:
        text.pop()
    print(tokenizer.decode(text))
    return 0


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        return str(arguments.prompt)
    if str(arguments.prompt_file) == "-":
        return sys.stdin.read()
    try:
        return str(arguments.prompt_file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{arguments.prompt_file} is no UTF-8 text: {error}") from error


def _tokenizer_folder(model: Path) -> Path:
    """tokenizer/ beside model/ in a checkpoint, also when the model/ folder itself is named."""
    for folder in (model / "tokenizer", model.parent / "tokenizer"):
        if folder.is_dir():
            return folder
    raise ValueError(f"{model} has no tokenizer/ folder: name a checkpoint (RUN/checkpoints/step-N).")


def _ids_without_text(tokenizer: Tokenizer, vocabulary: int) -> list[int]:
    """Ids that stand for no text, end of text apart: reserved, unused, or beyond the tokenizer's vocabulary."""
    beyond = list(range(tokenizer.vocab_size, vocabulary))
    lengths = tokenizer.token_bytes()
    if lengths is None:
        return beyond
    return [int(token) for token in (lengths == 0).nonzero()[0] if token != tokenizer.eos_id] + beyond


def _steps(arguments: argparse.Namespace, tokens: int) -> int:
    return tokens if arguments.steps is None else int(arguments.steps)


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
