"""A corrupted batch as the keyword arguments of a model's training forward."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from dlm_dist.diffusion.base import NoisyBatch


def host_inputs(batch: NoisyBatch, pin: bool) -> dict[str, torch.Tensor]:
    """The keyword arguments of a model's training forward, on the host; `pin` for a copy to CUDA that does not wait.

    Only the scored rows are named, so that the head runs on them alone and nothing has to ask the device how
    many there are.
    """
    supervised = np.flatnonzero(batch.weights)
    arrays: dict[str, NDArray] = {
        "input_ids": batch.inputs,
        "supervised": supervised,
        "targets": batch.targets.reshape(-1)[supervised],
        "weights": batch.weights.reshape(-1)[supervised],
    }
    optional: dict[str, NDArray | None] = {
        "document_ids": batch.document_ids,
        "clean_ids": batch.clean,
        "block_ids": batch.block_ids,
        "mask_noise_keys": batch.mask_noise_keys,
        "mask_noise_scales": batch.mask_noise_scales,
        "annealing": batch.annealing,
    }
    arrays |= {name: array for name, array in optional.items() if array is not None}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin else tensors


def on_device(inputs: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """`inputs` on `device`; pinned tensors are copied while the host goes on."""
    return {name: tensor.to(device, non_blocking=tensor.is_pinned()) for name, tensor in inputs.items()}


def model_inputs(batch: NoisyBatch, device: torch.device) -> dict[str, torch.Tensor]:
    """The keyword arguments of a model's training forward, on `device`."""
    return on_device(host_inputs(batch, pin=device.type == "cuda"), device)
