"""`dlm init` and `dlm convert`: the initial weights of a run, and RWKV-7 weights from and for other programs."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from data_pipeline.tokenizer_base import Tokenizer
    from dlm_dist.models.conversion import Weights

_LAYOUTS = ("blinkdl", "fla")
_WORLD_ROWS = 65536


def add_model_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm init` and `dlm convert`."""
    init = subparsers.add_parser(
        "init",
        help="write the model that a run would start from",
        description="Write the initial weights of a run: those of step 0 of a training with this configuration, to the "
        "bit. OUT is a new folder, with the tokenizer beside the weights, or a new file *.pth in BlinkDL's layout "
        "(causal RWKV-7 only).",
    )
    init.add_argument("config", metavar="CONFIG", type=Path, help="configuration of the run")
    init.add_argument("out", metavar="OUT", type=Path, help="new folder, or new file *.pth")
    init.add_argument("overrides", metavar="key.sub=value", nargs="*", help="values instead of the configuration's")
    init.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32", help="of the tensors (default: fp32)")
    init.set_defaults(run=run_init)

    convert = subparsers.add_parser(
        "convert",
        help="RWKV-7 weights from and for other programs",
        description="Convert RWKV-7 weights. blinkdl: a .pth as RWKV-LM trains and the package rwkv runs it; fla: a "
        "folder as flash-linear-attention's RWKV7ForCausalLM saves and loads it. Sizes and low-rank dimensions are "
        "read from the source. The tensors keep their bits unless --dtype says otherwise.",
    )
    layout = convert.add_mutually_exclusive_group(required=True)
    layout.add_argument("--from", dest="source_layout", choices=_LAYOUTS, help="SRC is theirs, DST is new")
    layout.add_argument("--to", dest="target_layout", choices=_LAYOUTS, help="SRC is a checkpoint of ours, DST is new")
    convert.add_argument("source", metavar="SRC", type=Path, help="file or folder to read")
    convert.add_argument("destination", metavar="DST", type=Path, help="file or folder to write; must not exist")
    convert.add_argument(
        "--mask-token-id",
        type=int,
        metavar="N",
        help="with --from: the id that is to stand for a hidden token (default: that of rwkv-world, which is then "
        "saved beside the weights; needed for a vocabulary of other than 65,536 ids)",
    )
    convert.add_argument("--dtype", choices=("bf16", "fp32"), help="of the tensors (default: as stored)")
    convert.set_defaults(run=run_convert)


def run_init(arguments: argparse.Namespace) -> int:
    """Write the initial model and print one line. Returns 0; raises ValueError for the user's mistakes."""
    from dlm_dist.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    as_file = arguments.out.suffix == ".pth"
    if as_file and (config.model.backbone, config.model.direction) != ("rwkv7", "causal"):
        raise ValueError(
            f"{arguments.out}: BlinkDL's layout holds a causal RWKV-7, and the configuration has model.backbone "
            f"{config.model.backbone}, model.direction {config.model.direction}: name a folder instead"
        )

    from transformers.utils import logging as transformers_logging

    from dlm_dist.models.conversion import Weights, refuse_existing, staged
    from dlm_dist.models.conversion_blinkdl import write_blinkdl
    from dlm_dist.training.sources import open_sources
    from dlm_dist.training.starting_model import initial_model, resolve_sizes

    refuse_existing(arguments.out)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    source = open_sources(config)[0]
    model, _ = initial_model(resolve_sizes(config, source), source.mask_id)
    model.to(_dtype(arguments.dtype))
    if as_file:
        write_blinkdl(Weights(model.config, model.state_dict()), arguments.out)
    else:
        with staged(arguments.out) as folder:
            model.save_pretrained(folder)
            (folder / "tokenizer").mkdir()
            for name, content in source.tokenizer_files().items():
                (folder / "tokenizer" / name).write_bytes(content)
    parameters = dict(model.named_parameters())
    roles: Counter[str] = Counter()
    for name, role in model.parameter_roles().items():
        roles[role] += parameters[name].numel()
    summary = ", ".join(f"{role} {_count(number)}" for role, number in roles.most_common())
    size = sum(parameter.nbytes for parameter in parameters.values())
    print(f"{arguments.out}: {_count(sum(roles.values()))} parameters, {_size(size)} {arguments.dtype} ({summary})")
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    """Convert and print what was written. Returns 0; raises ValueError for the user's mistakes."""
    if arguments.target_layout is not None and arguments.mask_token_id is not None:
        raise ValueError("--mask-token-id goes with --from: other programs know no mask token.")

    from dlm_dist.models.conversion import read_folder, refuse_existing, write_folder
    from dlm_dist.models.conversion_blinkdl import read_blinkdl, write_blinkdl
    from dlm_dist.models.conversion_fla import read_fla, write_fla

    refuse_existing(arguments.destination)
    if arguments.source_layout is not None:
        weights = {"blinkdl": read_blinkdl, "fla": read_fla}[arguments.source_layout](arguments.source)
    else:
        _require_whole(arguments.source)
        weights = read_folder(arguments.source)
    for note in weights.notes:
        print(f"note: {note}")
    if arguments.dtype is not None:
        weights = weights.cast(_dtype(arguments.dtype))
    if arguments.mask_token_id is not None:
        write_folder(weights, arguments.destination, arguments.mask_token_id)
    elif arguments.source_layout is not None:
        tokenizer = _world_tokenizer(arguments.source, weights.config.vocab_size)
        write_folder(weights, arguments.destination, tokenizer.mask_id, tokenizer.save)
    else:
        {"blinkdl": write_blinkdl, "fla": write_fla}[arguments.target_layout](weights, arguments.destination)
    print(f"{arguments.destination}: {_described(weights)}")
    return 0


def _world_tokenizer(source: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of all RWKV-7 models with this many ids. Raises ValueError for another number."""
    if vocab_size != _WORLD_ROWS:
        raise ValueError(
            f"{source} has a vocabulary of {vocab_size} ids, not the {_WORLD_ROWS} of RWKV World: say with "
            "--mask-token-id which of them is to stand for a hidden token."
        )
    from data_pipeline import tokenizers

    return tokenizers.load("rwkv-world")


def _require_whole(checkpoint: Path) -> None:
    """Raise ValueError if the weights of a published checkpoint are not what was written."""
    from dlm_dist.training.checkpoint_files import MANIFEST, TRAINER_STATE, verify

    if (checkpoint / MANIFEST).is_file() and (checkpoint / TRAINER_STATE).is_file():
        problems = verify(checkpoint, only=("model/",))
        if problems:
            raise ValueError(f"{checkpoint} is damaged: {problems[0]}")


def _described(weights: Weights) -> str:
    config, ranks = weights.config, weights.config.lora_ranks
    numbers = [tensor.numel() for tensor in weights.tensors.values()]
    return (
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, heads of {config.head_size}, vocabulary "
        f"{config.vocab_size}, low-rank dimensions w {ranks.w}, a {ranks.a}, v {ranks.v}, g {ranks.g}; "
        f"{_count(sum(numbers))} parameters, {str(weights.dtype).removeprefix('torch.')}"
    )


def _dtype(name: str) -> torch.dtype:
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def _count(number: int) -> str:
    """A count with the unit that leaves few digits."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"
