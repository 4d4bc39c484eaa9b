"""Weights on their way between this project's folders and the layouts of others.

Between reading and writing stands `Weights`: every tensor as it was stored, under our names (BlinkDL's for RWKV-7,
transformers' for Qwen3), with the sizes that belong to it. `conversion_blinkdl`, `conversion_fla` and
`conversion_qwen3` know one foreign layout each.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from dlm_dist.models import BACKBONES, model_folder, read_config, skeleton
from dlm_dist.models.rwkv7 import RWKV7Config
from dlm_dist.models.rwkv7_init import InitSizes, initial_value
from dlm_dist.models.weight_files import weight_files

MAX_FILE_SIZE = "5GB"
TIED_HEAD, TIED_EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)
_UNUSED = tuple(f"blocks.0.att.{name}" for name in ("v0", "v1", "v2"))


@dataclass(frozen=True)
class Weights(Generic[ConfigT]):
    """The tensors of a model under our names, on the CPU, and its configuration.

    `notes` are sentences for the user about what was not in the source.
    """

    config: ConfigT
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()

    def cast(self, dtype: torch.dtype) -> Weights[ConfigT]:
        """The same weights in `dtype`."""
        return replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every tensor without loss."""
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        widest = dtypes.pop()
        for dtype in dtypes:
            widest = torch.promote_types(widest, dtype)
        return widest


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model of this configuration, in the order of its state dict."""
    with torch.device("meta"):
        model = skeleton(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_tensors(tensors: Mapping[str, object], expected: Mapping[str, tuple[int, ...]], origin: str | Path) -> None:
    """Raise ValueError naming the first tensor that is missing, misshapen, not of floating point, or unknown."""
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{origin}: the tensor {name} is missing; expected one of shape {list(shape)}.")
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{origin}: {name} is of type {type(tensor).__name__}, expected a tensor {list(shape)}.")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{origin}: the tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}.")
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise ValueError(f"{origin}: the tensor {name} holds {tensor.dtype}, expected bf16, fp16, fp32 or fp64.")
    for name, tensor in tensors.items():
        if name not in expected:
            what = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{origin}: the tensor {name} ({what}) is none of this model's.")


def fill_unused(config: RWKV7Config, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors, with initial values where layer 0's v0, v1, v2 are absent, and a note if they were.

    Layer 0 mixes no earlier value into its own: BlinkDL's files hold these three, and nothing uses them.
    """
    absent = [name for name in _UNUSED if name not in tensors]
    if not absent or "emb.weight" not in tensors:
        return dict(tensors), ()
    sizes = InitSizes(config.num_hidden_layers, config.hidden_size, config.head_size)
    shapes, dtype = expected_shapes(config), tensors["emb.weight"].dtype
    fresh = {name: initial_value(name, torch.Size(shapes[name]), sizes, 0).to(dtype) for name in absent}
    return {**tensors, **fresh}, (f"{', '.join(absent)} are absent and got initial values (layer 0 does not use them)",)


def read_folder(path: Path) -> Weights[Any]:
    """The weights of one of our checkpoints or model folders.

    Raises ValueError where there is none, or its weights do not fit its configuration.
    """
    folder = model_folder(path)
    config = read_config(folder)
    return Weights(config, fitting_tensors(config, read_safetensors(folder), folder))


def require_causal_rwkv7(config: PreTrainedConfig) -> None:
    """Raise ValueError for a model that other programs' RWKV-7 layouts cannot hold."""
    if not isinstance(config, RWKV7Config):
        raise ValueError(f"this is a model of type {config.model_type!r}, and the layout is one of RWKV-7.")
    if config.direction != "causal":
        raise ValueError(
            f"this model has direction {config.direction}: other programs know one scan from left to right, so only "
            "causal models can be exported."
        )


def fitting_tensors(config: PreTrainedConfig, tensors: Mapping[str, Tensor], origin: str | Path) -> dict[str, Tensor]:
    """The tensors in the order of the model's state dict. Raises ValueError where they do not fit `config`.

    A head that is tied to the embedding may be stored beside it or left out; stored, it has to be equal to it.
    """
    expected = expected_shapes(config)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if tied and TIED_HEAD not in tensors:
        del expected[TIED_HEAD]
    check_tensors(tensors, expected, origin)
    if tied and TIED_HEAD in tensors and not torch.equal(tensors[TIED_HEAD], tensors[TIED_EMBEDDING]):
        raise ValueError(
            f"{origin}: tie_word_embeddings is true, but {TIED_HEAD} differs from {TIED_EMBEDDING}: set it to false "
            "in config.json if they are two tensors, or remove the one that is not meant."
        )
    return {name: tensors[name] for name in expected}


def write_folder(
    weights: Weights[Any],
    destination: Path,
    mask_token_id: int,
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Write a folder that `models.load` opens; `add_files` gets its path, to put more beside the weights.

    Raises ValueError where `destination` exists or the model's vocabulary has no such mask id.
    """
    config_class, model_class = next(both for both in BACKBONES.values() if isinstance(weights.config, both[0]))
    sizes = weights.config.to_dict() | {"mask_token_id": mask_token_id, "dtype": weights.dtype}
    config = config_class.from_dict(sizes)
    config.architectures = [model_class.__name__]
    with staged(destination) as folder:
        config.save_pretrained(folder)
        write_safetensors(weights.tensors, folder)
        if add_files is not None:
            add_files(folder)


def read_their_config(folder: Path, owner: str, model_type: str, hint: str = "") -> dict[str, Any]:
    """The config.json of a folder of `owner`. Raises ValueError unless it says `model_type`; `hint` tells more."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no folder of {owner}: it has no config.json.")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    found = fields.get("model_type") if isinstance(fields, dict) else None
    if found != model_type:
        raise ValueError(f"{file}: model_type is {found!r}, expected {model_type!r}{hint}.")
    return dict(fields)


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of model.safetensors, or of the files of its index, mapped into memory. Raises ValueError."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= read_tensor_file(folder / file)
    return tensors


def read_tensor_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises ValueError where it is none or was cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def write_safetensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write model.safetensors, or several files of at most MAX_FILE_SIZE and their index."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_torch_state_dict(contiguous, folder, max_shard_size=MAX_FILE_SIZE, metadata={"format": "pt"})


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A path on the same file system to write to, which takes the name `destination` when the block ends well.

    Raises ValueError where `destination` exists; after any failure nothing is left behind.
    """
    refuse_existing(destination)
    anchor = next(parent for parent in destination.absolute().parents if parent.exists())
    stage = anchor / f".{destination.name}.{os.getpid()}.partial"
    try:
        yield stage
        # safetensors writes files that only their owner can read.
        for file in stage.glob("*.safetensors"):
            shutil.copymode(stage / "config.json", file)
        refuse_existing(destination)
        destination.parent.mkdir(parents=True, exist_ok=True)
        stage.rename(destination)
    finally:
        if stage.is_dir():
            shutil.rmtree(stage)
        else:
            stage.unlink(missing_ok=True)


def refuse_existing(destination: Path) -> None:
    """Raise ValueError where something has this name already."""
    if os.path.lexists(destination):
        raise ValueError(f"{destination} exists already and is left as it is: name another place, or remove it first.")
