"""Text in blocks behind a context that is read once: block diffusion, and several tokens at once from a CARD model.

The hidden tokens of a block are committed as `samplers.Sampler` does, with what is already written in sight; then the
finished block joins the context. The context is what a model keeps of a prefix (RWKV-7's states and shifted tokens,
Qwen3's keys and values), so a step costs one block, however long the text is, and a block one pass more.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from dlm_dist.generation.samplers import (
    ChoiceOptions,
    Decoding,
    Ids,
    Sampler,
    all_ended,
    as_batch,
    evaluating,
    mask_id_of,
    only_eos_behind_eos,
    steps_of_blocks,
)


def generate_blocks(
    model: Any,
    prompt_ids: Ids,
    length: int,
    steps: int,
    *,
    block_length: int,
    eos_id: int | None = None,
    **options: Unpack[ChoiceOptions],
) -> Tensor:
    """Continues each prompt [B, P] block after block: int64 [B, P + length] on the CPU; [P] gives [P + length].

    Blocks are where training has them: every `block_length` tokens from the beginning of the row. A prompt that ends
    inside a block gives the first tokens of that block, and a text that ends inside one leaves its rest hidden; both
    are noisy blocks as training has them. P may be 0. `steps`, and with `eos_id` what follows an end of text, as in
    `samplers.generate`. Under ZeRO-3 collective: every rank must call, with equal arguments.
    """
    prompts = as_batch(prompt_ids, model)
    start = prompts.shape[1] // block_length * block_length if block_length > 0 else 0
    decoding = Decoding(steps, block_length=block_length, **options)
    ids = _fill(model, prompts, start, length, decoding, eos_id, behind=None)
    return ids.view(*np.shape(prompt_ids)[:-1], -1).cpu()


def generate_ahead(
    model: Any,
    prompt_ids: Ids,
    length: int,
    steps: int,
    *,
    block_length: int,
    eos_id: int,
    **options: Unpack[ChoiceOptions],
) -> Tensor:
    """Continues each prompt [B, P] with a CARD model: int64 [B, P + length] on the CPU; [P] gives [P + length].

    `block_length` masks follow the text so far, and as many tokens are committed in several steps, usually with a
    `threshold` (CARD, arXiv 2601.22031); then they are read as they are. With blocks of one token this is
    `autoregressive.continue_text` at temperature 0. Each prompt is read behind an end of text, as in training. `steps`
    and what follows an end of text as in `samplers.generate`. Raises ValueError for a model that is not causal. Under
    ZeRO-3 collective: every rank must call, with equal arguments.
    """
    if model.direction != "causal":
        raise ValueError(f"a model of direction {model.direction} sees later tokens: expected a causal one.")
    prompts = as_batch(prompt_ids, model)
    decoding = Decoding(steps, block_length=block_length, **options)
    ids = _fill(model, prompts, prompts.shape[1], length, decoding, eos_id, behind=eos_id)
    return ids.view(*np.shape(prompt_ids)[:-1], -1).cpu()


@torch.no_grad()
def _fill(
    model: Any, prompts: Tensor, start: int, length: int, decoding: Decoding, eos_id: int | None, behind: int | None
) -> Tensor:
    """The prompts [B, P] and `length` tokens more, written in blocks that are counted from place `start`.

    `behind`: None where a token is predicted at its own place; else the model predicts it at the place in front of it,
    and this id stands in front of the row.
    """
    if length < 1:
        raise ValueError(f"length is {length}: there must be at least one token to generate.")
    size, given = decoding.block_length, prompts.shape[1]
    assert size is not None
    count = -(-(given + length - start) // size)
    ids = torch.cat([prompts, prompts.new_full((len(prompts), start + count * size - given), mask_id_of(model))], dim=1)
    place = torch.arange(ids.shape[1], device=ids.device)
    fillable = ((place >= given) & (place < given + length)).expand_as(ids)
    sampler = Sampler(decoding, mask_id_of(model), ids.device)

    before = None if behind is None else torch.full_like(ids[:, :1], behind)
    with evaluating(model):
        state = None
        if start:
            state = model.advance(_read(ids[:, :start], before), None, size)
            before = None if behind is None else ids[:, start - 1 : start]
        for block, steps in enumerate(steps_of_blocks(decoding, size, count)):
            now = slice(start + block * size, start + (block + 1) * size)
            look = partial(_logits, model, state, size, before)
            ids[:, now] = sampler.fill(look, ids[:, now], fillable[:, now], steps)
            if block + 1 == count or all_ended(ids[:, given : now.stop], eos_id):
                break
            state = model.advance(_read(ids[:, now], before), state, size)
            before = None if behind is None else ids[:, now.stop - 1 : now.stop]
    return torch.cat([prompts, only_eos_behind_eos(ids[:, given : given + length], eos_id)], dim=1)


def _logits(model: Any, context: Any, size: int, before: Tensor | None, tokens: Tensor) -> Tensor:
    """Logits [B, n, V] of the block of `tokens` [B, n] behind `context`, which stays as it is."""
    logits: Tensor = model.incremental(_read(tokens, before), context, size)[0]
    return logits


def _read(tokens: Tensor, before: Tensor | None) -> Tensor:
    """What the model reads for `tokens` [B, n]: them, or what precedes each, from `before` [B, 1] on."""
    return tokens if before is None else torch.cat([before, tokens[:, :-1]], dim=1)
