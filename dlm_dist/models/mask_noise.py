"""Noise on the embedding of the mask token, for the first steps from causal weights.

Causal training never shows the mask token, and weight decay has driven its embedding towards zero: all masks then look
alike to the first layers, and gradients explode. Independent noise on each masked place, for a while, prevents that
(LLaDA 2.0, arXiv 2512.15745).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlm_dist.device_randomness import keyed_normals


def add_mask_noise(
    embedded: Tensor, ids: Tensor, mask_id: int | None, keys: Tensor | None, scales: Tensor | None
) -> Tensor:
    """`embedded` [B, T, C] with normal noise of standard deviation `scales` [B] where `ids` [B, T] are `mask_id`.

    `keys` [B] int64 decide the noise: that of a place and channel depends on nothing else. Without keys, and where a
    scale is 0, nothing changes.
    """
    if keys is None:
        return embedded
    assert scales is not None
    assert mask_id is not None
    noise = torch.stack([keyed_normals(key, *embedded.shape[1:]) for key in keys]) * scales[:, None, None]
    noisy = (ids == mask_id) & (scales > 0)[:, None]
    return torch.where(noisy[:, :, None], embedded + noise.to(embedded.dtype), embedded)
