"""Text from a causal language model: one token after the other, each drawn from the model's distribution for it.

The random number of a token is keyed by its row's seed and its place among the generated ones, so what a row says
depends on its own prompt and seed, not on the rows beside it in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from dlm_dist import randomness
from dlm_dist.generation.samplers import Ids, as_batch, evaluating


class SamplingOptions(TypedDict, total=False):
    """Options of `continue_text`; `Sampling` says what each one means and its default."""

    temperature: float
    top_k: int | None
    top_p: float
    forbidden_ids: Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises ValueError for a value that makes no sense.

    temperature: 0 takes the likeliest token, of equal ones the lowest id; otherwise softmax(logits / temperature).
    top_k: only the k likeliest tokens; None: all.
    top_p: of those, only the likeliest ones that together reach this probability; 1: all.
    forbidden_ids: never written, and out of the probabilities.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    forbidden_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: it must be 0 or a positive number.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: it must be at least 1.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1.")

    def choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """A token [B] for each row of `logits` [B, V]; `draws` [B] fp64 are uniform on [0, 1)."""
        forbidden = torch.tensor(sorted(set(self.forbidden_ids)), dtype=torch.long, device=logits.device)
        scores = logits.double().index_fill(1, forbidden, -torch.inf)
        if self.temperature == 0:
            return scores.argmax(dim=1)
        probabilities = self._restricted(torch.softmax(scores / self.temperature, dim=1))
        # In the order of ids: a logit that differs in its last bits then moves the borders a little and swaps nothing.
        reached = probabilities.cumsum(dim=1)
        return (reached <= draws[:, None] * reached[:, -1:]).sum(dim=1)

    def _restricted(self, probabilities: Tensor) -> Tensor:
        """`probabilities` [B, V] with zeros where top_k and top_p leave a token out; the rest is not rescaled."""
        if self.top_k is None and self.top_p == 1:
            return probabilities
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        if self.top_k is not None:
            ordered[:, self.top_k :] = 0.0
        ahead = ordered.cumsum(dim=1) - ordered
        ordered = ordered.masked_fill(ahead >= self.top_p * ordered.sum(dim=1, keepdim=True), 0.0)
        return torch.zeros_like(probabilities).scatter_(1, order, ordered)


@torch.no_grad()
def continue_text(
    model: Any,
    prompt_ids: Ids,
    length: int,
    *,
    eos_id: int,
    seed: int | Sequence[int] = 0,
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """Continues each prompt [B, P] by `length` tokens: int64 [B, P + length] on the CPU; [P] gives [P + length].

    Each prompt is read as the beginning of a document, behind an end of text, as in training; P may be 0. After the
    first end of text that a row writes it holds `eos_id` only. `seed`: one for all rows, so that equal prompts get
    equal texts, or one for each. The model's mask token is never written. Raises ValueError for a model that is not
    causal. Under ZeRO-3 collective: every rank must call, with equal arguments.
    """
    if length < 1:
        raise ValueError(f"length is {length}: there must be at least one token to generate.")
    prompts = as_batch(prompt_ids, model)
    batch, start = prompts.shape
    seeds = [seed] * batch if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"seed has {len(seeds)} values for {batch} prompts: give one for all or one for each.")
    mask_id = model.config.mask_token_id
    if mask_id is not None:
        options["forbidden_ids"] = [*options.get("forbidden_ids", ()), mask_id]
    sampling = Sampling(**options)
    written = prompts.new_full((batch, length), eos_id)
    ended = torch.zeros(batch, dtype=torch.bool, device=prompts.device)
    given, state = torch.cat([prompts.new_full((batch, 1), eos_id), prompts], dim=1), None
    with evaluating(model):
        for place in range(length):
            logits, state = model.incremental(given, state)
            draws = [float(randomness.uniform(one, "generate", place, 1)[0]) for one in seeds]
            tokens = sampling.choose(logits[:, -1], torch.tensor(draws, dtype=torch.float64, device=prompts.device))
            written[:, place] = tokens.masked_fill(ended, eos_id)
            ended |= tokens == eos_id
            if bool(ended.all()):
                break
            given = tokens[:, None]
    return torch.cat([prompts, written], dim=1).view(*np.shape(prompt_ids)[:-1], start + length).cpu()
