"""The model that a run starts from, with the same values on every rank: whole, or already cut into ZeRO-3's parts.

At stage 3 only rank 0 ever holds a whole model. The others construct theirs partitioned (`deepspeed.zero.Init`) and
take their part of each parameter from rank 0's as it is broadcast; so every way to make a model (initial values,
weights from elsewhere, a checkpoint) means the same under every stage, and no initialisation runs on parameters that
are not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.source import Source
from dlm_dist import models
from dlm_dist.config import BatchPlan, ConfigError, RunConfig, updated
from dlm_dist.models.warm_start import fitting_sizes, initialize_from
from dlm_dist.training.checkpoint_files import require_whole
from dlm_dist.training.zero_state import Part


@dataclass(frozen=True)
class StartingModel:
    """A model, ready for the engine."""

    model: Any
    unrounded: Mapping[str, Part]
    """This rank's part of each parameter in fp32: all of it below stage 3."""
    init_from: dict[str, list[str]] | None
    """The report of models.warm_start where model.init_from was used; None on ranks that hold no whole model."""


def starting_model(
    config: RunConfig,
    plan: BatchPlan,
    mask_token_id: int,
    checkpoint: Path | None = None,
    group: dist.ProcessGroup | None = None,
) -> StartingModel:
    """The model of `config`: that of `checkpoint`, or a new one. Collective: every rank must call.

    `group` carries host tensors (gloo). Raises ConfigError where the model cannot be made.
    """
    cut = config.zero.stage == 3
    try:
        described = _described(config, mask_token_id, checkpoint)
        whole: Any = None
        report = None
        if not cut or dist.get_rank() == 0:
            whole, report = _whole(config, described, checkpoint)
    except ValueError as error:
        raise ConfigError([str(error)], "cannot make the model") from error
    if cut:
        model, unrounded = _partitioned(config, plan, described, whole, group)
    else:
        model = whole
        # Orthogonal initial values come from a QR whose last bits may differ between kinds of processors.
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0, group=group)
        unrounded = whole_parts(model)
    if config.model.wkv7_kernel is not None:
        model.set_kernel(config.model.wkv7_kernel)
    if config.model.attention_kernel is not None:
        model.set_attention_kernel(config.model.attention_kernel)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return StartingModel(model, unrounded, report)


def resolve_sizes(config: RunConfig, source: Source, checkpoint: Path | None = None) -> RunConfig:
    """Fill in what the data decides, and what model.init_from does, or in its place the `checkpoint` of this run.

    Raises ConfigError where the given weights cannot be what the configuration says.
    """
    values: dict[str, Any] = {"data.sequence_length": source.sequence_length}
    settings = config.model
    if settings.vocab_size is None:
        values["model.vocab_size"] = source.load_tokenizer().padded_vocab_size
    if settings.init_from is not None:
        origin, revision = (settings.init_from, settings.init_revision) if checkpoint is None else (checkpoint, None)
        try:
            decided = fitting_sizes(models.read_config(origin, revision), settings.model_dump())
        except ValueError as error:
            raise ConfigError([str(error)], "cannot make the model") from error
        values |= {f"model.{name}": value for name, value in decided.items()}
    return updated(config, values)


def mask_notes(config: RunConfig, source: Source) -> list[str]:
    """What the user should know where the weights of model.init_from have another mask id than the data."""
    settings = config.model
    if settings.init_from is None:
        return []
    theirs = models.read_config(settings.init_from, settings.init_revision).mask_token_id
    if theirs in (None, source.mask_id):
        return []
    return [
        f"model.init_from {settings.init_from} has mask id {theirs}, the data {source.mask_id}: what the weights "
        f"learned about {theirs} is not used, and the embedding of {source.mask_id} was not trained as a mask"
    ]


def whole_parts(model: Any) -> dict[str, Part]:
    """All of each parameter of a whole fp32 model.

    The engine's casting gives the parameters other storage, so these keep the fp32 values until the masters have them.
    """
    return {name: Part(0, parameter.data.view(-1)) for name, parameter in model.named_parameters()}


def _described(config: RunConfig, mask_token_id: int, checkpoint: Path | None) -> Any:
    """The sizes of the model as its class takes them."""
    if checkpoint is not None:
        return models.read_config(checkpoint)
    return models.configuration(config.model.backbone, mask_token_id=mask_token_id, **config.model.sizes())


def initial_model(config: RunConfig, mask_token_id: int) -> tuple[Any, dict[str, list[str]] | None]:
    """The fp32 model on the CPU that a run of this configuration starts from, and the report of model.init_from.

    `config` went through `resolve_sizes`. Raises ValueError where the model cannot be made.
    """
    return _whole(config, _described(config, mask_token_id, None), None)


def _whole(config: RunConfig, described: Any, checkpoint: Path | None) -> tuple[Any, dict[str, list[str]] | None]:
    """The model in fp32 on the CPU, and the report of model.init_from if that is used."""
    if checkpoint is not None:
        return models.load(checkpoint, dtype=torch.float32), None
    model: Any = models.skeleton(described)
    model.initialize_(config.run.seed)
    if config.model.init_from is None:
        return model, None
    if config.model.init_revision is None:
        require_whole(Path(config.model.init_from), ("model/",))
    return model, initialize_from(model, config.model.init_from, config.model.init_revision)


@torch.no_grad()
def _partitioned(
    config: RunConfig, plan: BatchPlan, described: Any, whole: Any, group: dist.ProcessGroup | None
) -> tuple[Any, dict[str, Part]]:
    """A model that never was whole on this rank, with the values of rank 0's `whole`, and its fp32 parts. Collective.

    The parts are ZeRO-3's own: equal shares of the flattened parameter, the last ones padded.
    """
    import deepspeed

    from dlm_dist.training.engine import deepspeed_config

    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    with deepspeed.zero.Init(
        config_dict_or_path=deepspeed_config(config, plan), dtype=dtype, mem_efficient_linear=False
    ):
        model: Any = models.skeleton(described, dtype)
    rank = dist.get_rank()
    given = {} if whole is None else dict(whole.named_parameters())
    unrounded = {}
    for name, parameter in model.named_parameters():
        value = given[name].data if rank == 0 else torch.empty(parameter.ds_shape, dtype=torch.float32)
        dist.broadcast(value, src=0, group=group)
        share = parameter.ds_tensor.numel()
        mine = value.view(-1)[rank * share : (rank + 1) * share].clone()
        parameter.ds_tensor.data[: len(mine)].copy_(mine)
        unrounded[name] = Part(rank * share, mine)
    _take_buffers(model, whole, group)
    return model, unrounded


def _take_buffers(model: Any, whole: Any, group: dist.ProcessGroup | None) -> None:
    """Rank 0's buffers: those made under `zero.Init` came out in the parameters' dtype. Collective."""
    buffers: list[Any] = [None if whole is None else dict(whole.named_buffers())]
    dist.broadcast_object_list(buffers, src=0, group=group)
    for name, own in list(model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        module.register_buffer(leaf, buffers[0][name].to(own.device), leaf not in module._non_persistent_buffers_set)
