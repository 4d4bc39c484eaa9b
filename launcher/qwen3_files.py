"""What lies beside the weights in a Qwen3 folder: its tokenizer in our form, a free id for the mask, and the rest.

The published files stay beside ours in tokenizer/, so that the way back finds them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline import tokenizers
from data_pipeline.errors import DataError
from data_pipeline.reserved_ids import ids_in_use
from data_pipeline.tokenizer_backends.bpe import FAMILIES
from data_pipeline.tokenizer_base import DESCRIPTION_FILE, Tokenizer
from dlm_dist.models.token_ids import reserved_ids

TOKENIZER_FOLDER = "tokenizer"
_QWEN = next(family for family in FAMILIES.values() if family.name == "qwen")
_VOCABULARIES = ("tokenizer.json", "vocab.json")
_KEPT = (
    *_VOCABULARIES,
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
_GENERATION = "generation_config.json"


def load_tokenizer(folder: Path) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer in a Hugging Face folder, and a note where there is none or it cannot be read."""
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        return None, f"{folder} has no tokenizer files ({' or '.join(_VOCABULARIES)}), so none is saved"
    try:
        return tokenizers.load(folder), None
    except DataError as error:
        return None, f"no tokenizer is saved: {error}"


def choose_mask_id(folder: Path, config: Any, tokenizer: Tokenizer | None, wanted: int | None) -> int:
    """The id for the mask, and from now on that of `tokenizer`: `wanted`, or one that is free.

    That is the tokenizer's own mask token, or else the first id at or behind the one that our tokenizer takes (behind
    all tokens; 151669 for Qwen's vocabulary) that no file in `folder` uses. Raises ValueError where `wanted` is used or
    outside the vocabulary, where no id is free, or where nothing says which are.
    """
    used = ids_in_use(folder)
    used |= {token: f"{field} of config.json" for token, field in reserved_ids(config).items() if token not in used}
    if tokenizer is not None and tokenizer.mask_text is not None:
        used.pop(tokenizer.mask_id, None)
    free = (token for token in range(_first_candidate(folder, config, tokenizer, used, wanted), config.vocab_size))
    mask_id = next((token for token in free if token not in used), None) if wanted is None else wanted
    if mask_id is None:
        raise ValueError(
            f"{folder} leaves no id free behind its last token in a vocabulary of {config.vocab_size}: name a free one "
            "with --mask-token-id."
        )
    if not 0 <= mask_id < config.vocab_size:
        raise ValueError(f"--mask-token-id {mask_id} lies outside the vocabulary of {config.vocab_size} ids.")
    if mask_id in used:
        raise ValueError(f"--mask-token-id {mask_id} is taken by {used[mask_id]}: choose an id that is free.")
    if tokenizer is not None:
        tokenizer.use_mask_id(mask_id)
    return mask_id


def _first_candidate(
    folder: Path, config: Any, tokenizer: Tokenizer | None, used: dict[int, str], wanted: int | None
) -> int:
    if tokenizer is not None:
        return tokenizer.mask_id
    if any((folder / name).is_file() for name in _VOCABULARIES):
        return max(used, default=-1) + 1
    if config.vocab_size == _QWEN.vocab_size:
        return _QWEN.mask_id
    if wanted is None:
        raise ValueError(
            f"{folder} has no tokenizer files, and its vocabulary of {config.vocab_size} ids is not Qwen's: say with "
            "--mask-token-id which of them is to stand for a hidden token."
        )
    return wanted


def saver(source: Path, tokenizer: Tokenizer | None) -> Callable[[Path], None]:
    """A function that puts the tokenizer and what belongs to it into a new folder of ours."""

    def save(folder: Path) -> None:
        _copy(source, folder, (_GENERATION,))
        if tokenizer is not None:
            (folder / TOKENIZER_FOLDER).mkdir()
            _copy(source, folder / TOKENIZER_FOLDER, _KEPT)
            tokenizer.save(folder / TOKENIZER_FOLDER)

    return save


def restorer(source: Path) -> Callable[[Path], None]:
    """A function that puts the tokenizer files of our folder or checkpoint `source` into a new folder of theirs."""

    def restore(folder: Path) -> None:
        for place in (source, source / "model"):
            _copy(place, folder, (_GENERATION,))
        for place in (source, source.parent) if source.name == "model" else (source,):
            if (place / TOKENIZER_FOLDER / DESCRIPTION_FILE).is_file():
                _copy(place / TOKENIZER_FOLDER, folder, _KEPT)
                return

    return restore


def _copy(source: Path, destination: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
