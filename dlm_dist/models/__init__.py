"""The backbones by name, and loading a model from wherever this project or transformers saved one.

Importing this package registers every backbone with transformers' `AutoConfig` and `AutoModel`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from dlm_dist.models.qwen3 import Qwen3DiffusionConfig, Qwen3ForDiffusion
from dlm_dist.models.rwkv7 import RWKV7Config, RWKV7ForDiffusion
from dlm_dist.models.weight_files import weight_files

BACKBONES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "qwen3": (Qwen3DiffusionConfig, Qwen3ForDiffusion),
    "rwkv7": (RWKV7Config, RWKV7ForDiffusion),
}

for _config_class, _model_class in BACKBONES.values():
    AutoConfig.register(_config_class.model_type, _config_class)
    AutoModel.register(_config_class, _model_class)

# Fields whose default would be a guess.
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "mask_token_id")
_REQUIRED_BESIDE = {"qwen3": ("num_attention_heads",)}


def build(backbone: str, *, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A new fp32 model on the CPU, initialised by `seed`; the global random state is neither read nor moved.

    `sizes` as in `configuration`, which says what is refused.
    """
    model: Any = skeleton(configuration(backbone, **sizes))
    model.initialize_(seed)
    return model


def configuration(backbone: str, **sizes: Any) -> PreTrainedConfig:
    """The configuration of a new model.

    `sizes` are fields of the backbone's configuration; vocab_size, hidden_size, num_hidden_layers and mask_token_id
    must be given, for qwen3 also num_attention_heads. Raises ValueError for an unknown backbone or field (naming the
    nearest one), a missing field, and values of the wrong type or that contradict each other.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"Unknown backbone {backbone!r}: there are {', '.join(sorted(BACKBONES))}.")
    config_class, _ = BACKBONES[backbone]
    known = [field.name for field in dataclasses.fields(config_class)]
    for name in sizes:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {nearest[0]!r}?" if nearest else "."
            raise ValueError(f"{backbone} has no configuration field {name!r}{hint}")
    required = _REQUIRED + _REQUIRED_BESIDE.get(backbone, ())
    missing = [name for name in required if sizes.get(name) is None]
    if missing:
        raise ValueError(f"{backbone} needs a value for {', '.join(missing)}.")
    return _configure(config_class, sizes)


def skeleton(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of `config` in `dtype` whose parameters hold nothing yet."""
    (model_class,) = (model for known, model in BACKBONES.values() if isinstance(config, known))
    # The values come later, so drawing transformers' own first would only cost time.
    with no_init_weights():
        model: Any = model_class(config)
    model.to(dtype)
    model.tie_weights()
    return model


def _configure(config_class: type[PreTrainedConfig], sizes: dict[str, Any]) -> PreTrainedConfig:
    try:
        return config_class(**sizes)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def load(path: str | Path, dtype: torch.dtype | None = None, revision: str | None = None) -> PreTrainedModel:
    """The model saved at `path`, on the CPU, in eval mode, in `dtype` (None: as stored).

    `path` is a checkpoint (`RUN/checkpoints/step-N`, whose `model/` is read), a `model/` folder, or any folder that
    `save_pretrained` wrote for one of our backbones; with `revision` (a commit, tag or branch) it is the id of such a
    model on the Hugging Face hub. Raises ValueError when there is no such model or it is incomplete.
    """
    folder = model_folder(Path(path) if revision is None else _download(str(path), revision))
    config_class, model_class = _classes(folder)
    weight_files(folder)
    config = config_class.from_pretrained(folder)
    loader: Any = model_class  # from_pretrained's annotation knows no loading info
    try:
        model, report = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            ignore_mismatched_sizes=True,  # so that a mismatch is reported here and named below
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The weights in {folder} cannot be read: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            names = sorted(str(key) for key in report[kind])
            raise ValueError(f"The weights in {folder} do not fit its config.json: {kind} {', '.join(names[:5])}.")
    return model.eval()


def read_config(path: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of the model that `load` would load. Raises ValueError when there is none."""
    folder = model_folder(Path(path) if revision is None else _download(str(path), revision))
    config: PreTrainedConfig = _classes(folder)[0].from_pretrained(folder)
    return config


def _classes(folder: Path) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The configuration and model class that config.json in `folder` names."""
    model_type = read_model_type(folder)
    by_type = {classes[0].model_type: classes for classes in BACKBONES.values()}
    if model_type not in by_type:
        what = f"{folder / 'config.json'} says model_type {model_type!r}, which is none of ours"
        layout = {"rwkv7": "fla", "qwen3": "qwen3"}.get(str(model_type))
        if layout is not None:
            raise ValueError(
                f"{what}: convert it with `dlm convert --from {layout} {folder} DIR` and name DIR instead."
            )
        raise ValueError(f"{what} ({', '.join(sorted(by_type))}): such a model cannot be loaded.")
    return by_type[model_type]


def read_model_type(folder: Path) -> str | None:
    """What config.json in `folder` says its model is, None where it says nothing. Raises ValueError if it is broken."""
    file = folder / "config.json"
    try:
        model_type: str | None = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{file} is no JSON object: {error}") from error
    return model_type


def _download(hub_id: str, revision: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"The model {hub_id!r} at revision {revision!r} cannot be fetched: {error}") from error


def model_folder(path: Path) -> Path:
    """The folder with config.json and weights that `path` is or has as its model/. Raises ValueError."""
    if path.suffix == ".pth" and path.is_file():
        raise ValueError(
            f"{path} is a file in BlinkDL's layout: convert it with `dlm convert --from blinkdl {path} DIR` and name "
            "DIR instead."
        )
    if not path.is_dir():
        raise ValueError(f"No model at {path}: there is no such folder (an id on the hub needs a revision).")
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            if not any(folder.glob("*.safetensors")):
                raise ValueError(
                    f"{folder} has a config.json but no .safetensors file: the model's weights are missing."
                )
            return folder
    raise ValueError(
        f"No model at {path}: neither it nor a folder model/ in it holds a config.json."
        " Name a checkpoint (RUN/checkpoints/step-N) or a folder written by save_pretrained."
    )
