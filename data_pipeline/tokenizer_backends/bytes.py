"""Bytes: the 256 byte values, then end of text (256) and the mask (257)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from data_pipeline.tokenizer_base import Ids, Tokenizer


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8."""

    kind = "bytes"

    def __init__(self) -> None:
        self.name = "bytes"
        self.vocab_size = 258
        self.eos_id = 256
        self.mask_id = 257

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) for text in texts]

    def _byte_table(self) -> list[bytes | None]:
        return [*(bytes([value]) for value in range(256)), None, None]

    def _vocabulary_digest(self) -> str:
        return "bytes"

    def _save_vocabulary(self, folder: Path) -> None:
        pass  # The description says it all.

    @classmethod
    def _load_saved(cls, folder: Path, description: dict[str, Any]) -> Self:
        return cls()
