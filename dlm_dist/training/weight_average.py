"""An exponential moving average (EMA) of the weights, kept in fp32 beside each ZeRO shard of the masters.

How much of the average is left behind after a step is a pure function of `data_pos`, so there is nothing to resume
but the average itself, and neither the batch size nor its ramp changes what it means.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dlm_dist.training import zero_state
from dlm_dist.training.elastic import SavedShards

RAMP = 0.05
"""The half-life is at most this share of all samples so far, as in EDM (Karras et al., "Elucidating the Design Space of
Diffusion-Based Generative Models", 2022, `ema_rampup_ratio`): else initial weights would stay in it for long."""


def decay(half_life: int, data_pos: int, samples: int) -> float:
    """What share of the average stays in a step of `samples` rows that ends at `data_pos`.

    `half_life`: samples after which weights count half of what they did (a decay d per step of B rows is a half-life of
    B ln 2 / (1 - d)).
    """
    return float(0.5 ** (samples / min(half_life, RAMP * data_pos)))


class WeightAverage:
    """This rank's part of the average: 4 bytes a parameter over the number of ranks, at every ZeRO stage.

    Starts from the masters as they are now. Of a shard that all ranks hold, the one that writes it has the average.
    """

    def __init__(self, engine: Any, half_life: int) -> None:
        self.half_life = half_life
        self._engine = engine
        self._shards = zero_state.own_shards(engine)
        self._averages = {shard.key: shard.flat.clone() for shard in self._shards}

    def of(self, shard: zero_state.Shard) -> torch.Tensor:
        """The average of a shard's masters [numel], fp32, on their device."""
        return self._averages[shard.key]

    @torch.no_grad()
    def update(self, data_pos: int, samples: int) -> None:
        """Take in the masters behind a step of `samples` rows that updated them and ended at `data_pos`."""
        masters = [shard.flat for shard in self._shards]
        new = 1.0 - decay(self.half_life, data_pos, samples)
        torch._foreach_lerp_([self.of(shard) for shard in self._shards], masters, new)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """The average of the verified checkpoint `path`, of any layout; the masters as they are now if it has none."""
        saved = SavedShards(path, zero_state.parameter_sizes(self._engine))
        for shard in self._shards:
            average = self.of(shard).copy_(shard.flat)
            if saved.has_ema:
                saved.copy_weights(saved.runs(shard.pieces), "ema", average)
