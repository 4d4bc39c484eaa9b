"""`dlm generate`: continue a prompt with a checkpoint, or fill the gaps of a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.trained_as import (
    add_weights_option,
    block_length,
    load_weights,
    objective_of,
    require_weights,
    shifted,
    trained_identity,
)

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.tokenizer_base import Tokenizer
    from dlm_dist.generation.samplers import ChoiceOptions

_DEFAULT_LENGTH = 128
_AHEAD = "card with --block-length"
_OWNERS = {
    "infill": ("mdlm",),
    "steps": ("mdlm", "block", _AHEAD),
    "block_length": ("mdlm", "block", _AHEAD),
    "remasking": ("mdlm", "block", _AHEAD),
    "threshold": ("mdlm", "block", _AHEAD),
    "top_k": ("ar", "card"),
    "top_p": ("ar", "card"),
}
"""Which objectives' texts each option is for."""


def add_generate_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt or fill the gaps of a text",
        description="Continue a prompt, or with --infill fill its gaps, written {{mask:N}} for N tokens. A masked "
        "diffusion model (mdlm) commits tokens surest first (low-confidence remasking); block diffusion (block) does "
        "so in one block after the other; a causal language model (ar, card) writes from left to right, that of card "
        "with --block-length several tokens at once. The text goes to standard output.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint: RUN/checkpoints/step-N")
    add_weights_option(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what to continue or to fill; may be empty")
    prompt.add_argument("--prompt-file", metavar="FILE", type=Path, help="the same from a UTF-8 file, - for stdin")
    parser.add_argument("--infill", action="store_true", help="mdlm: fill the gaps {{mask:N}} instead of continuing")
    parser.add_argument(
        "--length", type=int, metavar="N", help=f"tokens to add, not with --infill (default {_DEFAULT_LENGTH})"
    )
    parser.add_argument(
        "--steps", type=int, metavar="S", help="mdlm, block: model calls at most (default: one per token to fill)"
    )
    parser.add_argument(
        "--block-length",
        type=int,
        metavar="N",
        help="fill blocks of N tokens left to right (default: as it was trained; mdlm: all at once)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) = likeliest token")
    parser.add_argument(
        "--remasking", choices=("low_confidence", "random"), help="mdlm, block: what a step keeps (low_confidence)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="mdlm, block: a step also keeps what is surer than this probability",
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

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    require_weights(folder, arguments.weights)
    model = load_weights(folder, arguments.weights)
    model.to(torch.device(device))
    tokenizer = Tokenizer.load(_tokenizer_folder(folder))
    objective = objective_of(folder, model.direction, None)
    if trained_identity(folder).get("objective.name") == "card":
        objective = "card" if arguments.block_length is None else _AHEAD
    _require_options_of(objective, arguments)
    write = {"ar": _left_to_right, "card": _left_to_right, "block": _in_blocks, _AHEAD: _ahead}.get(
        objective, _by_remasking
    )
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
        _length(arguments),
        eos_id=tokenizer.eos_id,
        seed=arguments.seed,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=1.0 if arguments.top_p is None else arguments.top_p,
        forbidden_ids=ids_without_text(tokenizer, model.config.vocab_size),
    )


def _in_blocks(model: Any, tokenizer: Tokenizer, prompt: str, arguments: argparse.Namespace) -> Tensor:
    """Ids [T] of the prompt and what a model of block diffusion adds."""
    from dlm_dist.generation.blocks import generate_blocks

    size = block_length(Path(arguments.model), arguments.block_length)
    if size == 0:  # blocks of whole rows: masked diffusion
        return _by_remasking(model, tokenizer, prompt, arguments)
    length = _length(arguments)
    return generate_blocks(
        model,
        tokenizer.encode(prompt),
        length,
        _steps(arguments, length),
        block_length=size,
        eos_id=tokenizer.eos_id,
        **_choice(model, tokenizer, arguments),
    )


def _ahead(model: Any, tokenizer: Tokenizer, prompt: str, arguments: argparse.Namespace) -> Tensor:
    """Ids [T] of the prompt and what a CARD model adds, several tokens at once."""
    from dlm_dist.generation.blocks import generate_ahead

    length = _length(arguments)
    return generate_ahead(
        model,
        tokenizer.encode(prompt),
        length,
        _steps(arguments, length),
        block_length=arguments.block_length,
        eos_id=tokenizer.eos_id,
        **_choice(model, tokenizer, arguments),
    )


def _by_remasking(model: Any, tokenizer: Tokenizer, prompt: str, arguments: argparse.Namespace) -> Tensor:
    """Ids [T] of the prompt, continued or with its gaps filled by a masked diffusion model."""
    from dlm_dist.generation.samplers import DecodingOptions, generate, infill, parse_gaps

    size = arguments.block_length
    if size is None:  # what follows a block was hidden in the training of wsd, and is so here
        size = block_length(Path(arguments.model), None) or None
    options: DecodingOptions = {
        **_choice(model, tokenizer, arguments),
        "block_length": size,
        "shifted_behind": tokenizer.eos_id if shifted(Path(arguments.model)) else None,
    }
    if not arguments.infill:
        length = _length(arguments)
        steps = _steps(arguments, length)
        return generate(model, tokenizer.encode(prompt), length, steps, eos_id=tokenizer.eos_id, **options)
    ids = parse_gaps(prompt, tokenizer)
    gaps = ids.count(tokenizer.mask_id)
    if gaps == 0:
        raise ValueError("--infill: the prompt has no gap; write {{mask:N}} where N tokens are to be filled in.")
    options["forbidden_ids"] = [*options["forbidden_ids"], tokenizer.eos_id]
    return infill(model, ids, _steps(arguments, gaps), **options)


def _choice(model: Any, tokenizer: Tokenizer, arguments: argparse.Namespace) -> ChoiceOptions:
    """How tokens are chosen where they are committed surest first."""
    from dlm_dist.generation.samplers import ChoiceOptions, ids_without_text

    return ChoiceOptions(
        temperature=arguments.temperature,
        seed=arguments.seed,
        remasking=arguments.remasking or "low_confidence",
        threshold=arguments.threshold,
        forbidden_ids=ids_without_text(tokenizer, model.config.vocab_size),
    )


def _require_options_of(objective: str, arguments: argparse.Namespace) -> None:
    """Raise ValueError for an option of other objectives' texts."""
    for name, owners in _OWNERS.items():
        if objective not in owners and getattr(arguments, name) not in (None, False):
            raise ValueError(
                f"--{name.replace('_', '-')} is an option of {', '.join(owners)}, but {arguments.model} was trained "
                f"with the objective {objective}: leave it out"
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


def _length(arguments: argparse.Namespace) -> int:
    return _DEFAULT_LENGTH if arguments.length is None else int(arguments.length)


def _steps(arguments: argparse.Namespace, tokens: int) -> int:
    return tokens if arguments.steps is None else int(arguments.steps)


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
