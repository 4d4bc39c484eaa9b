"""`dlm checkpoint diff`: what two checkpoints differ in."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

_STATUS_DIFFERENT = 1
_SHOWN = 40


def add_diff_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add it to the commands of `dlm checkpoint`."""
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


def run_diff(arguments: argparse.Namespace) -> int:
    """Print what differs. Returns 0 if nothing does, 1 otherwise."""
    from dlm_dist.training.checkpoint_contents import Contents, differences
    from dlm_dist.training.checkpoint_files import load_trainer_state, require_checkpoint

    for path in (arguments.a, arguments.b):
        require_checkpoint(path)
    keys = list(differing_keys(load_trainer_state(arguments.a), load_trainer_state(arguments.b)))
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


def differing_keys(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Leaves of two trees that differ, by their dotted keys; None where one has none."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in sorted({*a, *b}):
            yield from differing_keys(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key, a, b
