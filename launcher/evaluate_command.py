"""`dlm evaluate`: the bound of a checkpoint on held-out rows, or for a causal language model their likelihood.

One process, or several that a launcher started (`torchrun --nproc_per_node 2 -m launcher.cli evaluate ...`): the
rows are dealt out to the ranks and the number is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.trained_as import (
    OBJECTIVES,
    add_weights_option,
    block_length,
    load_weights,
    objective_of,
    require_weights,
    shifted,
    trained_identity,
)

if TYPE_CHECKING:
    import torch

    from data_pipeline.source import Source


def add_evaluate_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm evaluate`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="likelihood of held-out rows under a checkpoint, or a bound on it",
        description="Estimate the bound on the negative log-likelihood of held-out rows. Times and masks are the "
        "same for every model, so two numbers differ by their models alone. For the objective ar the number is the "
        "negative log-likelihood itself, and nothing is drawn. Runs as one process, or on several "
        "ranks: torchrun --nproc_per_node N -m launcher.cli evaluate ...",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="RUN/checkpoints/step-N, or a model folder")
    add(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="a data set (its validation/ where it has one), or token files of Megatron or llm.c",
    )
    add("--tokenizer", metavar="NAME|PATH", help="tokenizer of token files, as in `dlm data build`")
    add("--sequence-length", type=_positive, metavar="N", help="tokens per row of token files")
    add_weights_option(parser)
    add("--rows", type=_positive, metavar="N", help="only the first N rows (default: all)")
    add("--objective", choices=OBJECTIVES, help="how the rows are scored (default: as the checkpoint was trained)")
    add(
        "--draws", type=_positive, default=1, metavar="N", help="times and masks drawn per row (default: 1; ar: only 1)"
    )
    add(
        "--block-length",
        type=_positive,
        metavar="N",
        help="block: tokens per block (default: the length that training was at)",
    )
    add("--batch-size", type=_positive, default=8, metavar="N", help="rows per forward pass (default: 8)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (default): CUDA if there is one")
    add("--dtype", choices=("bf16", "fp32"), help="arithmetic of the network (default: as stored)")
    add("--unigram-from", type=Path, metavar="DIR", help="also a unigram model of this data set (its train/)")
    add(
        "--isolate-documents",
        action=argparse.BooleanOptionalAction,
        help="whether tokens see only their own document within a row (default: as the checkpoint was trained)",
    )
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_evaluate)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Print the bound. Returns 0; raises ValueError for the user's mistakes. Collective where RANK is set."""
    source, train = _open_both(arguments)
    require_weights(arguments.checkpoint, arguments.weights)
    compared = _require_same_tokens(arguments.checkpoint, source)
    if train is not None and train.tokenizer_description["fingerprint"] != source.tokenizer_description["fingerprint"]:
        raise ValueError(f"{train.path} and {source.path} were built with different tokenizers")

    import torch
    from transformers.utils import logging as transformers_logging

    from data_pipeline.progress import progress
    from dlm_dist.evaluation.bound import evaluate_bound, unigram_nats_per_token

    with _joined(arguments.device) as (device, rank, world):
        if rank or not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        dtype = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype]
        model = load_weights(arguments.checkpoint, arguments.weights, dtype)
        objective = objective_of(arguments.checkpoint, model.direction, arguments.objective, tell=rank == 0)
        if objective == "ar" and arguments.draws > 1:
            raise ValueError(f"--draws is {arguments.draws}: the objective ar has nothing to draw, leave it out")
        if arguments.block_length is not None and objective != "block":
            raise ValueError(f"--block-length is {arguments.block_length}: the objective {objective} has no blocks")
        _require_vocabulary(model.config, source, arguments.checkpoint, masked=objective != "ar")
        if rank == 0:
            for note in (*source.notes, *(train.notes if train is not None else ())):
                print(f"note: {note}", file=sys.stderr)
        if not compared and rank == 0:
            print(
                f"note: {arguments.checkpoint} has no tokenizer/, only ids were compared with the data", file=sys.stderr
            )
        model.to(device)
        rows = min(arguments.rows or source.num_rows, source.num_rows)
        isolate = arguments.isolate_documents
        if isolate is None:
            isolate = bool(trained_identity(arguments.checkpoint).get("data.isolate_documents", False))
        length = block_length(arguments.checkpoint, arguments.block_length, source.sequence_length)
        with progress("evaluate", rows * arguments.draws, "rows") if rank == 0 else nullcontext() as advance:
            bound = evaluate_bound(
                model,
                source,
                device,
                num_rows=rows,
                draws=arguments.draws,
                batch_size=arguments.batch_size,
                isolate_documents=isolate,
                objective=objective,
                shift=objective == "mdlm" and shifted(arguments.checkpoint),
                block_length=length if objective == "block" else 0,
                advance=advance,
            )
    if rank:
        return 0
    report = {
        "checkpoint": str(arguments.checkpoint),
        "weights": arguments.weights,
        "data": str(source.path),
        "objective": objective,
        **bound.record(),
        "unigram_nats_per_token": unigram_nats_per_token(train, source, rows) if train is not None else None,
        "sequence_length": source.sequence_length,
        "block_length": length if objective == "block" else None,
        "isolate_documents": isolate,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device.type,
        "world_size": world,
    }
    print(json.dumps(report) if arguments.json else _told(report, train))
    return 0


def _told(report: dict[str, Any], train: Source | None) -> str:
    bound, error, unigram = (
        report[name] for name in ("bound_nats_per_token", "standard_error", "unigram_nats_per_token")
    )
    exact = report["exact"]
    name = "likelihood" if exact else "bound"
    drawn = "" if exact else f", {report['draws']} {'draw' if report['draws'] == 1 else 'draws'} each"
    lines = [
        f"{report['checkpoint']} on {report['rows']} rows of {report['sequence_length']} tokens of {report['data']}"
        f"{drawn}, {report['dtype']}" + ("" if report["weights"] == "trained" else f" ({report['weights']})"),
        f"  {name:<14} {bound:.4f}" + (f" +- {error:.4f}" if error is not None else "") + " nats per token",
    ]
    if report["bits_per_byte"] is not None:
        lines.append(f"  {name:<14} {report['bits_per_byte']:.4f} bits per byte")
    if train is not None:
        lines.append(
            f"  unigram        {unigram:.4f} nats per token (add-one counts of {train.path}); "
            f"the {name} is {abs(unigram - bound):.4f} {'below' if bound < unigram else 'above'}"
        )
    for bucket in report["loss_by_time"] or ():
        lines.append(f"  t {bucket['first']:.1f} to {bucket['last']:.1f}  " + _bucket_told(bucket))
    return "\n".join(lines)


def _bucket_told(bucket: dict[str, Any]) -> str:
    if bucket["nats_per_token"] is None:
        return "no draw"
    error = bucket["standard_error"]
    return (
        f"{bucket['nats_per_token']:.4f}"
        + (f" +- {error:.4f}" if error is not None else "")
        + f" nats per token  ({bucket['draws']} {'draw' if bucket['draws'] == 1 else 'draws'})"
    )


# --- data and checkpoint belong together -----------------------------------------------------------------------


def _open_both(arguments: argparse.Namespace) -> tuple[Source, Source | None]:
    """The held-out rows, and the source of --unigram-from. Raises ValueError for what is not asked for as it is."""
    from data_pipeline import tokenizers
    from data_pipeline.shards import source_folders
    from data_pipeline.sources import is_token_files, open_source

    paths = [path for path in (arguments.data, arguments.unigram_from) if path is not None]
    given = arguments.tokenizer is not None or arguments.sequence_length is not None
    if given and not any(is_token_files(path) for path in paths):
        raise ValueError(f"--tokenizer and --sequence-length are for token files, and {arguments.data} is a data set")
    tokenizer = tokenizers.load(arguments.tokenizer) if arguments.tokenizer is not None else None

    def opened(path: Path, split: str) -> Source:
        if is_token_files(path):
            return open_source(path, arguments.sequence_length, tokenizer)
        return open_source(path / split if path / split in source_folders(path) else path)

    source = opened(arguments.data, "validation")
    return source, opened(arguments.unigram_from, "train") if arguments.unigram_from is not None else None


def _require_same_tokens(checkpoint: Path, source: Source) -> bool:
    """Raise ValueError if the rows are of another tokenizer than the checkpoint's tokenizer/ folder.

    False where there is no such folder, as with weights from elsewhere.
    """
    from data_pipeline.tokenizers import Tokenizer

    folder = next((f for f in (checkpoint / "tokenizer", checkpoint.parent / "tokenizer") if f.is_dir()), None)
    if folder is None:
        return False
    ours = Tokenizer.load(folder)
    theirs = source.tokenizer_description
    if ours.mask_id != source.mask_id:
        raise ValueError(f"{source.path} has mask id {source.mask_id}, the tokenizer of {checkpoint} {ours.mask_id}")
    if ours.fingerprint != theirs["fingerprint"]:
        raise ValueError(
            f"{source.path} was built with another tokenizer ({theirs['name']}) than {checkpoint} was trained with "
            f"({ours.name}): build the data with --tokenizer {folder}"
        )
    return True


def _require_vocabulary(config: Any, source: Source, checkpoint: Path, masked: bool) -> None:
    """Raise ValueError if the rows hold ids that the model does not know, or are `masked` with another id."""
    if masked and config.mask_token_id != source.mask_id:
        raise ValueError(
            f"{source.path} has mask id {source.mask_id}, the model of {checkpoint} {config.mask_token_id}"
        )
    needed = max(source.vocab_size, source.mask_id + 1 if masked else 0)
    if config.vocab_size < needed:
        raise ValueError(
            f"{source.path} holds ids up to {needed - 1}, but the vocabulary of {checkpoint} ends at "
            f"{config.vocab_size - 1}: evaluate on data of the model's own tokenizer"
        )


# --- ranks -----------------------------------------------------------------------------------------------------


@contextmanager
def _joined(wanted: str) -> Iterator[tuple[torch.device, int, int]]:
    """(device, rank, ranks) in the process group of the launcher; a world of one where none set RANK."""
    import torch
    import torch.distributed as dist

    from dlm_dist.training.distributed import threads_per_rank

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no CUDA device: use --device cpu")
    kind = "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
    if "RANK" not in os.environ:
        yield torch.device(kind), 0, 1
        return
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_rank())
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield device, dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()
