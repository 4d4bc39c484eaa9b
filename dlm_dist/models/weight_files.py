"""Which files hold the weights of a folder that `save_pretrained` wrote; an index names only files beside it."""

from __future__ import annotations

import json
from pathlib import Path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files of a model: those of its index, else model.safetensors.

    Raises ValueError where there is neither, and for an index that is broken or names a file elsewhere.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise ValueError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: the model's weights are missing.")
        return [SINGLE_FILE]
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors files: {error}") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{index} names {file!r}, expected a .safetensors file beside it.")
    return files
