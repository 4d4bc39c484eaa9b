"""Likelihood of held-out rows, or a bound on it: fixed rows, fixed noise, one number with its standard error.

The noise of held-out row i is keyed by i and a constant seed, never by the run's: every evaluation of every
run draws the same times and masks, so two numbers differ by their models alone. The objective `ar` draws nothing:
its number is exact on these rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data_pipeline.rows import Rows
from data_pipeline.source import Source
from dlm_dist.diffusion.base import FloatArray, NoisyBatch, Objective
from dlm_dist.diffusion.model_inputs import model_inputs
from dlm_dist.diffusion.objectives import OBJECTIVES, Vocabulary
from dlm_dist.diffusion.time_buckets import TIME_BUCKETS, bucket_of

EVALUATION_SEED = 20_240_607
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class TimeBucket:
    """The bound as drawn at times in [first, last) alone: the mean of these over all tokens is the bound.

    With what `held_out_objective` draws it is the mean cross entropy of a hidden token, averaged over samples. The
    numbers are None where no time was drawn, the error also where times were drawn for one row only.
    """

    first: float
    last: float
    nats_per_token: float | None
    standard_error: float | None
    """Of `nats_per_token`, over rows."""
    draws: int
    """Times drawn: samples, or in block diffusion their blocks."""


@dataclass(frozen=True)
class HeldOutBound:
    """Negative evidence bound on held-out rows, or the negative log-likelihood itself where it is `exact`."""

    nats_per_token: float
    standard_error: float | None
    """Of `nats_per_token`, over rows; None for a single row."""
    bits_per_byte: float | None
    """None where the data set cannot tell the bytes of its text."""
    rows: int
    draws: int
    exact: bool
    by_time: tuple[TimeBucket, ...] | None
    """Equal parts of [0, 1]; None where the number is exact: no time matters then."""

    def record(self) -> dict[str, Any]:
        """As evaluations.jsonl and `dlm evaluate --json` have it (docs/resume.md)."""
        return {
            "bound_nats_per_token": self.nats_per_token,
            "standard_error": self.standard_error,
            "bits_per_byte": self.bits_per_byte,
            "exact": self.exact,
            "rows": self.rows,
            "draws": self.draws,
            "loss_by_time": None if self.by_time is None else [asdict(bucket) for bucket in self.by_time],
        }


def held_out_objective(
    source: Source,
    objective: str = "mdlm",
    *,
    isolate_documents: bool = False,
    shift: bool = False,
    block_length: int = 0,
) -> Objective:
    """The objective by which held-out rows are scored, with the defaults of its draws; see `evaluate_bound`."""
    return OBJECTIVES[objective](
        seed=EVALUATION_SEED,
        vocabulary=Vocabulary(source.mask_id, source.eos_id),
        isolate_documents=isolate_documents,
        **({"shift": True} if shift else {}),
        **({"block_lengths": ((0, block_length),)} if objective == "block" else {}),
    )


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
    made = held_out_objective(
        source, objective, isolate_documents=isolate_documents, shift=shift, block_length=block_length
    )
    # A block of one token is always hidden, behind its clean past.
    exact = objective == "ar" or (objective == "block" and block_length == 1)
    samples = measure_samples(
        model,
        source,
        device,
        made,
        lambda batch, losses: _sums(batch, losses, by_time=not exact),
        num_rows=num_rows,
        draws=draws,
        batch_size=batch_size,
        advance=advance,
    )
    return _summary(samples, draws, exact)


@torch.no_grad()
def measure_samples(
    model: Any,
    source: Source,
    device: torch.device,
    objective: Objective,
    measure: Callable[[NoisyBatch, FloatArray], FloatArray],
    *,
    num_rows: int,
    draws: int = 1,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> FloatArray:
    """What `measure` finds in each sample, [samples, F]; sample i * draws + d is draw d of held-out row i.

    `measure` gets a batch and its weighted losses [B, L] (nats), and gives F numbers for each sample [B, F]. All ranks
    return all samples, to the bit the same for any number of them. Collective as `evaluate_bound`.
    """
    distributed = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    was_training = model.training
    model.eval()
    found: dict[int, FloatArray] = {}
    total = min(num_rows, source.num_rows) * draws
    starts = range(0, total, batch_size)
    for first in range(0, len(starts), world):
        index = first + rank
        surplus = index >= len(starts)  # run, so that collectives match, and not counted
        start = starts[first if surplus else index]
        samples = np.arange(start, min(total, start + batch_size), dtype=np.int64)
        rows = source.read(samples // draws)
        batch = objective.corrupt(Rows(rows.tokens, rows.document_ids, samples, rows.text_bytes, rows.before))
        losses = _weighted_losses(model, batch, device)
        if not surplus:
            found[start] = measure(batch, losses)
        if advance is not None:
            advance(min(total, (first + world) * batch_size) - first * batch_size)
    model.train(was_training)
    if distributed:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, found)
        found = {start: values for part in parts for start, values in part.items()}
    return np.concatenate([found[start] for start in starts])


def _weighted_losses(model: Any, batch: NoisyBatch, device: torch.device) -> FloatArray:
    """Weighted nats at each place [B, L], in fp64 on the host; 0 where a token is not scored."""
    inputs = model_inputs(batch, device)
    losses = model(**inputs, per_row=True)[1].double().cpu().numpy()
    weighted = np.zeros(batch.inputs.size)
    weighted[inputs["supervised"].cpu().numpy()] = losses * inputs["weights"].double().cpu().numpy()
    return weighted.reshape(batch.inputs.shape)


def timed_parts(batch: NoisyBatch, losses: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Time, nats and tokens [B, K] of everything that has a time of its own: the samples, or all their K blocks.

    `losses` [B, L] are weighted nats. The blocks must be of one length, and no sample cut.
    """
    if batch.block_times is None:
        return batch.times[:, None], losses.sum(axis=1, keepdims=True), batch.lengths[:, None].astype(np.float64)
    assert batch.block_ids is not None
    length = int((batch.block_ids[0] == 0).sum())
    times = batch.block_times[:, ::length]
    return times, losses.reshape(*times.shape, length).sum(axis=2), np.full(times.shape, float(length))


def _sums(batch: NoisyBatch, losses: FloatArray, by_time: bool) -> FloatArray:
    """Nats, tokens and bytes of each sample, and `by_time` nats, tokens and draws of each bucket: [B, 3 (+ 30)]."""
    whole = np.stack([losses.sum(axis=1), batch.lengths, batch.text_bytes], axis=1)
    if not by_time:
        return whole
    times, nats, tokens = timed_parts(batch, losses)
    inside = bucket_of(times)[:, :, None] == np.arange(TIME_BUCKETS)  # [B, K, buckets]
    parts = [(inside * values[:, :, None]).sum(axis=1) for values in (nats, tokens, np.ones_like(times))]
    return np.concatenate([whole, *parts], axis=1)


def _summary(samples: FloatArray, draws: int, exact: bool) -> HeldOutBound:
    """`samples` [rows * draws, 3 (+ 30)] as `_sums` gives them."""
    by_row = samples.reshape(-1, draws, samples.shape[1]).mean(axis=1)
    nats, tokens, size = by_row[:, :3].T
    mean, error = _ratio(nats, tokens)
    known = bool((size >= 0).all()) and size.sum() > 0
    buckets = None
    if samples.shape[1] > 3:
        parts = by_row[:, 3:].reshape(-1, 3, TIME_BUCKETS)
        drawn = samples[:, 3:].reshape(-1, 3, TIME_BUCKETS)[:, 2].sum(axis=0)
        buckets = tuple(_bucket(i, parts[:, 0, i], parts[:, 1, i], int(drawn[i])) for i in range(TIME_BUCKETS))
    assert mean is not None
    return HeldOutBound(
        nats_per_token=mean,
        standard_error=error,
        bits_per_byte=float(nats.sum() / math.log(2) / size.sum()) if known else None,
        rows=len(by_row),
        draws=draws,
        exact=exact,
        by_time=buckets,
    )


def _bucket(number: int, nats: FloatArray, tokens: FloatArray, drawn: int) -> TimeBucket:
    """`nats` and `tokens` [rows] of bucket `number`."""
    mean, error = _ratio(nats, tokens)
    return TimeBucket(number / TIME_BUCKETS, (number + 1) / TIME_BUCKETS, mean, error, drawn)


def _ratio(nats: FloatArray, tokens: FloatArray) -> tuple[float | None, float | None]:
    """sum / sum over rows [rows], and its standard error; None where there is no row, or only one."""
    has_some = tokens > 0
    nats, tokens, count = nats[has_some], tokens[has_some], int(has_some.sum())
    if count == 0:
        return None, None
    mean = float(nats.sum() / tokens.sum())
    if count == 1:
        return mean, None
    residual = nats - mean * tokens
    return mean, math.sqrt(count / (count - 1) * float((residual**2).sum())) / float(tokens.sum())


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
