"""Opening what a path names as a source: a data set of ours, a Megatron pair, or token files of llm.c."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.shards import ShardedSource
from data_pipeline.source import Source
from data_pipeline.token_files import TokenFileSource
from data_pipeline.token_formats import llmc, megatron
from data_pipeline.tokenizer_base import Tokenizer


def is_token_files(path: str | Path) -> bool:
    """Whether `path` names other people's token files, which need a tokenizer and a sequence length to be opened.

    Raises DataError where it names such files and some are missing.
    """
    path = Path(path)
    return megatron.find(path) is not None or bool(llmc.find(path)) or _bin_of(path) is not None


def open_source(path: str | Path, sequence_length: int | None = None, tokenizer: Tokenizer | None = None) -> Source:
    """The source at `path`, told by what is there: a folder of `dlm data build`; the prefix, .bin or .idx of a Megatron
    data set; a .bin file, a folder or a pattern of .bin files of llm.c.

    Token files need `sequence_length` and the `tokenizer` that made them; a data set of ours has both of its own and
    refuses others. Raises DataError with what is wrong and what to do.
    """
    path = Path(path)
    if not is_token_files(path):
        return _open_built(path, sequence_length, tokenizer)
    pair, files = megatron.find(path), llmc.find(path)
    if pair is None and not files:
        raise _unknown(path)
    if tokenizer is None or sequence_length is None:
        needed = {"a tokenizer": tokenizer, "a sequence length": sequence_length}
        missing = " and ".join(name for name, value in needed.items() if value is None)
        raise DataError(f"{path} holds tokens and nothing else: give {missing} with it")
    if sequence_length < 2:
        raise DataError(f"the sequence length is {sequence_length}; a row needs at least 2 tokens")
    tokens = megatron.open_files(*pair) if pair is not None else llmc.open_files(files, tokenizer)
    return TokenFileSource(path, tokens, sequence_length, tokenizer)


def _open_built(path: Path, sequence_length: int | None, tokenizer: Tokenizer | None) -> ShardedSource:
    pairs = [file for file in sorted(path.glob("*.idx")) if file.with_suffix(".bin").is_file()] if path.is_dir() else []
    if pairs:
        raise DataError(
            f"{path} is a folder with Megatron data: name one of its prefixes, such as {pairs[0].with_suffix('')}"
        )
    source = ShardedSource.open(path)
    if tokenizer is not None:
        raise DataError(f"{path} was made by `dlm data build` and has its own tokenizer: leave the tokenizer out")
    if sequence_length not in (None, source.sequence_length):
        raise DataError(
            f"{path} holds rows of {source.sequence_length} tokens, not of {sequence_length}: leave the sequence "
            f"length out, or build the data with --sequence-length {sequence_length}"
        )
    return source


def _bin_of(path: Path) -> Path | None:
    """The .bin file that `path` means by its spelling; None if it means none."""
    if path.is_dir():
        return None
    if path.suffix in (".bin", ".idx"):
        return path.with_suffix(".bin")
    beside = path.with_name(path.name + ".bin")
    return beside if beside.is_file() else None


def _unknown(path: Path) -> DataError:
    tokens = _bin_of(path)
    assert tokens is not None
    if not tokens.is_file():
        return DataError(f"the token file {tokens} does not exist; check the path")
    return DataError(
        f"{tokens} does not begin like a token file of llm.c, and {tokens.with_suffix('.idx').name}, which a Megatron "
        "data set has, is not beside it: restore the .idx, or build a data set from text with `dlm data build`"
    )
