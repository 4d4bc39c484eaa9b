"""Rows straight from other people's flat token files: N ids back to back, cut where a row begins, nothing copied.

Row i of a file is tokens i*T + 1 .. i*T + T, and the id before it is token i*T: to an autoregressive objective this
is what RWKV-LM and llm.c read, T + 1 tokens from i*T, all but the last as inputs and all but the first as targets. A
file has floor((N - 1) / T) rows; what is left at its end is not used, and no row crosses from one file to the next.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import CorruptShardError, DataError
from data_pipeline.files import canonical_json
from data_pipeline.open_files import OpenFiles
from data_pipeline.rows import SourceRows, document_ids
from data_pipeline.shards import VerifyReport
from data_pipeline.source import Source
from data_pipeline.tokenizer_base import Tokenizer

_MAX_OPEN_FILES = 64
_SAMPLED_BLOCKS = 64
_BLOCK_BYTES = 65536
_SCANNED_BYTES = 4 * 2**30
"""Files of up to this much together are read whole at opening: some seconds, once a start."""
_SCAN_TOKENS = 1 << 22


@dataclass(frozen=True)
class TokenFile:
    """`num_tokens` ids of type `dtype` in the file `path`, the first of them at byte `offset`."""

    path: Path
    offset: int
    dtype: np.dtype
    num_tokens: int


@dataclass(frozen=True)
class TokenFiles:
    """Files that belong together, in order, and what separates their documents.

    format: what wrote them. delimiter: the id between documents, None for the tokenizer's end of text.
    delimiter_starts_document: it stands before each document instead of behind it.
    """

    format: str
    files: tuple[TokenFile, ...]
    delimiter: int | None = None
    delimiter_starts_document: bool = False


class _OpenTokenFile:
    """Positional reads from any thread. Closes itself with its last user."""

    def __init__(self, file: TokenFile) -> None:
        self.file = file
        try:
            self._descriptor = os.open(file.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"the token file {file.path} cannot be opened: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, count: int) -> NDArray[np.integer]:
        """Tokens start .. start + count - 1, as they are stored.

        Read and not mapped: where a mapped file shrinks or its disk fails, the whole process dies of a signal.
        """
        tokens = np.empty(count, dtype=self.file.dtype)
        offset = self.file.offset + start * self.file.dtype.itemsize
        try:
            size = os.preadv(self._descriptor, [tokens.data.cast("B")], offset)
        except OSError as error:
            raise CorruptShardError(f"{self.file.path}: reading at byte {offset} failed: {error.strerror}") from error
        if size != tokens.nbytes:
            raise CorruptShardError(
                f"{self.file.path} has become shorter: {tokens.nbytes} bytes were expected at byte {offset}, {size} "
                "are there; restore the file"
            )
        return tokens


class TokenFileSource(Source):
    """The rows of token files that were made with `tokenizer`.

    path: what the user named. Raises DataError where the files hold no row, cannot have been made with the tokenizer,
    or hold ids that it does not have (beyond 4 GiB a sample is looked at, and every row when it is read).
    """

    def __init__(self, path: Path, tokens: TokenFiles, sequence_length: int, tokenizer: Tokenizer) -> None:
        self.path = path
        self.format = tokens.format
        self.token_files = tokens.files
        self.sequence_length = sequence_length
        self.vocab_size = tokenizer.vocab_size
        self.eos_id = tokenizer.eos_id
        self.mask_id = tokenizer.mask_id
        self.tokenizer_description = tokenizer.describe() | {"fingerprint": tokenizer.fingerprint}
        self.delimiter = tokenizer.eos_id if tokens.delimiter is None else tokens.delimiter
        self.delimiter_starts_document = tokens.delimiter_starts_document
        self._tokenizer = tokenizer
        rows = [max(0, file.num_tokens - 1) // sequence_length for file in tokens.files]
        self.num_rows = sum(rows)
        self._first_rows = np.cumsum([0, *rows[:-1]], dtype=np.int64)
        self._open_files = OpenFiles(self._open_file, _MAX_OPEN_FILES)
        self._require_rows_and_width()
        self.fingerprint, notes = self._sampled()
        self.notes = (*notes, *self._scanned())

    @property
    def num_tokens(self) -> int:
        """Tokens of all files."""
        return sum(file.num_tokens for file in self.token_files)

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> SourceRows:
        wanted = self._existing(indices)
        length = self.sequence_length
        stored = np.empty((len(wanted), length + 1), dtype=np.int64)
        numbers = np.searchsorted(self._first_rows, wanted, side="right") - 1
        starts = (wanted - self._first_rows[numbers]) * length
        for i, (number, start) in enumerate(zip(numbers.tolist(), starts.tolist(), strict=True)):
            stored[i] = self._open_files[number].read(start, length + 1)
            self._require_known(self.token_files[number], start, stored[i])
        tokens = np.ascontiguousarray(stored[:, 1:])
        per_id = self.token_bytes
        return SourceRows(
            tokens=tokens,
            document_ids=document_ids(tokens, self.delimiter, self.delimiter_starts_document),
            text_bytes=np.full(len(wanted), -1, dtype=np.int64) if per_id is None else per_id[tokens].sum(axis=1),
            before=stored[:, 0].copy(),
        )

    def load_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def tokenizer_files(self) -> dict[str, bytes]:
        return self._tokenizer_files

    @cached_property
    def _tokenizer_files(self) -> dict[str, bytes]:
        with TemporaryDirectory() as folder:
            self._tokenizer.save(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}

    def _open_file(self, number: int) -> _OpenTokenFile:
        return _OpenTokenFile(self.token_files[number])

    def _require_rows_and_width(self) -> None:
        if self.num_rows == 0:
            raise DataError(
                f"{self.path} holds {self.num_tokens} tokens, too few for a row of {self.sequence_length} and the "
                "token before it; choose a shorter sequence length"
            )
        for file in self.token_files:
            if self.delimiter > np.iinfo(file.dtype).max:
                raise DataError(
                    f"{file.path} holds ids of type {file.dtype}, and {self._tokenizer.name} ends documents with the "
                    f"id {self.delimiter}, which does not fit: name the tokenizer that made the file"
                )

    def _require_known(self, file: TokenFile, start: int, tokens: NDArray[np.integer]) -> None:
        """DataError if `tokens` [n], which begin at token `start` of `file`, hold an id that text cannot have."""
        unknown = (tokens < 0) | (tokens >= self.vocab_size) | (tokens == self.mask_id)
        if unknown.any():
            first = int(np.flatnonzero(unknown)[0])
            token = int(tokens[first])
            what = "hides tokens and is in no text" if token == self.mask_id else "the tokenizer does not have"
            raise DataError(
                f"{file.path}: token {start + first} is the id {token}, which {what}: {self._tokenizer.name} has ids "
                f"from 0 to {self.vocab_size - 1}, {self.mask_id} being the mask; name the tokenizer that made the file"
            )

    def _scanned(self) -> tuple[str, ...]:
        """Look for ids that text cannot have in all files, or, of too much, a note that only a sample was looked at."""
        total = sum(file.num_tokens * file.dtype.itemsize for file in self.token_files)
        if total > _SCANNED_BYTES:
            return (
                f"{self.path}: {total / 1e9:.0f} GB of tokens, of which only a sample was looked at for ids that text "
                "cannot have, as the mask; every row is looked at again when it is read",
            )
        for number, file in enumerate(self.token_files):
            for start in range(0, file.num_tokens, _SCAN_TOKENS):
                count = min(_SCAN_TOKENS, file.num_tokens - start)
                self._require_known(file, start, self._open_files[number].read(start, count))
        return ()

    def _sampled(self) -> tuple[str, tuple[str, ...]]:
        """The fingerprint, and a note if no document ends in what it looks at.

        The files are known by their sizes and types and by 64 blocks of 64 KiB evenly over all of them, in each file at
        least its first and last: hashing terabytes at every start would take hours. The names do not count.
        """
        blocks = max(2, _SAMPLED_BLOCKS // len(self.token_files))
        described: list[dict[str, Any]] = []
        looked_at = delimiters = 0
        for number, file in enumerate(self.token_files):
            digest = hashlib.sha256()
            for start, count in _blocks(file, blocks):
                tokens = self._open_files[number].read(start, count)
                self._require_known(file, start, tokens)
                digest.update(tokens.tobytes())
                looked_at += count
                delimiters += int((tokens == self.delimiter).sum())
            described.append({"dtype": file.dtype.str, "tokens": file.num_tokens, "sampled_sha256": digest.hexdigest()})
        content = {
            "format": self.format,
            "rows": "T tokens from i * T + 1 of each file",
            "sequence_length": self.sequence_length,
            "tokenizer": self._tokenizer.fingerprint,
            "delimiter": [self.delimiter, self.delimiter_starts_document],
            "files": described,
        }
        notes: tuple[str, ...] = ()
        if not delimiters:
            notes = (
                f"{self.path}: none of the {looked_at} tokens looked at is {self.delimiter}, the end of a document: "
                f"all text counts as one document, or another tokenizer than {self._tokenizer.name} made the file",
            )
        return hashlib.sha256(canonical_json(content)).hexdigest(), notes


def _blocks(file: TokenFile, count: int) -> list[tuple[int, int]]:
    """(first token, tokens) of `count` blocks evenly over the file, or all of it where they would overlap."""
    size = _BLOCK_BYTES // file.dtype.itemsize
    if file.num_tokens <= count * size:
        return [(0, file.num_tokens)]
    return [(i * (file.num_tokens - size) // (count - 1), size) for i in range(count)]


def verify_token_files(source: TokenFileSource) -> VerifyReport:
    """Read every row: whether it is there and holds ids of the tokenizer's. There are no checksums to compare."""
    problems: list[str] = []
    for row in range(source.num_rows):
        try:
            source.read([row])
        except DataError as error:
            problems.append(str(error))
    return VerifyReport(sources=1, shards=len(source.token_files), rows=source.num_rows, problems=problems)
