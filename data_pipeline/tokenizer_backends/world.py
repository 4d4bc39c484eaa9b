"""RWKV World: a greedy byte trie of 65,529 entries, encoded by pyrwkv-tokenizer.

Ids 1..65529 are entries, id 0 is end of text and has no spelling, 65530..65535 are free in every published
model (their embedding has 65,536 rows); the mask takes the last of them.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.files import atomic_write
from data_pipeline.tokenizer_base import Ids, Tokenizer

_VOCABULARY_FILE = "rwkv_vocab_v20230424.txt"
_VOCAB_SIZE = 65536
_EOS_ID = 0
_MASK_ID = 65535


class WorldTokenizer(Tokenizer):
    """The RWKV World tokenizer over the vocabulary file at `path`, whose lines are `id literal length`."""

    kind = "world"

    def __init__(self, path: Path) -> None:
        from pyrwkv_tokenizer import RWKVTokenizer

        self.name = "rwkv-world"
        self.vocab_size = _VOCAB_SIZE
        self.eos_id = _EOS_ID
        self.mask_id = _MASK_ID
        # Line ends differ between the copies in circulation and mean nothing.
        self._vocabulary = path.read_bytes().replace(b"\r\n", b"\n")
        self._encoder = RWKVTokenizer(vocab_filepath=str(path))

    @classmethod
    def packaged(cls) -> Self:
        """With the vocabulary that the package pyrwkv-tokenizer brings."""
        import pyrwkv_tokenizer

        return cls(Path(pyrwkv_tokenizer.__file__).parent / _VOCABULARY_FILE)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """With an RWKV vocabulary file. Raises DataError if its first line is not one of such a file."""
        with open(path, "rb") as file:
            first = file.readline().split()
        if len(first) != 3 or first[0] != b"1" or not first[2].isdigit():
            raise DataError(f"{path} is no RWKV vocabulary: its lines should read `id literal length`")
        return cls(path)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array(self._encoder.encode(text), dtype=np.int32) for text in texts]

    def _byte_table(self) -> list[bytes | None]:
        table: list[bytes | None] = [None] * self.vocab_size
        for line in self._vocabulary.decode("utf-8").split("\n"):
            if not line:
                continue
            token, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            value = ast.literal_eval(literal)
            entry = value.encode("utf-8") if isinstance(value, str) else value
            if len(entry) != int(length):
                raise DataError(f"the RWKV vocabulary is damaged at id {token}: {literal} has not {length} bytes")
            table[int(token)] = entry
        return table

    def _vocabulary_digest(self) -> str:
        return hashlib.sha256(self._vocabulary.rstrip(b"\n")).hexdigest()

    def _save_vocabulary(self, folder: Path) -> None:
        with atomic_write(folder / _VOCABULARY_FILE) as file:
            file.write(self._vocabulary)

    @classmethod
    def _load_saved(cls, folder: Path, description: dict[str, Any]) -> Self:
        return cls(folder / _VOCABULARY_FILE)
