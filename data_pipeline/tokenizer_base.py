"""What a tokenizer is here: text to ids and back, three reserved ids, exact bytes per id, a fingerprint.

Reserved ids (end of text, mask) never come out of `encode`: all text is ordinary text, also text that spells
a special token. A tokenizer saves itself into a folder and travels with data sets and checkpoints.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.files import canonical_json, read_json, write_json

Ids = NDArray[np.int32]

DESCRIPTION_FILE = "dlm_tokenizer.json"
EOS_MARK = "<|endoftext|>"
MASK_MARK = "\u2591"
UNUSED_MARK = "\ufffd"
_PAD_MULTIPLE = 64


class Tokenizer(ABC):
    """Base of all tokenizers.

    kind: the backend, a key of `tokenizers.KINDS`. name: what a person calls the vocabulary.
    vocab_size: one more than the largest id that may be produced or is reserved.
    eos_text, mask_text: how the vocabulary spells its end-of-text and its mask token, None where it does not.
    bos_id: a token that stands in front of each text, None where the vocabulary has none. Nothing here writes one:
        rows are read behind an end of text.
    exact_bytes: whether every id stands for a fixed number of bytes of text.
    """

    kind: ClassVar[str]
    name: str
    vocab_size: int
    eos_id: int
    mask_id: int
    eos_text: str | None = None
    mask_text: str | None = None
    bos_id: int | None = None
    exact_bytes: bool = True

    def use_mask_id(self, mask_id: int) -> None:
        """Take another id for the mask. Raises DataError where it stands for text or for the end of it."""
        if mask_id == self.mask_id:
            return
        inside = 0 <= mask_id < self.vocab_size
        if mask_id < 0 or mask_id == self.eos_id or (inside and self._bytes_by_id[mask_id] is not None):
            raise DataError(f"the id {mask_id} cannot be the mask of {self.name}: it is negative or stands for text")
        self.mask_id = mask_id
        self.vocab_size = max(self.vocab_size, mask_id + 1)
        for kept in ("_bytes_by_id", "_token_bytes", "fingerprint"):
            self.__dict__.pop(kept, None)

    @property
    def pad_id(self) -> int:
        """Rows are full, so nothing is padded in training; batches of prompts are padded with end of text."""
        return self.eos_id

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary size for a model: the next multiple of 64, which matrix units like."""
        return -(-self.vocab_size // _PAD_MULTIPLE) * _PAD_MULTIPLE

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Each text to its ids, int32 [n]. Raises DataError for text that the vocabulary cannot spell."""

    def encode(self, text: str) -> Ids:
        """Text to ids, int32 [n]."""
        return self.encode_batch([text])[0]

    def encode_with_bytes(self, texts: Sequence[str]) -> list[tuple[Ids, NDArray[np.int64]]]:
        """Each text to its ids [n] and the UTF-8 bytes of text that each id stands for [n]."""
        per_id = self.token_bytes()
        assert per_id is not None, "a tokenizer without exact bytes per id overrides this"
        return [(ids, per_id[ids]) for ids in self.encode_batch(texts)]

    @abstractmethod
    def _byte_table(self) -> list[bytes | None]:
        """The bytes of each id, None for reserved and unused ids; those that follow are unused."""

    @cached_property
    def _bytes_by_id(self) -> list[bytes | None]:
        table = self._byte_table()
        assert len(table) <= self.vocab_size, (len(table), self.vocab_size)
        return table + [None] * (self.vocab_size - len(table))

    @cached_property
    def _token_bytes(self) -> NDArray[np.int64]:
        return np.array([len(entry or b"") for entry in self._bytes_by_id], dtype=np.int64)

    def token_bytes(self) -> NDArray[np.int64] | None:
        """UTF-8 bytes of text per id, int64 [vocab_size], 0 for reserved ids; None where an id has no fixed
        number of bytes. The bytes are those of the text as the tokenizer sees it (after normalisation)."""
        return self._token_bytes

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Ids [n] to text; end of text, mask and unused ids show as marks, broken UTF-8 as U+FFFD."""
        text: list[str] = []
        run: list[int] = []
        for token in np.asarray(ids, dtype=np.int64).tolist():
            mark = self._mark(token)
            if mark is None:
                run.append(token)
            else:
                text += [self._decode_run(run), mark]
                run = []
        text.append(self._decode_run(run))
        return "".join(text)

    def _mark(self, token: int) -> str | None:
        if token == self.eos_id:
            return EOS_MARK
        if token == self.mask_id:
            return MASK_MARK
        if not 0 <= token < self.vocab_size or self._bytes_by_id[token] is None:
            return UNUSED_MARK
        return None

    def _decode_run(self, ids: list[int]) -> str:
        table = self._bytes_by_id
        return b"".join(table[token] or b"" for token in ids).decode("utf-8", errors="replace")

    @abstractmethod
    def _vocabulary_digest(self) -> str:
        """A hash of the vocabulary's meaning: not of line ends, file names or places."""

    def describe(self) -> dict[str, Any]:
        """What identifies the tokenizer, without the vocabulary itself."""
        return {
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "mask_id": self.mask_id,
            "pad_id": self.pad_id,
            "vocabulary_sha256": self._vocabulary_digest(),
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides which ids a text gets and what ids mean; not over the name."""
        meaning = {key: value for key, value in self.describe().items() if key != "name"}
        return hashlib.sha256(canonical_json(meaning)).hexdigest()

    @abstractmethod
    def _save_vocabulary(self, folder: Path) -> None:
        """Write the files that `_load_saved` reads."""

    @classmethod
    @abstractmethod
    def _load_saved(cls, folder: Path, description: dict[str, Any]) -> Self:
        """The tokenizer that `save` wrote into `folder`."""

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into `folder`, the description last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_vocabulary(folder)
        write_json(folder / DESCRIPTION_FILE, self.describe() | {"fingerprint": self.fingerprint})

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """The tokenizer saved in `folder`. Raises DataError where its files are not what was saved."""
        from data_pipeline.tokenizers import backend

        folder = Path(folder)
        description = read_json(folder / DESCRIPTION_FILE)
        tokenizer = backend(description["kind"])._load_saved(folder, description)
        tokenizer.use_mask_id(description["mask_id"])
        if tokenizer.fingerprint != description["fingerprint"]:
            raise DataError(
                f"the tokenizer in {folder} is not the one that was saved there: its files give the "
                f"fingerprint {tokenizer.fingerprint[:16]}, {DESCRIPTION_FILE} says "
                f"{description['fingerprint'][:16]}; restore the folder from a copy"
            )
        return tokenizer
