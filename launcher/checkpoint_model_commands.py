"""`dlm checkpoint export | average`: the model of a checkpoint, or the mean of several, as a folder of its own."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.checkpoint_diff_command import differing_keys

if TYPE_CHECKING:
    from dlm_dist.training.checkpoint_contents import Contents

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_NOT_COMPARED = ("dtype", "torch_dtype", "transformers_version")


def add_model_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both to the commands of `dlm checkpoint`."""
    export = commands.add_parser(
        "export",
        help="write model and tokenizer into a folder of their own",
        description="Write the model as `from_pretrained` reads it, with the tokenizer in OUT/tokenizer, after a check "
        "of every byte. OUT/origin.json says which weights these are. For other layouts see `dlm convert --to`.",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="RUN/checkpoints/step-N")
    export.add_argument("output", metavar="OUT", type=Path, help="a folder that does not exist yet")
    export.add_argument(
        "--weights",
        choices=("trained", "master", "ema"),
        default="trained",
        help="trained (default): as the forward pass has them; master: the optimizer's, in fp32; ema: the average of "
        "those that train.ema_half_life keeps",
    )
    export.add_argument("--dtype", choices=_DTYPES, help="of the files (default: trained as they are, others fp32)")
    export.set_defaults(run=run_export)
    average = commands.add_parser(
        "average",
        help="write the mean of several checkpoints as a model",
        description="Write the mean of the fp32 masters of checkpoints of one model, summed in fp64, as "
        "`from_pretrained` and model.init_from read it, with the tokenizer, after a check of every byte. The order of "
        "the checkpoints makes no difference. DIR/origin.json says what was averaged.",
    )
    average.add_argument("checkpoints", metavar="CHECKPOINT", type=Path, nargs="+", help="RUN/checkpoints/step-N")
    average.add_argument("--output", metavar="DIR", type=Path, required=True, help="a folder that does not exist yet")
    average.add_argument(
        "--coefficients",
        metavar="C",
        type=float,
        nargs="+",
        help="how much each counts, relative to the others (default: all the same)",
    )
    average.add_argument(
        "--weights", choices=("master", "ema"), default="master", help="what is averaged (default: the masters)"
    )
    average.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the files (default: fp32)")
    average.set_defaults(run=run_average)


def run_export(arguments: argparse.Namespace) -> int:
    """Write the folder. Returns 0; raises ValueError where the checkpoint is damaged or the folder exists."""
    dtype = arguments.dtype
    if dtype is None and arguments.weights != "trained":
        dtype = "fp32"
    _write([arguments.checkpoint], [1.0], arguments.output, arguments.weights, dtype)
    return 0


def run_average(arguments: argparse.Namespace) -> int:
    """Write the folder. Returns 0; raises ValueError for the user's mistakes, before anything is written."""
    paths, coefficients = arguments.checkpoints, arguments.coefficients
    if len(paths) < 2:
        raise ValueError(f"{paths[0]} alone has no average: name several, or use `dlm checkpoint export`")
    if coefficients is None:
        coefficients = [1.0] * len(paths)
    if len(coefficients) != len(paths):
        raise ValueError(f"--coefficients has {len(coefficients)} numbers for {len(paths)} checkpoints: give one each")
    if not all(math.isfinite(value) and value > 0 for value in coefficients):
        raise ValueError(f"--coefficients is {coefficients}: expected numbers above 0")
    _write(paths, coefficients, arguments.output, arguments.weights, arguments.dtype)
    return 0


def _write(paths: Sequence[Path], coefficients: Sequence[float], output: Path, weights: str, dtype: str | None) -> None:
    """Write a model folder, whole or not at all, and say so."""
    import torch

    from dlm_dist.training.checkpoint_contents import Contents
    from dlm_dist.training.checkpoint_files import require_checkpoint
    from dlm_dist.training.model_files import stored_dtype, write_model

    if output.exists():
        raise ValueError(f"{output} exists already: name a new folder")
    for path in paths:
        require_checkpoint(path)
    contents = [Contents(path) for path in paths]
    for other in contents[1:]:
        _require_same_model(contents[0], other)
    staging = output.with_name(f".{output.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    stored = stored_dtype(contents[0]) if dtype is None else getattr(torch, _DTYPES[dtype])
    write_model(staging, contents, coefficients, weights, stored)
    staging.rename(output)
    files = [file for file in output.rglob("*") if file.is_file()]
    what = {"trained": "the weights", "master": "the fp32 masters", "ema": "the EMA"}[weights]
    of = paths[0].resolve().name if len(paths) == 1 else f"{len(paths)} checkpoints, averaged"
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{output}: {what} of {of} in {str(stored).removeprefix('torch.')}, {len(files)} files, {size:.1f} MB")


def _require_same_model(one: Contents, other: Contents) -> None:
    """Raise ValueError where two checkpoints are not of one model, read with one tokenizer."""
    from dlm_dist.training.checkpoint_files import read_manifest

    pair = f"{one.path} and {other.path}"
    for name in sorted({*one.shapes, *other.shapes}):
        mine, theirs = one.shapes.get(name), other.shapes.get(name)
        if mine != theirs:
            shown = " and ".join("missing" if shape is None else str(list(shape)) for shape in (mine, theirs))
            raise ValueError(f"{pair} hold different models: {name} is {shown}; average checkpoints of one model")
    for key, mine, theirs in differing_keys(one.config, other.config):
        if key not in _NOT_COMPARED:
            raise ValueError(f"{pair} hold different models: {key} in config.json is {mine!r} and {theirs!r}")
    tokenizers = [
        {name: entry["sha256"] for name, entry in read_manifest(contents.path).items() if name.startswith("tokenizer/")}
        for contents in (one, other)
    ]
    if tokenizers[0] != tokenizers[1]:
        raise ValueError(f"{pair} were trained with different tokenizers: the same weights mean other tokens there")
