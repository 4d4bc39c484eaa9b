"""`dlm generate`: continue a prompt with a checkpoint, or fill the gaps of a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.trained_as import objective_of, shifted

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.tokenizer_base import Tokenizer

_DEFAULT_LENGTH = 128
_OPTIONS_OF = {"mdlm": ("infill", "steps", "block_length", "remasking"), "ar": ("top_k", "top_p")}


def add_generate_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt or fill the gaps of a text",
        description="Continue a prompt, or with --infill fill its gaps, written {{mask:N}} for N tokens. A masked "
        "diffusion model (mdlm) commits tokens surest first (low-confidence remasking); a causal language model (ar) "
        "writes from left to right and fills no gaps. The text goes to standard output.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint: RUN/checkpoints/step-N")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what to continue or to fill; may be empty")
    prompt.add_argument("--prompt-file", metavar="FILE", type=Path, help="the same from a UTF-8 file, - for stdin")
    parser.add_argument("--infill", action="store_true", help="mdlm: fill the gaps {{mask:N}} instead of continuing")
    parser.add_argument(
        "--length", type=int, metavar="N", help=f"tokens to add, not with --infill (default {_DEFAULT_LENGTH})"
    )
    parser.add_argument("--steps", type=int, metavar="S", help="mdlm: model calls (default: one per token to fill)")
    parser.add_argument("--block-length", type=int, metavar="N", help="mdlm: fill blocks of N tokens left to right")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) = likeliest token")
    parser.add_argument(
        "--remasking", choices=("low_confidence", "random"), help="mdlm: what a step keeps (default: low_confidence)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="ar: draw from the K likeliest tokens (default: all)")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="ar: draw from the likeliest tokens of this probability (default: 1)"
    )
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
    from dlm_dist.generation.samplers import until_the_end
    from dlm_dist.models import load

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    model: Any = load(folder)
    model.to(torch.device(device))
    tokenizer = Tokenizer.load(_tokenizer_folder(folder))
    objective = objective_of(folder, model.direction, None)
    if objective == "block":
        raise ValueError(f"{folder} was trained by block diffusion: texts of such models cannot be drawn yet")
    _require_options_of(objective, arguments)
    write = _left_to_right if objective == "ar" else _by_remasking
    ids = write(model, tokenizer, prompt, arguments)
    print(tokenizer.decode(until_the_end(ids, tokenizer.eos_id)))
    return 0


def _left_to_right(model: Any, tokenizer: Tokenizer, prompt: str, arguments: argparse.Namespace) -> Tensor:
    """Ids [T] of the prompt and what a causal language model adds."""
    from dlm_dist.generation.autoregressive import continue_text
    from dlm_dist.generation.samplers import ids_without_text

    return continue_text(
        model,
        tokenizer.encode(prompt),
        _DEFAULT_LENGTH if arguments.length is None else arguments.length,
        eos_id=tokenizer.eos_id,
        seed=arguments.seed,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=1.0 if arguments.top_p is None else arguments.top_p,
        forbidden_ids=ids_without_text(tokenizer, model.config.vocab_size),
    )


def _by_remasking(model: Any, tokenizer: Tokenizer, prompt: str, arguments: argparse.Namespace) -> Tensor:
    """Ids [T] of the prompt, continued or with its gaps filled by a masked diffusion model."""
    from dlm_dist.generation.samplers import DecodingOptions, generate, ids_without_text, infill, parse_gaps

    options = DecodingOptions(
        block_length=arguments.block_length,
        temperature=arguments.temperature,
        seed=arguments.seed,
        remasking=arguments.remasking or "low_confidence",
        forbidden_ids=ids_without_text(tokenizer, model.config.vocab_size),
        shifted_behind=tokenizer.eos_id if shifted(Path(arguments.model)) else None,
    )
    if not arguments.infill:
        length = _DEFAULT_LENGTH if arguments.length is None else arguments.length
        steps = _steps(arguments, length)
        return generate(model, tokenizer.encode(prompt), length, steps, eos_id=tokenizer.eos_id, **options)
    ids = parse_gaps(prompt, tokenizer)
    gaps = ids.count(tokenizer.mask_id)
    if gaps == 0:
        raise ValueError("--infill: the prompt has no gap; write {{mask:N}} where N tokens are to be filled in.")
    options["forbidden_ids"] = [*options["forbidden_ids"], tokenizer.eos_id]
    return infill(model, ids, _steps(arguments, gaps), **options)


def _require_options_of(objective: str, arguments: argparse.Namespace) -> None:
    """Raise ValueError for an option of the other objective's sampler."""
    for other, names in _OPTIONS_OF.items():
        for name in names:
            if other != objective and getattr(arguments, name) not in (None, False):
                raise ValueError(
                    f"--{name.replace('_', '-')} is an option of {other}, but {arguments.model} was trained with the "
                    f"objective {objective}: leave it out"
                )


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


def _steps(arguments: argparse.Namespace, tokens: int) -> int:
    return tokens if arguments.steps is None else int(arguments.steps)


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
