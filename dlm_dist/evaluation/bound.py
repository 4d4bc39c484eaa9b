"""Likelihood of held-out rows, or a bound on it: fixed rows, fixed noise, one number with its standard error.

The noise of held-out row i is keyed by i and a constant seed, never by the run's: every evaluation of every
run draws the same times and masks, so two numbers differ by their models alone. The objective `ar` draws nothing:
its number is exact on these rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data_pipeline.rows import Rows
from data_pipeline.source import Source
from dlm_dist.diffusion.base import NoisyBatch
from dlm_dist.diffusion.model_inputs import model_inputs
from dlm_dist.diffusion.objectives import OBJECTIVES, Vocabulary

EVALUATION_SEED = 20_240_607
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class HeldOutBound:
    """Negative evidence bound on held-out rows; with the objective `ar` the negative log-likelihood itself."""

    nats_per_token: float
    standard_error: float | None
    """Of `nats_per_token`, over rows; None for a single row."""
    bits_per_byte: float | None
    """None where the data set cannot tell the bytes of its text."""
    rows: int
    draws: int


def held_out_batch(
    source: Source,
    samples: NDArray[np.int64],
    draws: int,
    isolate_documents: bool,
    objective: str = "mdlm",
    shift: bool = False,
    block_length: int = 0,
) -> NoisyBatch:
    """The held-out rows of `samples` [B] under `objective`; sample i * draws + d is draw d of row i."""
    rows = source.read(samples // draws)
    made = OBJECTIVES[objective](
        seed=EVALUATION_SEED,
        vocabulary=Vocabulary(source.mask_id, source.eos_id),
        isolate_documents=isolate_documents,
        **({"shift": True} if shift else {}),
        **({"block_lengths": ((0, block_length),)} if objective == "block" else {}),
    )
    return made.corrupt(Rows(rows.tokens, rows.document_ids, samples, rows.text_bytes, rows.before))


@torch.no_grad()
def evaluate_bound(
    model: Any,
    source: Source,
    device: torch.device,
    *,
    num_rows: int,
    draws: int = 1,
    batch_size: int = 8,
    isolate_documents: bool = False,
    objective: str = "mdlm",
    shift: bool = False,
    block_length: int = 0,
    advance: Callable[[int], None] | None = None,
) -> HeldOutBound:
    """Bound of `model` on the first `num_rows` rows of `source`; `advance` hears of samples done by all ranks.

    `objective` is `ar` for a model trained with that or with `card`, `block` for block diffusion (in blocks of
    `block_length`, 0: the whole row), and `mdlm` for any masked objective, whose weights, masks and schedule do not
    matter here; `shift` as the model was trained. Raises ValueError for several draws of `ar`.

    Collective where torch.distributed runs: every rank must call. The rows are cut into the same batches for
    any number of ranks, so the number does not depend on it; ZeRO-3 needs every rank to run as many forwards.
    """
    if objective == "ar" and draws != 1:
        raise ValueError(f"draws is {draws}: the objective ar has nothing to draw, expected 1.")
    distributed = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    was_training = model.training
    model.eval()
    nats: dict[int, tuple[float, int, int]] = {}
    total = min(num_rows, source.num_rows) * draws
    starts = range(0, total, batch_size)
    for first in range(0, len(starts), world):
        index = first + rank
        surplus = index >= len(starts)  # run, so that collectives match, and not counted
        start = starts[first if surplus else index]
        samples = np.arange(start, min(total, start + batch_size), dtype=np.int64)
        batch = held_out_batch(source, samples, draws, isolate_documents, objective, shift, block_length)
        sums = _nats_per_row(model, batch, device)
        if not surplus:
            for position, value, length, size in zip(
                batch.positions, sums, batch.lengths, batch.text_bytes, strict=True
            ):
                nats[int(position)] = (float(value), int(length), int(size))
        if advance is not None:
            advance(min(total, (first + world) * batch_size) - first * batch_size)
    model.train(was_training)
    if distributed:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, nats)
        nats = {position: entry for part in parts for position, entry in part.items()}
    return _summary(np.array([nats[position] for position in sorted(nats)]), draws)


def _nats_per_row(model: Any, batch: NoisyBatch, device: torch.device) -> NDArray[np.float64]:
    """Weighted nats of each sample [B], summed in fp64 on the host."""
    inputs = model_inputs(batch, device)
    losses = model(**inputs, per_row=True)[1].double().cpu().numpy()
    sample_of = inputs["supervised"].cpu().numpy() // batch.inputs.shape[1]
    weighted = losses * inputs["weights"].double().cpu().numpy()
    return np.bincount(sample_of, weights=weighted, minlength=len(batch.positions)).astype(np.float64)


def _summary(samples: NDArray[np.float64], draws: int) -> HeldOutBound:
    """`samples` [rows * draws, 3]: nats, tokens, bytes. The error is that of a ratio of two sums over rows."""
    by_row = samples.reshape(-1, draws, 3).mean(axis=1)
    nats, tokens, size = by_row.T
    count = len(by_row)
    mean = nats.sum() / tokens.sum()
    spread = None
    if count > 1:
        residual = nats - mean * tokens
        spread = math.sqrt(count / (count - 1) * float((residual**2).sum())) / float(tokens.sum())
    known = bool((size >= 0).all()) and size.sum() > 0
    return HeldOutBound(
        nats_per_token=float(mean),
        standard_error=spread,
        bits_per_byte=float(nats.sum() / math.log(2) / size.sum()) if known else None,
        rows=count,
        draws=draws,
    )


def unigram_nats_per_token(train: Source, held_out: Source, num_rows: int) -> float:
    """Cross entropy of the first `num_rows` held-out rows under add-one smoothed token counts of all of `train`.

    The smoothing is over the tokenizer's vocabulary, which both must share.
    """
    log_probability = np.log(1 + _token_counts(train, train.num_rows)) - np.log(
        train.vocab_size + train.num_rows * train.sequence_length
    )
    counts = _token_counts(held_out, min(num_rows, held_out.num_rows))
    return float(-(counts * log_probability).sum() / counts.sum())


def _token_counts(source: Source, num_rows: int) -> NDArray[np.int64]:
    """How often each id occurs in the first `num_rows` rows, [vocab_size]."""
    counts = np.zeros(source.vocab_size, dtype=np.int64)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        tokens = source.read(np.arange(start, min(num_rows, start + _ROWS_AT_ONCE))).tokens
        counts += np.bincount(tokens.reshape(-1), minlength=source.vocab_size)
    return counts
