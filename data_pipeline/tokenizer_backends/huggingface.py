"""Any tokenizer.json, through HF `tokenizers`: slower than the other backends, but it reads them all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.files import atomic_write, canonical_json
from data_pipeline.tokenizer_backends.bpe import FAMILIES
from data_pipeline.tokenizer_backends.byte_alphabet import spelled_bytes
from data_pipeline.tokenizer_base import Ids, Tokenizer

_EOS_SPELLINGS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_BOS_SPELLINGS = ("<|begin_of_text|>", "<s>", "<bos>")
_MASK_SPELLINGS = ("<|mask|>", "<|mdm_mask|>", "[MASK]", "<mask>")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json given as text.

    End of text is the first of a few usual spellings that the vocabulary has. The mask is its mask token,
    or else the first id behind the vocabulary.
    """

    kind = "huggingface"

    def __init__(self, definition: str, name: str) -> None:
        import tokenizers

        self._definition: dict[str, Any] = json.loads(definition)
        self._text = definition
        self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        # Text that spells a special token is text: reserved ids never come out of documents.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.eos_text = next((text for text in _EOS_SPELLINGS if text in vocabulary), None)
        if self.eos_text is None:
            raise DataError(f"the vocabulary of {name} has no end-of-text token ({' or '.join(_EOS_SPELLINGS)})")
        self.mask_text = next((text for text in _MASK_SPELLINGS if text in vocabulary), None)
        self.bos_id = next((vocabulary[text] for text in _BOS_SPELLINGS if text in vocabulary), None)
        behind = max(vocabulary.values()) + 1
        self.name = name
        self.eos_id = vocabulary[self.eos_text]
        # A Qwen file may list only some of the special tokens that its checkpoints use.
        family = FAMILIES.get(self._tokenizer.get_vocab_size(with_added_tokens=False))
        first_free = behind if family is None else max(behind, family.mask_id)
        self.mask_id = first_free if self.mask_text is None else vocabulary[self.mask_text]
        self.vocab_size = max(behind, self.mask_id + 1, 0 if family is None else family.vocab_size)
        self.exact_bytes = _is_byte_level(self._definition)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Raises DataError where the file is not what HF `tokenizers` reads."""
        try:
            return cls(path.read_text(encoding="utf-8"), path.resolve().parent.name)
        except DataError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception for a bad definition.
            raise DataError(f"{path} is no tokenizer.json that HF tokenizers can read: {error}") from error

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_bytes(self, texts: Sequence[str]) -> list[tuple[Ids, NDArray[np.int64]]]:
        """Without fixed bytes per id, a token stands for the text from the end of the token before it to its
        own end, the last one also for the rest: the bytes sum to those of the text."""
        if self.exact_bytes:
            return super().encode_with_bytes(texts)
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(encoding.ids, dtype=np.int32), _bytes_by_offsets(text, encoding.offsets))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def token_bytes(self) -> NDArray[np.int64] | None:
        return super().token_bytes() if self.exact_bytes else None

    def _byte_table(self) -> list[bytes | None]:
        table: list[bytes | None] = [None] * self.vocab_size
        for entry, token in self._tokenizer.get_vocab(with_added_tokens=False).items():
            table[token] = spelled_bytes(entry) if self.exact_bytes else entry.encode("utf-8")
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            table[token] = None if added.special else added.content.encode("utf-8")
        table[self.mask_id] = None
        table[self.eos_id] = None
        return table

    def _decode_run(self, ids: list[int]) -> str:
        if self.exact_bytes:
            return super()._decode_run(ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def _vocabulary_digest(self) -> str:
        return hashlib.sha256(canonical_json(self._definition)).hexdigest()

    def _save_vocabulary(self, folder: Path) -> None:
        with atomic_write(folder / "tokenizer.json") as file:
            file.write(self._text.encode("utf-8"))

    @classmethod
    def _load_saved(cls, folder: Path, description: dict[str, Any]) -> Self:
        return cls((folder / "tokenizer.json").read_text(encoding="utf-8"), description["name"])


def _is_byte_level(definition: dict[str, Any]) -> bool:
    """Whether every id stands for fixed bytes of the text: byte-level spelling, no space put in front."""
    decoder = definition.get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        return False
    pre_tokenizer = definition.get("pre_tokenizer") or {}
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_levels = [part for part in parts if part.get("type") == "ByteLevel"]
    strips = any(t["lstrip"] or t["rstrip"] for t in definition.get("added_tokens", []) if not t["special"])
    return bool(byte_levels) and not strips and not any(part["add_prefix_space"] for part in byte_levels)


def _bytes_by_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    if not offsets:
        return np.zeros(0, dtype=np.int64)
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    position = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(widths, dtype=np.int64)])
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], dtype=np.int64))
    ends[-1] = len(text)
    return np.diff(position[ends], prepend=0)
