"""`dlm init`: the initial weights of a run."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from launcher.quantities import count, size, torch_dtype


def add_init_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm init`."""
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
    model.to(torch_dtype(arguments.dtype))
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
    summary = ", ".join(f"{role} {count(number)}" for role, number in roles.most_common())
    stored = sum(parameter.nbytes for parameter in parameters.values())
    print(f"{arguments.out}: {count(sum(roles.values()))} parameters, {size(stored)} {arguments.dtype} ({summary})")
    return 0
