"""`dlm data build | verify | show | inspect | export`: data sets from the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.build import BuildSummary
    from data_pipeline.source import Source
    from data_pipeline.token_files import TokenFileSource

Subparsers = argparse._SubParsersAction


def add_data_commands(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Add `dlm data` with its sub-commands."""
    data = subparsers.add_parser(
        "data",
        help="build, verify and look at data sets",
        description="Turn text into packed rows of tokens in plain WebDataset tars, and look at the result.",
    )
    commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_build(commands)
    verify = commands.add_parser(
        "verify",
        help="read a data set from end to end and check every byte",
        description="Check index, file sizes, sha256, tar headers and the checksum of every row.",
    )
    verify.set_defaults(run=run_verify)
    show = commands.add_parser("show", help="print a row as text")
    show.add_argument("--row", type=int, required=True, metavar="N", help="number of the row, from 0")
    show.set_defaults(run=run_show)
    inspect = commands.add_parser("inspect", help="print counts, tokenizer and fingerprint")
    inspect.set_defaults(run=run_inspect)
    for command in (verify, show, inspect):
        command.add_argument(
            "path", metavar="PATH", help="a data set or one split of it, or token files of Megatron or llm.c"
        )
        command.add_argument(
            "--tokenizer", metavar="NAME|PATH", help="tokenizer of token files, as in `dlm data build`"
        )
        command.add_argument("--sequence-length", type=int, metavar="N", help="tokens per row of token files")
        command.add_argument("--json", action="store_true", help="print one JSON object")
    _add_export(commands)


def _add_build(commands: Subparsers[argparse.ArgumentParser]) -> None:
    build = commands.add_parser(
        "build",
        help="build a data set from text files or JSON lines",
        description="Build a data set from text files or JSON lines. The same input and options give the same "
        "bytes, whatever the number of workers. A build that was stopped goes on when it is started again.",
    )
    add = build.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files and folders, in this order")
    add("--output", required=True, metavar="DIR", help="folder for train/ and validation/")
    add(
        "--tokenizer",
        required=True,
        metavar="NAME|PATH",
        help="rwkv-world, bytes, characters (learned from the input), or a folder with a tokenizer.json or with "
        "vocab.json and merges.txt",
    )
    add("--sequence-length", type=int, required=True, metavar="N", help="tokens per row")
    add("--format", default="auto", help="auto (by suffix, the default), text or jsonl (also .gz and .zst)")
    add("--text-key", default="text", metavar="KEY", help="key of the text in a JSON line (default: text)")
    add(
        "--split-text-at",
        metavar="REGEX",
        help="cut text files into documents before each match; without it a file is one document",
    )
    add("--include", action="append", default=[], metavar="GLOB", help="of folders only these files, as '*.py'")
    add("--exclude", action="append", default=[], metavar="GLOB", help="of folders not these files")
    add(
        "--validation-fraction",
        type=float,
        default=0.0,
        metavar="X",
        help="expected share of the documents to hold out, at least one (default: 0, no validation split)",
    )
    add(
        "--workers",
        type=int,
        default=_cores(),
        metavar="N",
        help="processes (default: the number of cores, here %(default)s)",
    )
    add("--rows-per-shard", type=int, metavar="N", help="default: shards of about 128 MiB of tokens")
    add("--json", action="store_true", help="print the summary as one JSON object")
    build.set_defaults(run=run_build)


def _add_export(commands: Subparsers[argparse.ArgumentParser]) -> None:
    export = commands.add_parser(
        "export",
        help="write a data set as token files of Megatron or llm.c",
        description="Write the documents of a built data set, in order, as token files that other trainers read: "
        "PREFIX.bin and PREFIX.idx of Megatron (also for RWKV-LM), with the end of text behind each document, or "
        "PREFIX.bin of llm.c, with the end of text before each.",
    )
    export.add_argument("path", metavar="DIR", help="a data set with one split, or one split of it")
    export.add_argument("--to", required=True, choices=("megatron", "llmc"), help="format to write")
    export.add_argument("--output", required=True, metavar="PREFIX", help="beginning of the files' names")
    export.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    export.set_defaults(run=run_export)


def _cores() -> int:
    # macOS does not say which cores this process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_build(arguments: argparse.Namespace) -> int:
    """Build and print what came out. Returns 0 when the data set is complete."""
    from dataclasses import asdict

    from data_pipeline.build import BuildOptions, build_dataset

    summary = build_dataset(
        BuildOptions(
            inputs=tuple(arguments.input),
            output=arguments.output,
            tokenizer=arguments.tokenizer,
            sequence_length=arguments.sequence_length,
            format=arguments.format,
            text_key=arguments.text_key,
            split_text_at=arguments.split_text_at,
            include=tuple(arguments.include),
            exclude=tuple(arguments.exclude),
            validation_fraction=arguments.validation_fraction,
            workers=arguments.workers,
            rows_per_shard=arguments.rows_per_shard,
        )
    )
    print(json.dumps(asdict(summary)) if arguments.json else _told(summary))
    return 0


def _told(summary: BuildSummary) -> str:
    lines = [f"{summary.output}: already built with these options" if summary.already_built else summary.output]
    lines += [
        f"  {name}: {split.rows} rows, {split.documents} documents, {split.tokens} tokens (the last row repeats "
        f"{split.repeated_tokens} from the beginning), {split.text_bytes / 1e6:.1f} MB of text"
        for name, split in summary.splits.items()
    ]
    if summary.empty_documents:
        lines.append(f"  {summary.empty_documents} empty documents were left out")
    if summary.quarantine is not None:
        lines.append(f"  {summary.bad_records} bad records were left out; they are listed in {summary.quarantine}")
    return "\n".join(lines)


def run_verify(arguments: argparse.Namespace) -> int:
    """Check every byte. Returns 0 if all is well, 1 after printing what is not."""
    from dataclasses import asdict

    from data_pipeline.shards import verify
    from data_pipeline.token_files import verify_token_files

    source = _token_files(arguments)
    report = verify(arguments.path) if source is None else verify_token_files(source)
    if arguments.json:
        print(json.dumps(asdict(report)))
    else:
        for problem in report.problems:
            print(problem, file=sys.stderr)
        verdict = f"{len(report.problems)} problems" if report.problems else "all intact"
        print(f"{arguments.path}: {report.rows} rows in {report.shards} shards: {verdict}")
    return 1 if report.problems else 0


def _token_files(arguments: argparse.Namespace) -> TokenFileSource | None:
    """The source at `path` if it is token files, None if it is a data set; notes on it go to stderr."""
    from data_pipeline import tokenizers
    from data_pipeline.sources import is_token_files, open_source
    from data_pipeline.token_files import TokenFileSource

    if not is_token_files(arguments.path):
        if arguments.tokenizer is not None or arguments.sequence_length is not None:
            raise ValueError(f"--tokenizer and --sequence-length are for token files, and {arguments.path} is none")
        return None
    tokenizer = tokenizers.load(arguments.tokenizer) if arguments.tokenizer is not None else None
    source = open_source(arguments.path, arguments.sequence_length, tokenizer)
    assert isinstance(source, TokenFileSource)
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    return source


def run_show(arguments: argparse.Namespace) -> int:
    """Print one row as text, end of text and all."""
    from data_pipeline.shards import ShardedSource

    source: Source = _token_files(arguments) or ShardedSource.open(arguments.path)
    rows = source.read([arguments.row])
    text = source.load_tokenizer().decode(rows.tokens[0])
    if arguments.json:
        content = {
            "row": arguments.row,
            "text": text,
            "tokens": rows.tokens[0].tolist(),
            "document_ids": rows.document_ids[0].tolist(),
            "text_bytes": int(rows.text_bytes[0]),
            "before": int(rows.before[0]),
        }
        print(json.dumps(content))
    else:
        print(text)
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    """Print what the indexes of a data set, or the headers of token files, say."""
    from data_pipeline.shards import source_folders

    source = _token_files(arguments)
    if source is not None:
        described = [_token_files_described(source)]
        if arguments.json:
            print(json.dumps(described[0]))
            return 0
    else:
        described = [_split_described(folder) for folder in source_folders(arguments.path)]
        if arguments.json:
            print(json.dumps({"splits": {split["split"]: split for split in described}}))
            return 0
    for key in described[0]:
        values = [split[key][:16] if key == "fingerprint" else str(split[key]) for split in described]
        print("".join([f"{key:<18}", *(f"{value:>20}" for value in values)]))
    return 0


def _split_described(folder: Path) -> dict[str, Any]:
    from data_pipeline.shards import SourceIndex

    index = SourceIndex.read(folder)
    stored = index.num_rows * index.sequence_length
    return {
        "split": index.split,
        "rows": index.num_rows,
        "sequence_length": index.sequence_length,
        "tokens": stored - index.repeated_tokens,
        "repeated_tokens": index.repeated_tokens,
        "documents": index.documents,
        "text_bytes": index.text_bytes,
        "bytes_per_token": round(index.text_bytes / stored, 4),
        "shards": len(index.shards),
        "dtype": {"<u2": "uint16", "<u4": "uint32"}[index.dtype],
        "tokenizer": index.tokenizer["name"],
        "vocab_size": index.tokenizer["vocab_size"],
        "eos_id": index.tokenizer["eos_id"],
        "mask_id": index.tokenizer["mask_id"],
        "fingerprint": index.fingerprint,
    }


def _token_files_described(source: TokenFileSource) -> dict[str, Any]:
    from data_pipeline.order import cubic_prime

    return {
        "format": source.format,
        "files": len(source.token_files),
        "rows": source.num_rows,
        "sequence_length": source.sequence_length,
        "tokens": source.num_tokens,
        # RWKV-LM calls it magic_prime.
        "cubic_prime": cubic_prime(source.num_rows) if source.num_rows > 2 else None,
        "dtype": ", ".join(sorted({str(file.dtype) for file in source.token_files})),
        "tokenizer": source.tokenizer_description["name"],
        "vocab_size": source.vocab_size,
        "eos_id": source.eos_id,
        "delimiter": source.delimiter,
        "delimiter_stands": "before" if source.delimiter_starts_document else "behind",
        "mask_id": source.mask_id,
        "fingerprint": source.fingerprint,
    }


def run_export(arguments: argparse.Namespace) -> int:
    """Write token files and print what they hold."""
    from dataclasses import asdict

    from data_pipeline.export import export_source
    from data_pipeline.progress import progress
    from data_pipeline.shards import ShardedSource

    source = ShardedSource.open(arguments.path)
    with progress("export", source.num_rows, "rows") as advance:
        summary = export_source(source, arguments.to, arguments.output, advance)
    if arguments.json:
        print(json.dumps(asdict(summary)))
    else:
        print(f"{', '.join(summary.files)}: {summary.tokens} tokens in {summary.documents} documents")
    return 0
