"""`dlm checkpoint diff | export`: what two checkpoints differ in, and a checkpoint's model for other programs."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

_STATUS_DIFFERENT = 1
_SHOWN = 40


def add_diff_and_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both to the commands of `dlm checkpoint`."""
    diff = commands.add_parser(
        "diff",
        help="say what two checkpoints differ in",
        description="Compare the state of training, and weights, fp32 masters and optimizer states by parameter, "
        "whatever ranks and ZeRO stages wrote them; 8-bit states by their values. The exit status is 1 when they "
        "differ.",
    )
    diff.add_argument("a", metavar="A", type=Path, help="a checkpoint (RUN/checkpoints/step-N)")
    diff.add_argument("b", metavar="B", type=Path, help="another one")
    diff.add_argument("--json", action="store_true", help="print one JSON object")
    diff.set_defaults(run=run_diff)
    export = commands.add_parser(
        "export",
        help="copy model and tokenizer into a folder of their own",
        description="Write the model as `from_pretrained` reads it, with the tokenizer in OUT/tokenizer, after a check "
        "of every byte. For other layouts see `dlm convert --to`.",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="RUN/checkpoints/step-N")
    export.add_argument("output", metavar="OUT", type=Path, help="a folder that does not exist yet")
    export.add_argument(
        "--masters", action="store_true", help="the fp32 masters instead of the weights in the dtype of training"
    )
    export.set_defaults(run=run_export)


def run_diff(arguments: argparse.Namespace) -> int:
    """Print what differs. Returns 0 if nothing does, 1 otherwise."""
    from dlm_dist.training.checkpoint_contents import Contents, differences
    from dlm_dist.training.checkpoint_files import load_trainer_state

    for path in (arguments.a, arguments.b):
        _require_checkpoint(path)
    keys = list(_differing_keys(load_trainer_state(arguments.a), load_trainer_state(arguments.b)))
    contents = Contents(arguments.a), Contents(arguments.b)
    tensors = list(differences(*contents))
    if arguments.json:
        found = {"keys": [{"key": key, "a": a, "b": b} for key, a, b in keys], "tensors": [asdict(t) for t in tensors]}
        print(json.dumps({"a": str(arguments.a), "b": str(arguments.b), "equal": not keys and not tensors, **found}))
    else:
        for key, one, other in keys:
            print(f"{key}: {one!r} -> {other!r}")
        largest = sorted(tensors, key=lambda one: -1 if one.largest is None else -one.largest)
        for tensor in largest[:_SHOWN]:
            only = "only in one of them, or of another shape"
            print(
                f"{tensor.parameter} {tensor.what}: "
                + (only if tensor.largest is None else f"largest difference {tensor.largest:.3g}")
            )
        if len(largest) > _SHOWN:
            print(f"... and {len(largest) - _SHOWN} with smaller differences")
        total = sum(len(contents[0].tensors(name)) for name in contents[0].shapes)
        print(f"{len(keys)} values of the state and {len(tensors)} of {total} tensors differ")
    return _STATUS_DIFFERENT if keys or tensors else 0


def run_export(arguments: argparse.Namespace) -> int:
    """Write the folder. Returns 0; raises ValueError where the checkpoint is damaged or the folder exists."""
    _require_checkpoint(arguments.checkpoint)
    output: Path = arguments.output
    if output.exists():
        raise ValueError(f"{output} exists already: name a new folder")
    staging = output.with_name(f".{output.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(arguments.checkpoint / "model", staging)
    if (arguments.checkpoint / "tokenizer").is_dir():
        shutil.copytree(arguments.checkpoint / "tokenizer", staging / "tokenizer")
        if (staging / "tokenizer" / "tokenizer.json").is_file():
            # Where AutoTokenizer looks.
            shutil.copy(staging / "tokenizer" / "tokenizer.json", staging)
    if arguments.masters:
        _replace_by_masters(arguments.checkpoint, staging)
    staging.rename(output)
    files = [file for file in output.rglob("*") if file.is_file()]
    print(f"{output}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    return 0


def _replace_by_masters(checkpoint: Path, model: Path) -> None:
    from safetensors import safe_open

    from dlm_dist.training.checkpoint_contents import Contents
    from dlm_dist.training.checkpoint_snapshot import safetensors_buffers
    from dlm_dist.training.durable_files import write_files

    contents = Contents(checkpoint)
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        file.unlink()
        write_files(model, {file.name: safetensors_buffers({name: contents.master(name) for name in names})})
    config = json.loads((model / "config.json").read_text())
    config["dtype"] = "float32"
    (model / "config.json").write_text(json.dumps(config, indent=2))


def _require_checkpoint(path: Path) -> None:
    """Raise ValueError where `path` is no checkpoint, or not as it was written."""
    from dlm_dist.training.checkpoint_files import CheckpointError, verify

    if problems := verify(path):
        raise CheckpointError(f"{path} is no whole checkpoint: {problems[0]}")


def _differing_keys(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Leaves of two trees that differ, by their dotted keys; None where one has none."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in sorted({*a, *b}):
            yield from _differing_keys(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key, a, b
