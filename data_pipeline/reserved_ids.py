"""Which ids a tokenizer leaves free, told from the files of a Hugging Face folder, and whether data keeps them free.

An id is used when any of the files gives it to a token, base or added: published folders list their special tokens
in several places, and not always in all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.shards import ShardedSource, source_folders
from data_pipeline.sources import is_token_files
from data_pipeline.token_files import TokenFile
from data_pipeline.token_formats import llmc, megatron
from data_pipeline.tokenizer_base import Tokenizer

_ROWS = 1024
_TOKENS = 1 << 22


def ids_in_use(folder: str | Path) -> dict[int, str]:
    """Each id that the tokenizer files in `folder` use, and what by: "'<|im_end|>' of tokenizer.json".

    Reads tokenizer.json, vocab.json, added_tokens.json and tokenizer_config.json; empty where there is none of them.
    Raises DataError for one that is not what it should be.
    """
    used: dict[int, str] = {}
    for name, entries in _ENTRIES.items():
        file = Path(folder) / name
        if not file.is_file():
            continue
        try:
            for text, token in entries(json.loads(file.read_text(encoding="utf-8"))):
                used.setdefault(int(token), f"{text!r} of {name}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{file} does not look like a tokenizer's {name}: {error!r}") from error
    return used


def refuse_in_data(path: str | Path, token: int, tokenizer: Tokenizer | None = None) -> None:
    """Read all that is at `path`, a data set of ours or token files, and raise DataError where `token` is in it.

    `tokenizer`: the one that made the token files, which llm.c's cannot be opened without.
    """
    path = Path(path)
    if not is_token_files(path):
        for folder in source_folders(path):
            _refuse_in_rows(ShardedSource.open(folder), token)
        return
    pair = megatron.find(path)
    if pair is not None:
        tokens = megatron.open_files(*pair)
    elif tokenizer is not None:
        tokens = llmc.open_files(llmc.find(path), tokenizer)
    else:
        raise DataError(f"{path} holds tokens of llm.c, which cannot be read without the tokenizer that made them")
    for file in tokens.files:
        _refuse_in_file(file, token)


def _refuse_in_rows(source: ShardedSource, token: int) -> None:
    for start in range(0, source.num_rows, _ROWS):
        rows = source.read(np.arange(start, min(start + _ROWS, source.num_rows)))
        place = _first(rows.tokens == token)
        if place is not None:
            row, column = divmod(place, source.sequence_length)
            raise DataError(f"{source.path}: token {column} of row {start + row} is the id {token}, which is not free")


def _refuse_in_file(file: TokenFile, token: int) -> None:
    for start in range(0, file.num_tokens, _TOKENS):
        count = min(_TOKENS, file.num_tokens - start)
        tokens = np.fromfile(file.path, file.dtype, count, offset=file.offset + start * file.dtype.itemsize)
        place = _first(tokens == token)
        if place is not None:
            raise DataError(f"{file.path}: token {start + place} is the id {token}, which is not free")


def _first(found: NDArray[np.bool_]) -> int | None:
    """Where the first True is, counted through the flattened array."""
    places = np.flatnonzero(found)
    return int(places[0]) if len(places) else None


def _of_definition(content: Any) -> Iterable[tuple[str, int]]:
    vocabulary = content["model"]["vocab"]
    # A list is that of a unigram model: pairs of text and score, whose place is the id.
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    else:
        yield from ((text, token) for token, (text, _) in enumerate(vocabulary))
    for added in content.get("added_tokens") or []:
        yield added["content"], added["id"]


def _of_mapping(content: Any) -> Iterable[tuple[str, int]]:
    yield from content.items()


def _of_settings(content: Any) -> Iterable[tuple[str, int]]:
    for token, added in (content.get("added_tokens_decoder") or {}).items():
        yield added["content"], int(token)


_ENTRIES: dict[str, Callable[[Any], Iterable[tuple[str, int]]]] = {
    "tokenizer.json": _of_definition,
    "vocab.json": _of_mapping,
    "added_tokens.json": _of_mapping,
    "tokenizer_config.json": _of_settings,
}
