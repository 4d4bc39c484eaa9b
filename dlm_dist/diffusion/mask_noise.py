"""How much noise the embedding of masks gets, and from which key: beside any objective, for its first samples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dlm_dist import randomness
from dlm_dist.diffusion.base import NoisyBatch, Objective, RowsLike


@dataclass(frozen=True)
class WithMaskNoise:
    """`objective`, whose masks are embedded with noise: `std` at the first sample, falling in a line to 0 at `samples`.

    The noise is another part of the model that is trained, independent of what is hidden; so a bound stays a bound, by
    Jensen's inequality, of the model averaged over it.
    """

    objective: Objective
    seed: int
    std: float
    samples: int

    @property
    def name(self) -> str:
        return self.objective.name

    @property
    def is_bound(self) -> bool:
        return self.objective.is_bound

    @property
    def has_times(self) -> bool:
        return self.objective.has_times

    def not_a_bound(self) -> list[str]:
        return self.objective.not_a_bound()

    def head_settings(self) -> dict[str, float]:
        return self.objective.head_settings()

    def corrupt(self, rows: RowsLike) -> NoisyBatch:
        """The objective's batch, with a key and a standard deviation for each sample while there is noise."""
        batch = self.objective.corrupt(rows)
        left = np.clip(1.0 - batch.positions / self.samples, 0.0, None)
        if not left.any():
            return batch
        draws = len(batch.positions) // len(rows.positions)
        numbers = batch.positions * draws + np.arange(len(batch.positions)) % draws
        keys = randomness.hash_uint64(randomness.derive_seed(self.seed, "mask_noise"), numbers)
        return replace(
            batch, mask_noise_keys=keys.view(np.int64), mask_noise_scales=(self.std * left).astype(np.float32)
        )
