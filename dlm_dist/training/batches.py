"""One optimizer step as a rank sees it: its micro-batches, and hashes of what the whole step holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from dlm_dist.config import BatchPlan
from dlm_dist.diffusion.base import NoisyBatch
from dlm_dist.diffusion.model_inputs import host_inputs
from dlm_dist.diffusion.objectives import Objective, RowsLike
from dlm_dist.diffusion.time_buckets import TIME_BUCKETS, buckets_of_scored, tokens_by_time

_DIGEST_BYTES = 32
_UNKNOWN = -(2**50)  # stays below 0 whatever the other ranks add


@dataclass(frozen=True)
class RankStep:
    """This rank's part of one optimizer step, ready for the model, with what all ranks must know of it."""

    micro_batches: list[dict[str, torch.Tensor]]
    """Keyword arguments of the model's training forward, on the host; pinned where the device is CUDA."""
    counts: NDArray[np.int64]
    """[5] tokens that the rows account for, that enter the loss, that the model reads, bytes of text (far below 0:
    unknown), and tokens of the rows themselves."""
    digests: NDArray[np.uint8]
    """[2, rows of this rank, 32] SHA-256 of each row's tokens, and of its mask, inputs, time and length."""
    span: tuple[int, int]
    """First sample position of the whole step and one past its last."""
    tokens_by_time: NDArray[np.int64]
    """[TIME_BUCKETS] tokens that the rows account for, by their time; 0 where the objective has none."""
    time_buckets: list[torch.Tensor] | None
    """For each micro-batch the bucket of each token that enters the loss, [M] uint8, beside its weights; None where the
    objective has no times."""


@dataclass(frozen=True)
class StepTotals:
    """What all ranks together hold in one step."""

    denominator: int
    """Tokens that the step accounts for."""
    supervised: int
    """Tokens that enter the loss."""
    read: int
    """Tokens that the model reads: several draws of a row count each, a clean stream beside a noisy one too."""
    text_bytes: int | None
    """Bytes of text behind the tokens; None where a source cannot tell."""
    row_tokens: int
    """Tokens of the rows that are there: each row counts once, however many draws it gives."""
    tokens_by_time: tuple[int, ...]
    """`denominator` by the bucket of time."""
    rows_sha256: str
    noise_sha256: str
    all_ready: bool
    """Whether every rank has said so: see `gather_totals`."""
    any_alarm: bool
    """Whether a rank has said so: see `gather_totals`."""
    memory: tuple[int, ...] = ()
    """The largest over ranks of each number of `memory` of `gather_totals`."""


def prepare_step(
    read: Callable[[NDArray[np.int64]], RowsLike],
    objective: Objective,
    positions: NDArray[np.int64],
    plan: BatchPlan,
    rank: int,
    world_size: int,
    pin: bool = False,
) -> RankStep:
    """Read and corrupt this rank's part of the step that holds `positions` [global batch].

    Each rank takes a contiguous part, cut into micro-batches. Runs in the read-ahead threads, so that the loop is
    left with nothing but the copy to the device; `pin` for CUDA.
    """
    mine = np.array_split(positions, world_size)[rank]
    batches = [
        objective.corrupt(read(mine[start : start + plan.micro_batch_size]))
        for start in range(0, len(mine), plan.micro_batch_size)
    ]
    return RankStep(
        micro_batches=[host_inputs(batch, pin) for batch in batches],
        counts=_counts(batches),
        digests=np.concatenate([_digests(batch) for batch in batches], axis=1),
        span=(int(positions[0]), int(positions[-1]) + 1),
        tokens_by_time=_tokens_by_time(objective, batches),
        time_buckets=[_buckets(batch, pin) for batch in batches] if objective.has_times else None,
    )


def _tokens_by_time(objective: Objective, batches: Sequence[NoisyBatch]) -> NDArray[np.int64]:
    found = [tokens_by_time(batch) for batch in batches] if objective.has_times else []
    return np.sum([np.zeros(TIME_BUCKETS, dtype=np.int64), *found], axis=0)


def _buckets(batch: NoisyBatch, pin: bool) -> torch.Tensor:
    buckets = torch.from_numpy(buckets_of_scored(batch))
    return buckets.pin_memory() if pin else buckets


def _counts(batches: Sequence[NoisyBatch]) -> NDArray[np.int64]:
    known = all((batch.text_bytes >= 0).all() for batch in batches)
    return np.array(
        [
            sum(batch.denominator for batch in batches),
            sum(int(batch.masks.sum()) for batch in batches),
            sum(batch.inputs.size + (0 if batch.clean is None else batch.clean.size) for batch in batches),
            sum(int(batch.text_bytes.sum()) for batch in batches) if known else _UNKNOWN,
            sum(_row_tokens(batch) for batch in batches),
        ],
        dtype="<i8",
    )


def _row_tokens(batch: NoisyBatch) -> int:
    _, first_draws = np.unique(batch.positions, return_index=True)
    return int(batch.lengths[first_draws].sum())


def _digests(batch: NoisyBatch) -> NDArray[np.uint8]:
    rows, noise = [], []
    for i in range(len(batch.positions)):
        rows.append(hashlib.sha256(batch.targets[i].astype("<i8").tobytes()).digest())
        drawn = hashlib.sha256(np.packbits(batch.masks[i]).tobytes())
        drawn.update(batch.inputs[i].astype("<i8").tobytes())
        drawn.update(batch.times[i : i + 1].astype("<f8").tobytes())
        drawn.update(batch.lengths[i : i + 1].astype("<i8").tobytes())
        if batch.mask_noise_keys is not None and batch.mask_noise_scales is not None and batch.mask_noise_scales[i]:
            drawn.update(batch.mask_noise_keys[i : i + 1].astype("<i8").tobytes())
            drawn.update(batch.mask_noise_scales[i : i + 1].astype("<f4").tobytes())
        # Not where the budget is over: other samples of the micro-batch must not show.
        if batch.annealing is not None and batch.annealing[i, 2] < 2**32:
            drawn.update(batch.annealing[i].astype("<i8").tobytes())
        noise.append(drawn.digest())
    return np.frombuffer(b"".join(rows + noise), dtype=np.uint8).reshape(2, -1, _DIGEST_BYTES)


def gather_totals(
    step: RankStep, group: dist.ProcessGroup | None, ready: bool, alarm: bool, memory: Sequence[int] = ()
) -> StepTotals:
    """Sum and hash over all ranks. Collective: every rank must call. `group` carries host tensors (gloo).

    The hashes run over the rows in the order of their positions, so they are the same for every topology. `ready`
    and `alarm` ride along: whether this rank's part of the save in flight is done, and whether it wants the run to end;
    and so does what its `memory` holds, as many numbers on every rank.
    """
    counts = np.concatenate([step.counts, step.tokens_by_time, [ready, alarm], memory]).astype("<i8")
    mine = torch.from_numpy(np.concatenate([counts.view(np.uint8), step.digests.reshape(-1)]))
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    raw = np.stack([part.numpy() for part in parts])
    numbers = np.ascontiguousarray(raw[:, : counts.nbytes]).view("<i8")
    largest = numbers[:, counts.size - len(memory) :].max(axis=0)
    sums = numbers[:, : counts.size - len(memory)].sum(axis=0)
    digests = raw[:, counts.nbytes :].reshape(len(parts), 2, -1)
    return StepTotals(
        # A step without any token that counts has a loss of 0, not of 0 / 0.
        denominator=max(1, int(sums[0])),
        supervised=int(sums[1]),
        read=int(sums[2]),
        text_bytes=int(sums[3]) if sums[3] >= 0 else None,
        row_tokens=int(sums[4]),
        tokens_by_time=tuple(sums[5:-2].tolist()),
        rows_sha256=hashlib.sha256(digests[:, 0].tobytes()).hexdigest(),
        noise_sha256=hashlib.sha256(digests[:, 1].tobytes()).hexdigest(),
        all_ready=int(sums[-2]) == len(parts),
        any_alarm=int(sums[-1]) > 0,
        memory=tuple(largest.tolist()),
    )
