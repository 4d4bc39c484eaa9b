"""The sources that a configuration names, opened and checked against it and each other."""

from __future__ import annotations

from pathlib import Path

from data_pipeline import tokenizers
from data_pipeline.source import Source
from data_pipeline.sources import is_token_files, open_source
from dlm_dist.config import ConfigError, DataSection, RunConfig


def open_sources(config: RunConfig) -> list[Source]:
    """The training data sets; ConfigError if they do not belong together or do not fit the configuration."""
    sources = _open_each(config.data)
    first = sources[0]
    mistakes = []
    for entry, source in zip(config.data.train, sources, strict=True):
        for name in ("sequence_length", "vocab_size", "mask_id", "eos_id"):
            if getattr(source, name) != getattr(first, name):
                mistakes.append(
                    f"data.train: {entry.path} has {name} {getattr(source, name)}, {config.data.train[0].path} has "
                    f"{getattr(first, name)}: build them with the same tokenizer and sequence length"
                )
        theirs, ours = source.tokenizer_description, first.tokenizer_description
        if not mistakes and theirs["fingerprint"] != ours["fingerprint"]:
            mistakes.append(
                f"data.train: {entry.path} was made with another tokenizer ({theirs['name']}) than "
                f"{config.data.train[0].path} ({ours['name']}): use the same one for all"
            )
    wanted = config.data.sequence_length
    if wanted is not None and wanted != first.sequence_length:
        mistakes.append(
            f"data.sequence_length is {wanted}, but {config.data.train[0].path} holds rows of "
            f"{first.sequence_length} tokens: leave the key out or build the data with --sequence-length {wanted}"
        )
    vocabulary = config.model.vocab_size
    if vocabulary is not None and vocabulary < max(first.vocab_size, first.mask_id + 1):
        mistakes.append(
            f"model.vocab_size is {vocabulary}, but the data needs ids up to "
            f"{max(first.vocab_size, first.mask_id + 1) - 1} (mask id {first.mask_id}): leave the key out"
        )
    if first.mask_id == first.eos_id:
        mistakes.append(
            f"data.train: the tokenizer of {config.data.train[0].path} has the id {first.mask_id} for the mask and for "
            "the end of text: a mask needs an id of its own"
        )
    if mistakes:
        raise ConfigError(mistakes)
    return sources


def source_names(data: DataSection) -> list[str]:
    """What the training sources are called in a run's figures: their paths, numbered where one occurs again."""
    names: list[str] = []
    for entry in data.train:
        times = sum(str(other.path) == str(entry.path) for other in data.train[: len(names)])
        names.append(str(entry.path) if not times else f"{entry.path} ({times + 1})")
    return names


def open_validation(path: Path, train: Source) -> Source:
    """The held-out rows at `path`; token files are read like the training data, with its tokenizer.

    Raises ConfigError where a data set has another tokenizer.
    """
    if is_token_files(path):
        return open_source(path, train.sequence_length, train.load_tokenizer())
    validation = open_source(path)
    theirs, ours = validation.tokenizer_description, train.tokenizer_description
    if theirs["fingerprint"] != ours["fingerprint"]:
        raise ConfigError(
            [
                f"data.validation {path} was built with the tokenizer {theirs['name']}, the "
                f"training data with {ours['name']}: build both with the same one"
            ]
        )
    return validation


def _open_each(data: DataSection) -> list[Source]:
    """The training sources; data.tokenizer and data.sequence_length are for those that are token files."""
    token_files = [entry.path for entry in data.train if is_token_files(entry.path)]
    mistakes = []
    if token_files and data.tokenizer is None:
        mistakes.append(
            f"data.tokenizer is missing: {token_files[0]} holds only tokens, so name the tokenizer that made them"
        )
    if token_files and data.sequence_length is None:
        mistakes.append(f"data.sequence_length is missing: {token_files[0]} holds tokens that are not cut into rows")
    if data.tokenizer is not None and not token_files:
        mistakes.append(
            f"data.tokenizer is {data.tokenizer}, but {data.train[0].path} is no token file and has a tokenizer of its "
            "own: leave the key out"
        )
    if mistakes:
        raise ConfigError(mistakes)
    tokenizer = tokenizers.load(data.tokenizer) if data.tokenizer is not None else None
    return [
        open_source(entry.path, data.sequence_length, tokenizer)
        if entry.path in token_files
        else open_source(entry.path)
        for entry in data.train
    ]
