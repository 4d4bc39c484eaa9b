"""The ids to which a model's configuration gives a meaning."""

from __future__ import annotations

from typing import Any

_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def reserved_ids(config: Any) -> dict[int, str]:
    """The ids of begin of text, end of text and padding that `config` names, and the field that does."""
    found: dict[int, str] = {}
    for field in _FIELDS:
        value = getattr(config, field, None)
        for token in value if isinstance(value, list) else [value]:
            if token is not None:
                found.setdefault(token, field)
    return found


def check_mask_token_id(config: Any) -> None:
    """Raise ValueError where `config.mask_token_id` is outside the vocabulary or stands for something else already."""
    mask = config.mask_token_id
    if mask is None:
        return
    if not 0 <= mask < config.vocab_size:
        raise ValueError(f"mask_token_id {mask} lies outside the vocabulary of {config.vocab_size}.")
    field = reserved_ids(config).get(mask)
    if field is not None:
        raise ValueError(f"mask_token_id {mask} is also the {field}: a mask needs an id of its own.")
