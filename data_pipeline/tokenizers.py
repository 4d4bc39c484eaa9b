"""Finding a tokenizer by name, by the files of others, or by a folder that one of ours was saved in."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.tokenizer_base import DESCRIPTION_FILE, EOS_MARK, MASK_MARK, Tokenizer

__all__ = ["EOS_MARK", "KINDS", "MASK_MARK", "NAMES", "Tokenizer", "backend", "load"]

# kind -> module and class; a new backend is one file in tokenizer_backends and one line here.
KINDS = {
    "world": "data_pipeline.tokenizer_backends.world:WorldTokenizer",
    "bpe": "data_pipeline.tokenizer_backends.bpe:BytePairTokenizer",
    "huggingface": "data_pipeline.tokenizer_backends.huggingface:HuggingFaceTokenizer",
    "characters": "data_pipeline.tokenizer_backends.characters:CharacterTokenizer",
    "bytes": "data_pipeline.tokenizer_backends.bytes:ByteTokenizer",
}
NAMES = ("rwkv-world", "characters", "bytes")


def backend(kind: str) -> type[Tokenizer]:
    """The class of a kind, imported only now: each brings its own library. Raises DataError if unknown."""
    if kind not in KINDS:
        raise DataError(f"'{kind}' is no kind of tokenizer; known kinds: {', '.join(KINDS)}")
    module, name = KINDS[kind].split(":")
    found: type[Tokenizer] = getattr(import_module(module), name)
    return found


def load(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer called `rwkv-world` or `bytes`, or the one in a folder or file.

    Folders: one written by `Tokenizer.save`, one with a tokenizer.json, or one with vocab.json and merges.txt
    (Qwen or GPT-2; also gpt2_vocab.json and gpt2_merges.txt). Files: a tokenizer.json or an RWKV vocabulary.
    """
    from data_pipeline.tokenizer_backends.bpe import BytePairTokenizer, find_files
    from data_pipeline.tokenizer_backends.bytes import ByteTokenizer
    from data_pipeline.tokenizer_backends.huggingface import HuggingFaceTokenizer
    from data_pipeline.tokenizer_backends.world import WorldTokenizer

    if name_or_path == "rwkv-world":
        return WorldTokenizer.packaged()
    if name_or_path == "bytes":
        return ByteTokenizer()
    if name_or_path == "characters":
        raise DataError(
            "the vocabulary of the tokenizer 'characters' is learned from text: build a data set with it and "
            "give the path of that data set's tokenizer folder"
        )
    path = Path(name_or_path)
    if path.is_dir():
        if (path / DESCRIPTION_FILE).is_file():
            return Tokenizer.load(path)
        if (path / "tokenizer.json").is_file():
            return HuggingFaceTokenizer.from_file(path / "tokenizer.json")
        if find_files(path) is not None:
            return BytePairTokenizer.from_folder(path)
        raise DataError(
            f"{path} holds no tokenizer: expected {DESCRIPTION_FILE}, tokenizer.json, or vocab.json with merges.txt"
        )
    if path.is_file() and path.suffix == ".json":
        return HuggingFaceTokenizer.from_file(path)
    if path.is_file() and path.suffix == ".txt":
        return WorldTokenizer.from_file(path)
    raise DataError(f"'{name_or_path}' is neither a tokenizer ({', '.join(NAMES)}) nor a folder or file that exists")
