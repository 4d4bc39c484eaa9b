"""`dlm convert`: weights from and for other programs, and two sets of weights side by side."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.quantities import count, torch_dtype

if TYPE_CHECKING:
    from data_pipeline.tokenizer_base import Tokenizer
    from dlm_dist.models.comparison import Difference, Side
    from dlm_dist.models.conversion import Weights

_LAYOUTS = ("blinkdl", "fla", "qwen3")
_WORLD_ROWS = 65536
_DIFFERENT = 1


def add_convert_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm convert`."""
    convert = subparsers.add_parser(
        "convert",
        help="weights from and for other programs; compare two checkpoints",
        description="Convert or compare weights. blinkdl: a .pth as RWKV-LM trains and the package rwkv runs it; fla: "
        "a folder as flash-linear-attention's RWKV7ForCausalLM saves and loads it; qwen3: a folder of transformers' "
        "dense Qwen3ForCausalLM. Sizes are read from the source. The tensors keep their bits unless --dtype says "
        "otherwise.",
    )
    layout = convert.add_mutually_exclusive_group(required=True)
    layout.add_argument("--from", dest="source_layout", choices=_LAYOUTS, help="SRC is theirs, DST is new")
    layout.add_argument("--to", dest="target_layout", choices=_LAYOUTS, help="SRC is a checkpoint of ours, DST is new")
    layout.add_argument(
        "--compare",
        action="store_true",
        help="write nothing: names, shapes and dtypes of SRC and DST (each a checkpoint, a folder, a .safetensors or a "
        f".pth) side by side; exit status 0 if equal, {_DIFFERENT} if not",
    )
    convert.add_argument("source", metavar="SRC", type=Path, help="file or folder to read")
    convert.add_argument("destination", metavar="DST", type=Path, help="file or folder to write; must not exist")
    convert.add_argument(
        "--mask-token-id",
        type=int,
        metavar="N",
        help="with --from: the id that is to stand for a hidden token (default: an id that the tokenizer leaves free, "
        "65535 for RWKV World, 151669 for Qwen3; needed where no tokenizer is known)",
    )
    convert.add_argument(
        "--check-data",
        action="append",
        default=[],
        metavar="DATA",
        type=Path,
        help="with --from: read this data set or these token files and refuse if the mask id is in them (repeatable)",
    )
    convert.add_argument("--dtype", choices=("bf16", "fp32"), help="of the tensors (default: as stored)")
    convert.add_argument("--values", action="store_true", help="with --compare: the largest absolute differences too")
    convert.add_argument("--json", action="store_true", help="with --compare: one JSON object instead of a table")
    convert.set_defaults(run=run_convert)


def run_convert(arguments: argparse.Namespace) -> int:
    """Convert and print what was written, or compare. Returns 0, or 1 if the compared differ; raises ValueError."""
    _refuse_options_of_others(arguments)
    if arguments.compare:
        return _compare(arguments)

    from dlm_dist.models.conversion import refuse_existing

    refuse_existing(arguments.destination)
    (_convert_from if arguments.source_layout is not None else _convert_to)(arguments)
    return 0


def _refuse_options_of_others(arguments: argparse.Namespace) -> None:
    if arguments.source_layout is None:
        if arguments.mask_token_id is not None:
            raise ValueError("--mask-token-id goes with --from: other programs know no mask token.")
        if arguments.check_data:
            raise ValueError("--check-data goes with --from: it is the mask id of the new model that is looked for.")
    if not arguments.compare and (arguments.values or arguments.json):
        raise ValueError(f"--{'values' if arguments.values else 'json'} goes with --compare.")
    if arguments.compare and arguments.dtype is not None:
        raise ValueError("--dtype is for what is written, and --compare writes nothing.")


def _convert_from(arguments: argparse.Namespace) -> None:
    from data_pipeline.reserved_ids import refuse_in_data
    from dlm_dist.models.conversion import write_folder
    from dlm_dist.models.conversion_blinkdl import read_blinkdl
    from dlm_dist.models.conversion_fla import read_fla
    from dlm_dist.models.conversion_qwen3 import read_qwen3
    from launcher import qwen3_files

    readers: dict[str, Callable[[Path], Weights[Any]]] = {"blinkdl": read_blinkdl, "fla": read_fla, "qwen3": read_qwen3}
    source = arguments.source
    weights = _ready(readers[arguments.source_layout](source), arguments)
    tokenizer: Tokenizer | None = None
    add_files: Callable[[Path], None] | None = None
    mask_id: int | None = arguments.mask_token_id
    if arguments.source_layout == "qwen3":
        tokenizer, note = qwen3_files.load_tokenizer(source)
        if note is not None:
            print(f"note: {note}")
        mask_id = qwen3_files.choose_mask_id(source, weights.config, tokenizer, mask_id)
        add_files = qwen3_files.saver(source, tokenizer)
    elif mask_id is None:
        tokenizer = world = _world_tokenizer(source, weights.config.vocab_size)
        mask_id = world.mask_id

        def add_files(folder: Path) -> None:
            world.save(folder / "tokenizer")

    for path in arguments.check_data:
        refuse_in_data(path, mask_id, tokenizer)
    write_folder(weights, arguments.destination, mask_id, add_files)
    print(f"{arguments.destination}: {_described(weights)}; mask id {mask_id}")


def _convert_to(arguments: argparse.Namespace) -> None:
    from dlm_dist.models.conversion import read_folder
    from dlm_dist.models.conversion_blinkdl import write_blinkdl
    from dlm_dist.models.conversion_fla import write_fla
    from dlm_dist.models.conversion_qwen3 import write_qwen3
    from dlm_dist.training.checkpoint_files import require_whole
    from launcher import qwen3_files

    require_whole(arguments.source, ("model/",))
    weights = _ready(read_folder(arguments.source), arguments)
    if arguments.target_layout == "qwen3":
        write_qwen3(weights, arguments.destination, qwen3_files.restorer(arguments.source))
    else:
        {"blinkdl": write_blinkdl, "fla": write_fla}[arguments.target_layout](weights, arguments.destination)
    print(f"{arguments.destination}: {_described(weights)}")


def _ready(weights: Weights[Any], arguments: argparse.Namespace) -> Weights[Any]:
    """The weights in the dtype asked for, with their notes printed."""
    for note in weights.notes:
        print(f"note: {note}")
    return weights if arguments.dtype is None else weights.cast(torch_dtype(arguments.dtype))


def _world_tokenizer(source: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of all RWKV-7 models with this many ids. Raises ValueError for another number."""
    if vocab_size != _WORLD_ROWS:
        raise ValueError(
            f"{source} has a vocabulary of {vocab_size} ids, not the {_WORLD_ROWS} of RWKV World: say with "
            "--mask-token-id which of them is to stand for a hidden token."
        )
    from data_pipeline import tokenizers

    return tokenizers.load("rwkv-world")


def _described(weights: Weights[Any]) -> str:
    from dlm_dist.models.conversion import TIED_HEAD

    config = weights.config
    if hasattr(config, "lora_ranks"):
        ranks = config.lora_ranks
        heads = f"heads of {config.head_size}"
        particular = f"low-rank dimensions w {ranks.w}, a {ranks.a}, v {ranks.v}, g {ranks.g}"
    else:
        heads = f"{config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads} of keys"
        particular = f"embeddings {'tied' if config.tie_word_embeddings else 'not tied'}, {config.direction}"
    shared = {TIED_HEAD} if config.tie_word_embeddings else set()
    numbers = [tensor.numel() for name, tensor in weights.tensors.items() if name not in shared]
    return (
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, {heads}, vocabulary {config.vocab_size}, "
        f"{particular}; {count(sum(numbers))} parameters, {str(weights.dtype).removeprefix('torch.')}"
    )


def _compare(arguments: argparse.Namespace) -> int:
    from dlm_dist.models.comparison import compare
    from dlm_dist.training.checkpoint_files import require_whole

    for path in (arguments.source, arguments.destination):
        require_whole(path, ("model/",))
    found = compare(arguments.source, arguments.destination, arguments.values)
    equal = all(one.status == "equal" for one in found)
    statuses = Counter(one.status for one in found)
    if arguments.json:
        content = {
            "a": str(arguments.source),
            "b": str(arguments.destination),
            "equal": equal,
            "values_compared": arguments.values,
            "counts": dict(statuses),
            "tensors": [asdict(one) for one in found],
        }
        print(json.dumps(content))
    else:
        _print_table(found, arguments)
        counted = ", ".join(f"{number} {status}" for status, number in statuses.most_common())
        what = "names, shapes, dtypes and values" if arguments.values else "names, shapes and dtypes"
        print(f"{len(found)} tensors: {counted} ({what})")
    return 0 if equal else _DIFFERENT


def _print_table(found: list[Difference], arguments: argparse.Namespace) -> None:
    rows = [("name", f"a: {arguments.source}", f"b: {arguments.destination}", "")]
    for one in found:
        verdict = one.status if one.largest is None else f"{one.status} (largest difference {one.largest:.3g})"
        rows.append((one.name, _shown(one.a), _shown(one.b), verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        print("  ".join([*cells, row[3]]).rstrip())


def _shown(side: Side | None) -> str:
    return "-" if side is None else f"{list(side.shape)} {side.dtype}"
