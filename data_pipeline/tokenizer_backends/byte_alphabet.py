"""The printable alphabet in which byte-level BPE vocabularies spell bytes (GPT-2's `bytes_to_unicode`)."""

from __future__ import annotations


def _alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in set(printable)]
    spelled = {chr(value): value for value in printable}
    spelled.update({chr(256 + i): value for i, value in enumerate(others)})
    return spelled


BYTE_OF_CHARACTER = _alphabet()
_NO_BYTE = 0xFFFF
_TRANSLATION = {
    **{value: _NO_BYTE for value in range(256) if chr(value) not in BYTE_OF_CHARACTER},
    **{ord(character): value for character, value in BYTE_OF_CHARACTER.items()},
}


def spelled_bytes(token: str) -> bytes | None:
    """The bytes that a vocabulary entry spells; None if a character is outside the alphabet."""
    try:
        return token.translate(_TRANSLATION).encode("latin-1")
    except UnicodeEncodeError:
        return None
