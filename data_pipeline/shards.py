"""A source: a folder of shards with an index.json, opened in no time and read by row number from any thread."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import CorruptShardError, DataError
from data_pipeline.files import canonical_json, read_json, write_json
from data_pipeline.open_files import OpenFiles
from data_pipeline.rows import SourceRows, document_ids
from data_pipeline.shard_file import ShardFile, ShardRecord, idx_size, verify_shard, write_shard
from data_pipeline.source import Source
from data_pipeline.tokenizer_base import Tokenizer

__all__ = [
    "CorruptShardError",
    "ShardedSource",
    "SourceIndex",
    "VerifyReport",
    "row_dtype",
    "source_folders",
    "verify",
    "write_source",
]

INDEX_FILE = "index.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "validation")
_FORMAT = "dlm-rows"
_FORMAT_VERSION = 1
_MAX_OPEN_SHARDS = 64


def row_dtype(vocab_size: int) -> np.dtype:
    """The little-endian type that holds every id: uint16 if the vocabulary fits it, else uint32."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


@dataclass(frozen=True)
class SourceIndex:
    """The contents of index.json; the counts are over the whole source.

    text_bytes: UTF-8 bytes of text of all rows. repeated_tokens: how many tokens at the end of the last row
    come a second time, from the beginning of the split, to fill it.
    """

    split: str
    sequence_length: int
    dtype: str
    num_rows: int
    documents: int
    text_bytes: int
    repeated_tokens: int
    tokenizer: dict[str, Any]
    shards: list[ShardRecord]
    packing: str = "documents in order, one end of text after each, cut into rows"
    format: str = _FORMAT
    format_version: int = _FORMAT_VERSION
    fingerprint: str = field(default="")

    def computed_fingerprint(self) -> str:
        """sha256 of the canonical index without file names: the same data has the same fingerprint anywhere."""
        content = asdict(self)
        del content["fingerprint"]
        for shard in content["shards"]:
            del shard["tar"], shard["idx"]
        return hashlib.sha256(canonical_json(content)).hexdigest()

    def write(self, folder: Path) -> None:
        """Write index.json with its fingerprint; it comes last and makes the source openable."""
        write_json(folder / INDEX_FILE, asdict(self) | {"fingerprint": self.computed_fingerprint()})

    @classmethod
    def read(cls, folder: Path) -> SourceIndex:
        """Raises DataError if index.json is missing, damaged, of another format or does not match itself."""
        path = folder / INDEX_FILE
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise DataError(f"{path} is not the index of a data set built by `dlm data build`")
        if content.get("format_version") != _FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {content.get('format_version')}, this version of dlm reads "
                f"{_FORMAT_VERSION}; build the data set again"
            )
        try:
            shards = [ShardRecord(**shard) for shard in content.pop("shards")]
            index = cls(shards=shards, **content)
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged: {error}") from error
        for name in (name for shard in shards for name in (shard.tar, shard.idx)):
            if not isinstance(name, str) or name == ".." or Path(name).name != name:
                raise DataError(f"{path} names the shard file {name!r}, which is not in {folder}: it was tampered with")
        if index.fingerprint != index.computed_fingerprint():
            raise DataError(
                f"{path} was changed after it was written: its contents do not give its fingerprint; restore it "
                "or build the data set again"
            )
        return index


def write_source(
    folder: Path,
    rows: NDArray[np.integer],
    tokenizer: Tokenizer,
    split: str = "train",
    rows_per_shard: int = 65536,
) -> SourceIndex:
    """Write packed rows [n, T] that are already in memory as a source; a document ends at each end of text."""
    per_id = tokenizer.token_bytes()
    if per_id is None:
        raise DataError(f"the tokenizer {tokenizer.name} has no fixed bytes per id; build from text instead")
    folder.mkdir(parents=True, exist_ok=True)
    stored = rows.astype(row_dtype(tokenizer.vocab_size))
    text_bytes = per_id[rows].sum(axis=1)
    shards = [
        write_shard(
            folder,
            f"{split}-{number:06d}",
            start,
            stored[start : start + rows_per_shard],
            text_bytes[start : start + rows_per_shard],
        )
        for number, start in enumerate(range(0, len(rows), rows_per_shard))
    ]
    tokenizer.save(folder / TOKENIZER_FOLDER)
    index = SourceIndex(
        split=split,
        sequence_length=rows.shape[1],
        dtype=stored.dtype.str,
        num_rows=len(rows),
        documents=int((rows == tokenizer.eos_id).sum()),
        text_bytes=int(text_bytes.sum()),
        repeated_tokens=0,
        tokenizer=tokenizer.describe() | {"fingerprint": tokenizer.fingerprint},
        shards=shards,
    )
    index.write(folder)
    return index


def source_folders(path: str | Path) -> list[Path]:
    """The sources in a data set: `path` itself, or its train/ and validation/. Raises DataError if none."""
    path = Path(path)
    if (path / INDEX_FILE).is_file():
        return [path]
    found = [path / split for split in SPLITS if (path / split / INDEX_FILE).is_file()]
    if found:
        return found
    if not path.is_dir():
        raise DataError(f"the data set {path} does not exist; build it with `dlm data build`")
    raise DataError(
        f"{path} holds no finished data set (no {INDEX_FILE} in it, nor in train/ or validation/); if a build "
        "was interrupted, start the same `dlm data build` again and it goes on"
    )


class ShardedSource(Source):
    """The rows of a folder that `dlm data build` wrote; every read row is checked."""

    def __init__(self, folder: Path, index: SourceIndex) -> None:
        self.path = folder
        self.index = index
        self.num_rows = index.num_rows
        self.sequence_length = index.sequence_length
        self.dtype = np.dtype(index.dtype)
        self.vocab_size = int(index.tokenizer["vocab_size"])
        self.eos_id = int(index.tokenizer["eos_id"])
        self.mask_id = int(index.tokenizer["mask_id"])
        self.tokenizer_description = index.tokenizer
        self.fingerprint = index.fingerprint
        ends = np.cumsum([shard.rows for shard in index.shards], dtype=np.int64)
        self._first_rows = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
        self._shards = OpenFiles(self._open_shard, _MAX_OPEN_SHARDS)

    @classmethod
    def open(cls, path: str | Path) -> ShardedSource:
        """Open a source, or a data set that holds only one. Checks the index and the sizes of all files.

        Raises DataError if `path` is no data set or holds several splits, CorruptShardError if a shard is
        missing or has another size than it was written with.
        """
        folders = source_folders(path)
        if len(folders) > 1:
            raise DataError(f"{path} holds {len(folders)} splits; name one of them: {' or '.join(map(str, folders))}")
        index = SourceIndex.read(folders[0])
        for shard in index.shards:
            _check_size(folders[0] / shard.tar, shard.tar_bytes)
            _check_size(folders[0] / shard.idx, idx_size(shard.rows))
        return cls(folders[0], index)

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> SourceRows:
        """Rows `indices` [n] -> tokens [n, T], document ids [n, T], text bytes [n], ids before the rows [n].

        Raises CorruptShardError naming shard, row and offset where bytes are not those that were written,
        DataError for a row that does not exist or holds the mask id. A row's checksum covers its own tokens only:
        damage to the token before it is found when the row of that token is read.
        """
        wanted = self._existing(indices)
        stored = np.empty((len(wanted), self.sequence_length), dtype=self.dtype)
        text_bytes = np.empty(len(wanted), dtype=np.int64)
        shard_numbers = np.searchsorted(self._first_rows, wanted, side="right") - 1
        local_rows = wanted - self._first_rows[shard_numbers]
        for i, (number, local_row) in enumerate(zip(shard_numbers.tolist(), local_rows.tolist(), strict=True)):
            text_bytes[i] = self._shards[number].read_into(stored[i], local_row)
        tokens = stored.astype(np.int64)
        if (tokens == self.mask_id).any():
            row = int(wanted[(tokens == self.mask_id).any(axis=1)][0])
            raise DataError(
                f"{self.path}: row {row} holds the id {self.mask_id}, which {self.tokenizer_description['name']} has "
                "for the mask and no text may have; build the data set again"
            )
        before = np.array([self._last_token(row - 1) for row in wanted.tolist()], dtype=np.int64)
        return SourceRows(tokens, document_ids(tokens, self.eos_id), text_bytes, before)

    def _last_token(self, row: int) -> int:
        """The last token of `row`; end of text for -1, so that the first row is read like any document's begin."""
        if row < 0:
            return self.eos_id
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        token = self._shards[number].last_token(row - int(self._first_rows[number]))
        if token >= self.vocab_size:
            raise CorruptShardError(
                f"{self.path}: row {row} ends with the id {token}, outside the vocabulary of {self.vocab_size}: it "
                "is damaged; restore the shard or build the data set again"
            )
        return token

    def _open_shard(self, number: int) -> ShardFile:
        first_row = int(self._first_rows[number])
        return ShardFile(self.path, self.index.shards[number], first_row, self.dtype, self.sequence_length)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the rows. Raises DataError if the saved one is another."""
        tokenizer = Tokenizer.load(self.path / TOKENIZER_FOLDER)
        if tokenizer.fingerprint != self.index.tokenizer["fingerprint"]:
            raise DataError(
                f"the tokenizer in {self.path / TOKENIZER_FOLDER} is not the one that made the rows; restore "
                "the folder or build the data set again"
            )
        return tokenizer

    def tokenizer_files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self.path / TOKENIZER_FOLDER).iterdir())}


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CorruptShardError(
            f"the shard file {path} cannot be found ({error.strerror}); restore it or build the data set again"
        ) from error
    if size != expected:
        raise CorruptShardError(
            f"{path} has {size} bytes where {expected} were written: it is truncated or was replaced; restore "
            "it or build the data set again"
        )


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` looked at and every problem it found, one sentence each."""

    sources: int
    shards: int
    rows: int
    problems: list[str]


def verify(path: str | Path) -> VerifyReport:
    """Read a data set from end to end: index, sizes, sha256, tar and npy headers, every row, the tokenizer."""
    problems: list[str] = []
    shards = rows = 0
    folders = source_folders(path)
    for folder in folders:
        try:
            index = SourceIndex.read(folder)
        except DataError as error:
            problems.append(str(error))
            continue
        source = ShardedSource(folder, index)
        try:
            source.load_tokenizer()
        except DataError as error:
            problems.append(str(error))
        for first_row, shard in zip(source._first_rows.tolist(), index.shards, strict=True):
            problems += verify_shard(folder, shard, first_row, source.dtype, source.sequence_length)
        if sum(shard.rows for shard in index.shards) != index.num_rows:
            problems.append(f"{folder / INDEX_FILE}: the rows of the shards do not sum to {index.num_rows}")
        shards += len(index.shards)
        rows += index.num_rows
    return VerifyReport(sources=len(folders), shards=shards, rows=rows, problems=problems)
