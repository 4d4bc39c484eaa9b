"""A corrupted batch as the keyword arguments of a model's training forward."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dlm_dist.diffusion.corruption import NoisyBatch


def model_inputs(batch: NoisyBatch, device: torch.device) -> dict[str, torch.Tensor]:
    """The keyword arguments of a model's training forward, on `device`.

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
    if batch.document_ids is not None:
        arrays["document_ids"] = batch.document_ids
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if device.type == "cuda":
        return {name: t.pin_memory().to(device, non_blocking=True) for name, t in tensors.items()}
    return {name: t.to(device) for name, t in tensors.items()}
