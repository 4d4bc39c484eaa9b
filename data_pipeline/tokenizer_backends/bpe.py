"""Byte-level BPE of Qwen and GPT-2 from vocab.json and merges.txt, encoded by tiktoken.

tiktoken gives the ids of HF `tokenizers` about ten times as fast. It takes an entry's id for its merge
priority, so the ids have to be in merge order: those of GPT-2 and Qwen are, and loading checks it.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.files import atomic_write
from data_pipeline.tokenizer_backends.byte_alphabet import spelled_bytes
from data_pipeline.tokenizer_base import Ids, Tokenizer


@dataclass(frozen=True)
class Family:
    """What the two files do not say: how text is cut into words, and the reserved ids."""

    name: str
    pattern: str
    normalise_nfc: bool
    eos_id: int
    mask_id: int
    vocab_size: int


_EOS_TEXT = "<|endoftext|>"

# By the number of entries below the special tokens. Qwen3's special tokens are 151643..151668; the mask is
# the first id behind them, and its published models have 151,936 embedding rows.
FAMILIES = {
    50256: Family(
        name="gpt2",
        pattern=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        normalise_nfc=False,
        eos_id=50256,
        mask_id=50257,
        vocab_size=50258,
    ),
    151643: Family(
        name="qwen",
        pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        normalise_nfc=True,
        eos_id=151643,
        mask_id=151669,
        vocab_size=151936,
    ),
}


def find_files(folder: Path) -> tuple[Path, Path] | None:
    """The vocabulary and the merges in `folder`, under either of their usual names."""
    for prefix in ("", "gpt2_"):
        vocabulary, merges = folder / f"{prefix}vocab.json", folder / f"{prefix}merges.txt"
        if vocabulary.is_file() and merges.is_file():
            return vocabulary, merges
    return None


class BytePairTokenizer(Tokenizer):
    """Byte-level BPE. vocabulary: entry -> id, without special tokens. merges: pairs in order of priority."""

    kind = "bpe"
    eos_text = _EOS_TEXT

    def __init__(self, vocabulary: dict[str, int], merges: list[str], where: Path) -> None:
        import tiktoken

        if len(vocabulary) not in FAMILIES:
            raise DataError(
                f"{where} holds {len(vocabulary)} entries and is neither GPT-2 (50256) nor Qwen (151643); "
                "how other vocabularies cut text is only written in a tokenizer.json, so give that instead"
            )
        family = FAMILIES[len(vocabulary)]
        _check_merge_order(vocabulary, merges, where)
        self.name = family.name
        self.vocab_size = family.vocab_size
        self.eos_id = family.eos_id
        self.mask_id = family.mask_id
        self._normalise_nfc = family.normalise_nfc
        self._vocabulary = vocabulary
        self._merges = merges
        self._ranks = _ranks(vocabulary, where)
        self._encoder = tiktoken.Encoding(
            family.name, pat_str=family.pattern, mergeable_ranks=self._ranks, special_tokens={}
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Raises DataError where a file is damaged or the vocabulary is of an unknown family."""
        files = find_files(folder)
        assert files is not None
        try:
            vocabulary = json.loads(files[0].read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{files[0]} is no valid JSON: {error}") from error
        vocabulary.pop(_EOS_TEXT, None)
        lines = files[1].read_text(encoding="utf-8").replace("\r\n", "\n").split("\n")
        first = 1 if lines[0].startswith("#version") else 0
        return cls(vocabulary, [line for line in lines[first:] if line], folder)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        if self._normalise_nfc:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        return [np.array(self._encoder.encode_ordinary(text), dtype=np.int32) for text in texts]

    def _byte_table(self) -> list[bytes | None]:
        table: list[bytes | None] = [None] * self.vocab_size
        for entry, token in self._ranks.items():
            table[token] = entry
        return table

    def _vocabulary_digest(self) -> str:
        entries = sorted(self._vocabulary, key=self._vocabulary.__getitem__)
        return hashlib.sha256("\n".join([*entries, "", *self._merges]).encode("utf-8")).hexdigest()

    def _save_vocabulary(self, folder: Path) -> None:
        with atomic_write(folder / "vocab.json") as file:
            file.write(json.dumps(self._vocabulary, ensure_ascii=False).encode("utf-8"))
        with atomic_write(folder / "merges.txt") as file:
            file.write("\n".join(["#version: 0.2", *self._merges, ""]).encode("utf-8"))

    @classmethod
    def _load_saved(cls, folder: Path, description: dict[str, Any]) -> Self:
        return cls.from_folder(folder)


def _check_merge_order(vocabulary: dict[str, int], merges: list[str], where: Path) -> None:
    for rank, merge in enumerate(merges):
        if vocabulary.get(merge.replace(" ", "")) != 256 + rank:
            raise DataError(
                f"the ids in {where} do not follow its merges (merge {rank + 1}, '{merge}', should make the "
                f"id {256 + rank}); give the vocabulary as a tokenizer.json instead"
            )


def _ranks(vocabulary: dict[str, int], where: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for entry, token in vocabulary.items():
        spelled = spelled_bytes(entry)
        if spelled is None:
            raise DataError(f"the entry {entry!r} (id {token}) of {where} is not byte-level")
        ranks[spelled] = token
    return ranks
