"""Text from a masked-diffusion model by remasking decoding: commit the surest tokens, look again, commit more.

The algorithm is LLaDA's (Nie et al., "Large Language Diffusion Models", 2025; section 2.4 and the authors'
`generate.py`): all hidden tokens of a block are predicted at once, a fixed share of them is kept, the rest stays
hidden for the next step. Continuing a prompt and filling gaps in a text are the same loop over different masks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

REMASKING = ("low_confidence", "random")

Ids = Tensor | NDArray[np.integer] | Sequence[int]

_GAP = re.compile(r"\{\{mask:([1-9]\d*)\}\}")
_LIKE_A_GAP = re.compile(r"\{\{mask[^}]*\}{0,2}")
_ROWS_AT_ONCE = 128  # logits of so many positions are in fp64 at a time


class TextEncoder(Protocol):
    """What `parse_gaps` needs of a tokenizer."""

    mask_id: int

    def encode(self, text: str) -> Sequence[int] | NDArray[np.integer]:
        """Text to ids."""


class TextIds(Protocol):
    """What `ids_without_text` needs of a tokenizer."""

    @property
    def eos_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def token_bytes(self) -> NDArray[np.int64] | None:
        """Bytes of text per id [vocab_size], None if unknown."""


class ChoiceOptions(TypedDict, total=False):
    """Options of every decoder that commits hidden tokens; `Decoding` says what each one means and its default."""

    temperature: float
    seed: int
    remasking: str
    threshold: float | None
    forbidden_ids: Sequence[int]


class DecodingOptions(ChoiceOptions, total=False):
    """Options of every function here."""

    block_length: int | None
    shifted_behind: int | None


@dataclass(frozen=True)
class Decoding:
    """How to decode. Raises ValueError for a value that makes no sense.

    steps: model calls at most. They are shared evenly among the blocks, and the tokens of a block among its steps;
        where they do not divide, the first ones take one more. A step with nothing to commit costs no model call.
    block_length: the hidden positions of a row are filled in blocks of so many, left to right; None: all in one.
    temperature: 0 takes the likeliest token; otherwise Gumbel noise in fp64 samples from softmax(logits / temperature).
    seed: of that noise. The same seed on the same device gives the same tokens.
    remasking: which tokens a step keeps. "low_confidence" keeps those with the highest probability (at temperature
        1), ties going to the left; "random" keeps random ones.
    threshold: beside its share, a step of "low_confidence" keeps every token whose probability is above this, so that
        fewer steps are needed (Fast-dLLM, LLaDA 2); None: only its share.
    forbidden_ids: never written, and out of the probabilities, as the mask token always is.
    shifted_behind: for a model trained with `objective.shift`, which predicts a token at the place in front of it: the
        id that stands in front of each row (end of text). None for other models.
    """

    steps: int
    block_length: int | None = None
    temperature: float = 0.0
    seed: int = 0
    remasking: str = "low_confidence"
    threshold: float | None = None
    forbidden_ids: Sequence[int] = ()
    shifted_behind: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: it must be at least 1.")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"block_length is {self.block_length}: it must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: it must be 0 or a positive number.")
        if self.remasking not in REMASKING:
            raise ValueError(f"remasking is {self.remasking!r}: it must be one of {', '.join(REMASKING)}.")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}: it must be a probability above 0 and below 1.")
        if self.threshold is not None and self.remasking == "random":
            raise ValueError("threshold goes with remasking low_confidence: random remasking does not ask how sure.")


def generate(
    model: PreTrainedModel,
    prompt_ids: Ids,
    length: int,
    steps: int,
    *,
    eos_id: int | None = None,
    **options: Unpack[DecodingOptions],
) -> Tensor:
    """Continues each prompt [B, P] by `length` tokens: int64 [B, P + length] on the CPU; [P] gives [P + length].

    P may be 0. With `eos_id`, everything after the first one that was generated becomes `eos_id`, and decoding stops
    after the block in which every row has one. Under ZeRO-3 collective: every rank must call, with equal arguments.
    """
    if length < 1:
        raise ValueError(f"length is {length}: there must be at least one token to generate.")
    prompts = as_batch(prompt_ids, model)
    batch, start = prompts.shape
    ids = torch.cat([prompts, prompts.new_full((batch, length), mask_id_of(model))], dim=1)
    fillable = torch.zeros_like(ids, dtype=torch.bool)
    fillable[:, start:] = True
    for after_block in _after_each_block(model, ids, fillable, Decoding(steps, **options), None):
        ids = after_block
        if all_ended(ids[:, start:], eos_id):
            break
    ids = torch.cat([prompts, only_eos_behind_eos(ids[:, start:], eos_id)], dim=1)
    return ids.view(*np.shape(prompt_ids)[:-1], start + length).cpu()


def infill(
    model: PreTrainedModel,
    ids_with_masks: Ids,
    steps: int,
    *,
    document_ids: Tensor | None = None,
    **options: Unpack[DecodingOptions],
) -> Tensor:
    """Fills every mask token of [B, T] (or [T]), leaving all other tokens: int64 of the same shape, on the CPU.

    Rows may have different numbers of masks. `document_ids` [B, T] goes to the model; -1 marks padding. Under ZeRO-3
    collective: every rank must call, with equal arguments.
    """
    ids = as_batch(ids_with_masks, model)
    filled = denoise(model, ids, ids == mask_id_of(model), steps, document_ids=document_ids, **options)
    return filled.view(np.shape(ids_with_masks)).cpu()


def denoise(
    model: PreTrainedModel,
    ids: Tensor,
    fillable: Tensor,
    steps: int,
    *,
    document_ids: Tensor | None = None,
    **options: Unpack[DecodingOptions],
) -> Tensor:
    """Hides the `fillable` [B, T] (bool) positions of `ids` [B, T] and fills them: int64 [B, T], on their device.

    `document_ids` as in `infill`. Under ZeRO-3 collective: every rank must call, with equal arguments.
    """
    for after_block in _after_each_block(model, ids, fillable, Decoding(steps, **options), document_ids):
        ids = after_block
    return ids


def commit_quotas(hidden: Tensor, steps: int) -> Tensor:
    """How many of `hidden` [B] tokens each of `steps` steps commits: [B, steps], the first ones one more."""
    step = torch.arange(steps, device=hidden.device)
    return hidden[:, None] // steps + (step < hidden[:, None] % steps).long()


def parse_gaps(text: str, tokenizer: TextEncoder) -> list[int]:
    """The ids of a text whose gaps are written `{{mask:12}}`: twelve mask tokens there. ValueError if malformed."""
    for found in _LIKE_A_GAP.finditer(text):
        if not _GAP.fullmatch(found.group()):
            raise ValueError(
                f"{found.group()!r} at character {found.start()} is no gap: write {{{{mask:N}}}} with the number"
                " N >= 1 of tokens to fill in there."
            )
    ids: list[int] = []
    for index, part in enumerate(_GAP.split(text)):
        if index % 2 == 1:
            ids += [tokenizer.mask_id] * int(part)
        elif part:
            ids += [int(token) for token in tokenizer.encode(part)]
    return ids


def all_ended(written: Tensor, eos_id: int | None) -> bool:
    """Whether every row of `written` [B, N] holds an end of text; no row does where `eos_id` is None."""
    return eos_id is not None and bool((written == eos_id).any(dim=1).all())


def only_eos_behind_eos(written: Tensor, eos_id: int | None) -> Tensor:
    """`written` [B, N] with `eos_id`, if there is one, in place of all that follows the first one of a row."""
    if eos_id is None:
        return written
    return written.masked_fill((written == eos_id).cumsum(dim=1) > 0, eos_id)


def steps_of_blocks(decoding: Decoding, block_length: int | None, count: int) -> list[int]:
    """The steps of each of `count` blocks. Raises ValueError where there are not enough for one each."""
    if decoding.steps < count:
        raise ValueError(
            f"steps is {decoding.steps}, but there are {count} blocks of {block_length} tokens to fill,"
            " and each of them needs a step."
        )
    return [decoding.steps // count + (block < decoding.steps % count) for block in range(count)]


def _after_each_block(
    model: PreTrainedModel, ids: Tensor, fillable: Tensor, decoding: Decoding, document_ids: Tensor | None
) -> Iterator[Tensor]:
    """Yields the ids [B, T] with everything hidden, then again after each block."""
    blocks = _blocks(fillable, decoding.block_length)
    count = int(blocks.max()) + 1 if blocks.numel() else 0
    steps = steps_of_blocks(decoding, decoding.block_length, count) if count else []
    sampler = Sampler(decoding, mask_id_of(model), ids.device)
    ids = ids.long().masked_fill(fillable, mask_id_of(model))
    yield ids
    for block, its_steps in enumerate(steps):
        look = partial(_whole_rows, model, document_ids=document_ids, shifted_behind=decoding.shifted_behind)
        ids = sampler.fill(look, ids, blocks == block, its_steps)
        yield ids


@torch.no_grad()
def _whole_rows(model: PreTrainedModel, ids: Tensor, document_ids: Tensor | None, shifted_behind: int | None) -> Tensor:
    """Logits [B, T, V], those of the token at each place; [B, T + 1, V] for a shifted model."""
    if shifted_behind is not None:
        ids = torch.cat([torch.full_like(ids[:, :1], shifted_behind), ids], dim=1)
        if document_ids is not None:
            document_ids = torch.cat([document_ids[:, :1], document_ids], dim=1)
    with evaluating(model):
        logits: Tensor = model(input_ids=ids, document_ids=document_ids).logits
    return logits


class Sampler:
    """Chooses tokens and how sure they are, and fills hidden places surest first."""

    def __init__(self, decoding: Decoding, mask_id: int, device: torch.device) -> None:
        self.temperature = decoding.temperature
        self.remasking = decoding.remasking
        self.threshold = None if decoding.threshold is None else math.log(decoding.threshold)
        self.excluded = torch.tensor(sorted({mask_id, *decoding.forbidden_ids}), device=device)
        self.generator = torch.Generator(device).manual_seed(decoding.seed)

    def fill(self, look: Callable[[Tensor], Tensor], ids: Tensor, hidden: Tensor, steps: int) -> Tensor:
        """`ids` [B, T] with the `hidden` [B, T] places filled in at most `steps` steps.

        `look` gives the logits [B, T, V] of ids [B, T] in which the places that are still hidden hold the mask token.
        """
        for quota in commit_quotas(hidden.sum(dim=1), steps).unbind(dim=1):
            if bool(((quota > 0) & hidden.any(dim=1)).any()):
                tokens, confidence = self._predict(look(ids), ids, hidden)
                commit = _highest(confidence, quota)
                if self.threshold is not None:
                    commit = commit | (confidence > self.threshold)
                commit = commit & hidden
                ids = torch.where(commit, tokens, ids)
                hidden = hidden & ~commit
        return ids

    def _predict(self, logits: Tensor, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """A token [B, T] for each hidden place, and how sure it is [B, T] fp32 (-inf elsewhere)."""
        rows, columns = hidden.nonzero(as_tuple=True)
        tokens = ids.clone()
        confidence = torch.full(ids.shape, -torch.inf, device=ids.device)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = (rows[start : start + _ROWS_AT_ONCE], columns[start : start + _ROWS_AT_ONCE])
            tokens[some], confidence[some] = self(logits[some])
        return tokens, confidence

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [R, V] to tokens [R] and confidences [R] fp32 (log probabilities or random numbers).

        fp32, so that rows whose fp64 sums differ by the order of summation alone are ties.
        """
        scores = logits.double().index_fill_(1, self.excluded, -torch.inf)
        tokens = self._noisy(scores).argmax(dim=1)
        if self.remasking == "random":
            return tokens, self._uniform(tokens.shape).float()
        confidence = scores.gather(1, tokens[:, None]).squeeze(1) - scores.logsumexp(dim=1)
        return tokens, confidence.float()

    def _noisy(self, scores: Tensor) -> Tensor:
        if self.temperature == 0:
            return scores
        # argmax(scores + T * Gumbel) samples from softmax(scores / T). LLaDA exponentiates first, which overflows.
        gumbel = self._uniform(scores.shape).log_().neg_().log_().neg_()
        return gumbel.mul_(self.temperature).add_(scores)

    def _uniform(self, shape: torch.Size) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device, dtype=torch.float64)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode inside, the mode it had afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _highest(confidence: Tensor, quota: Tensor) -> Tensor:
    """The `quota` [B] highest places of each row of `confidence` [B, T], ties going to the left: bool [B, T]."""
    order = confidence.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(confidence.shape[1], device=confidence.device) < quota[:, None]
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def _blocks(fillable: Tensor, block_length: int | None) -> Tensor:
    """The number of each fillable position's block [B, T], -1 elsewhere; rows count their own positions."""
    place = fillable.long().cumsum(dim=1) - 1
    block = torch.zeros_like(place) if block_length is None else place // block_length
    return block.masked_fill(~fillable, -1)


def ids_without_text(tokenizer: TextIds, vocabulary: int) -> list[int]:
    """Ids that stand for no text, end of text apart: reserved, unused, or beyond the tokenizer's vocabulary."""
    beyond = list(range(tokenizer.vocab_size, vocabulary))
    lengths = tokenizer.token_bytes()
    if lengths is None:
        return beyond
    return [int(token) for token in (lengths == 0).nonzero()[0] if token != tokenizer.eos_id] + beyond


def until_the_end(ids: Tensor, eos_id: int) -> list[int]:
    """`ids` [T] without the end-of-text tokens that fill them up behind the text."""
    text: list[int] = ids.tolist()
    while text and text[-1] == eos_id:
        text.pop()
    return text


def as_batch(ids: Ids, model: PreTrainedModel) -> Tensor:
    """Ids [B, T] or [T] as int64 [B, T] on the model's device."""
    tensor = torch.as_tensor(ids, dtype=torch.long, device=model.device)
    if tensor.dim() not in (1, 2) or (tensor.dim() == 2 and tensor.shape[0] == 0):
        raise ValueError(f"ids must be [B, T] with B >= 1, or [T], got {tuple(tensor.shape)}.")
    return tensor if tensor.dim() == 2 else tensor[None]


def mask_id_of(model: PreTrainedModel) -> int:
    """The id that stands for a hidden token. Raises ValueError for a model that has none."""
    mask_id: int | None = model.config.mask_token_id
    if mask_id is None:
        raise ValueError("The model's configuration has no mask_token_id, so it cannot denoise.")
    return mask_id
