"""Characters: the code points of a text in ascending order, then end of text and the mask."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.files import canonical_json, read_json, write_json
from data_pipeline.tokenizer_base import Ids, Tokenizer

_VOCABULARY_FILE = "characters.json"


class CharacterTokenizer(Tokenizer):
    """One token per code point. `code_points` [n] are sorted and distinct; the ids follow their order."""

    kind = "characters"

    def __init__(self, code_points: Sequence[int]) -> None:
        assert list(code_points) == sorted(set(code_points))
        self.name = "characters"
        self.eos_id = len(code_points)
        self.mask_id = len(code_points) + 1
        self.vocab_size = len(code_points) + 2
        self._code_points = np.array(code_points, dtype=np.uint32)

    @classmethod
    def learn(cls, texts: Iterable[str]) -> Self:
        """The vocabulary of all characters that occur in `texts`, whatever their order."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return cls(sorted(map(ord, characters)))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Ids:
        wanted = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = np.searchsorted(self._code_points, wanted)
        known = ids < len(self._code_points)
        known[known] = self._code_points[ids[known]] == wanted[known]
        if not known.all():
            character = chr(int(wanted[~known][0]))
            raise DataError(
                f"the character {character!r} (U+{ord(character):04X}) is not in the vocabulary, which holds "
                f"the {len(self._code_points)} characters of the text it was learned from"
            )
        return ids.astype(np.int32)

    def _byte_table(self) -> list[bytes | None]:
        return [*(chr(code_point).encode("utf-8") for code_point in self._code_points), None, None]

    def _vocabulary_digest(self) -> str:
        return hashlib.sha256(canonical_json(self._code_points.tolist())).hexdigest()

    def _save_vocabulary(self, folder: Path) -> None:
        write_json(folder / _VOCABULARY_FILE, self._code_points.tolist())

    @classmethod
    def _load_saved(cls, folder: Path, description: dict[str, Any]) -> Self:
        return cls(read_json(folder / _VOCABULARY_FILE))
