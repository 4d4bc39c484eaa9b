"""Equal parts of [0, 1] by which a loss is told apart: what a model loses at which diffusion time."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dlm_dist.diffusion.base import FloatArray, IntArray, NoisyBatch

TIME_BUCKETS = 10


def bucket_name(bucket: int) -> str:
    """What a bucket is called in a run's figures: its first time and the one that it ends before."""
    return f"{bucket / TIME_BUCKETS:.1f}-{(bucket + 1) / TIME_BUCKETS:.1f}"


def bucket_of(times: FloatArray) -> IntArray:
    """The bucket of each time in [0, 1]; 1 belongs to the last."""
    return np.minimum((times * TIME_BUCKETS).astype(np.int64), TIME_BUCKETS - 1)


def buckets_of_scored(batch: NoisyBatch) -> NDArray[np.uint8]:
    """The bucket of each scored place, in their flattened order [M]: that of its block's time, or its sample's."""
    buckets = bucket_of(batch.times[:, None] if batch.block_times is None else batch.block_times)
    return np.broadcast_to(buckets, batch.inputs.shape)[batch.masks].astype(np.uint8)


def tokens_by_time(batch: NoisyBatch) -> IntArray:
    """Tokens that the batch accounts for by the bucket of their time, [TIME_BUCKETS]; they sum to its denominator."""
    if batch.block_times is None:
        tokens = batch.lengths if batch.counted is None else batch.counted
        return _sums(bucket_of(batch.times), tokens)
    assert batch.counted is None, "only whole rows have blocks with times of their own"
    there = np.arange(batch.inputs.shape[1]) < batch.lengths[:, None]
    return _sums(bucket_of(batch.block_times)[there], np.ones(there.sum(), dtype=np.int64))


def _sums(buckets: IntArray, values: IntArray) -> IntArray:
    sums = np.zeros(TIME_BUCKETS, dtype=np.int64)
    np.add.at(sums, buckets, values)
    return sums


def sum_by_bucket(values: torch.Tensor, buckets: torch.Tensor) -> torch.Tensor:
    """Sums of `values` [M] over the places of each of the `buckets` [M] uint8 -> [TIME_BUCKETS], without atomics."""
    numbers = torch.arange(TIME_BUCKETS, device=buckets.device, dtype=torch.uint8)
    return torch.where(buckets == numbers[:, None], values, 0.0).sum(dim=1)
