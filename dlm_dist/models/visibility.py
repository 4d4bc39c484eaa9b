"""Who sees whom in attention: one rule over the labels of tokens, as a dense mask or for FlexAttention.

A token belongs to a document and to a block of it, and sees the tokens of its document whose block is not later than
its own. Blocks of one token are causal attention, one block is bidirectional attention; a prompt that is the first
block is seen by every block behind it and sees itself; the turns of a chat are blocks too (`turn_blocks`). With a
second stream (block diffusion, Arriola et al., "Block Diffusion", 2025: x_t beside x_0) a noisy token sees its own
noisy block and the earlier blocks of the clean stream, and a clean token sees the clean stream alone. A layer may see
less than that (`LayerPattern`), and so may, for a while, a model that comes from causal weights (`annealing`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from dlm_dist.compatibility import LAYER_PATTERN
from dlm_dist.device_randomness import mix32

_LOW_32 = 0xFFFFFFFF
_PAIRS_AT_ONCE = 2**18


@dataclass(frozen=True)
class LayerPattern:
    """What one layer leaves of all that a token may see; with everything at its default all of it.

    causal: nothing behind the token. block_length: nothing behind its block, blocks being cut from the start of its
    document on. window: nothing farther away than so many tokens, on either side.
    """

    causal: bool = False
    block_length: int | None = None
    window: int | None = None

    @classmethod
    def parse(cls, text: str) -> LayerPattern:
        """The pattern of "bidirectional" (all of it), "causal", "block_causal:N" or "window:N"."""
        found = LAYER_PATTERN.fullmatch(text)
        assert found is not None, text
        if found[1]:
            return cls(causal=found[1] == "causal")
        return cls(block_length=int(found[3])) if found[2] == "block_causal" else cls(window=int(found[3]))

    def mean_keys(self, length: int, causal: bool, block_length: int | None = None) -> float:
        """Tokens that one of a whole row of `length` tokens sees on average, in a model that is `causal` or not.

        `block_length`: of block diffusion, in whose two streams a token sees its own block and those before it.
        """
        return _mean_keys(self, length, causal or self.causal, block_length)


@cache
def _mean_keys(pattern: LayerPattern, length: int, causal: bool, block_length: int | None) -> float:
    place = torch.arange(length)
    first, last = torch.zeros_like(place), torch.full_like(place, length - 1)
    if pattern.window is not None:
        first, last = (place - pattern.window).clamp_min(0), (place + pattern.window).clamp_max(length - 1)
    for size in (pattern.block_length, block_length):
        if size is not None:
            last = torch.minimum(last, (place // size + 1) * size - 1)
    if causal:
        last = torch.minimum(last, place)
    return (last - first + 1).double().mean().item()


@dataclass(frozen=True)
class Visibility:
    """The rule for a batch of rows of T tokens, or of 2 T where the clean tokens lie behind the noisy ones."""

    batch: int
    length: int
    """T."""
    device: torch.device
    document_ids: Tensor | None = None
    """[B, T]; None: every row is one document. Tokens of -1, a cut tail, see each other and nobody else."""
    block_ids: Tensor | None = None
    """[B, T] not falling inside a document; None: one block."""
    causal: bool = False
    """Whether, beside all that, a token sees none behind it."""
    prompt_and_own_block: bool = False
    """A token sees its own block and block 0, and no other (the mask of win10ogod/Qwen3llada)."""
    two_streams: bool = False
    annealing: tuple[Tensor, Tensor, Tensor] | None = None
    """Two keys and a threshold, each [B] int64: of the tokens behind it a token sees those whose `pair_words` lie below
    the threshold. 0: none of them, 2**32: all."""
    window: int | None = None
    """A token sees none farther away than this, on either side."""
    layer_block_length: int | None = None
    """A token sees none behind its block of so many tokens, cut from the start of its document on."""
    document_starts: Tensor | None = None
    """[B, T] the place of the first token of each token's document, beside `layer_block_length` and `document_ids`."""

    def in_layer(self, pattern: LayerPattern) -> Visibility:
        """What a layer of that pattern leaves of the rule."""
        in_blocks = pattern.block_length is not None and self.document_ids is not None
        return replace(
            self,
            causal=self.causal or pattern.causal,
            window=pattern.window,
            layer_block_length=pattern.block_length,
            document_starts=self._starts_of_documents() if in_blocks else None,
        )

    def sees(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether `query` sees `key`: indices into a row, of any shapes that broadcast; bool of the broadcast shape."""
        place_q, place_k = query % self.length, key % self.length
        seen = torch.ones_like(place_q == place_k)
        if self.document_ids is not None:
            seen = seen & (self.document_ids[row, place_q] == self.document_ids[row, place_k])
        if self.causal:
            seen = seen & (place_k <= place_q)
        elif self.annealing is not None:
            key_0, key_1, threshold = (label[row] for label in self.annealing)
            seen = seen & ((place_k <= place_q) | (pair_words(key_0, key_1, place_q, place_k) < threshold))
        if self.window is not None:
            seen = seen & ((place_q - place_k).abs() <= self.window)
        if self.layer_block_length is not None:
            seen = seen & self._in_no_later_layer_block(row, place_q, place_k)
        return seen if self.block_ids is None else seen & self._in_visible_block(row, query, key)

    def _in_no_later_layer_block(self, row: Tensor, place_q: Tensor, place_k: Tensor) -> Tensor:
        assert self.layer_block_length is not None
        # What the two are to each other in different documents does not matter.
        start: Tensor | int = 0 if self.document_starts is None else self.document_starts[row, place_q]
        return (place_k - start) // self.layer_block_length <= (place_q - start) // self.layer_block_length

    def _in_visible_block(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert self.block_ids is not None
        block_q, block_k = self.block_ids[row, query % self.length], self.block_ids[row, key % self.length]
        own = block_q == block_k
        if self.two_streams:
            clean_q, clean_k = query >= self.length, key >= self.length
            # As an exclusive or: the compiler of FlexAttention cannot compare two truth values for equality.
            return (clean_k & (block_k < block_q)) | (own & ~(clean_q ^ clean_k))
        return own | (block_k == 0) if self.prompt_and_own_block else block_k <= block_q

    @property
    def is_everything(self) -> bool:
        """Whether every token of a row sees every other, or with `causal` all before it: no mask is needed then."""
        labels = (self.document_ids, self.block_ids, self.window, self.layer_block_length)
        return all(label is None for label in labels) and (self.causal or self.annealing is None)

    @property
    def width(self) -> int:
        """Tokens of a row that attention works on: T, or 2 T."""
        return self.length * (2 if self.two_streams else 1)

    @property
    def rows(self) -> int:
        """Rows that may differ in who sees whom: B, or 1 where all are alike."""
        alike = all(label is None for label in (self.document_ids, self.block_ids, self.annealing))
        return 1 if alike else self.batch

    def dense(self) -> Tensor:
        """[B or 1, 1, width, width] bool, True = visible."""
        index = torch.arange(self.width, device=self.device)
        row = torch.arange(self.rows, device=self.device)[:, None, None]
        mask = torch.empty(self.rows, 1, self.width, self.width, dtype=torch.bool, device=self.device)
        # In slices: the whole numbers on the way to a truth value take many times its memory.
        size = max(1, _PAIRS_AT_ONCE // (self.rows * self.width))
        for first in range(0, self.width, size):
            queries = index[None, first : first + size, None]
            mask[:, 0, first : first + size] = self.sees(row, queries, index[None, None, :])
        return mask

    def positions(self) -> Tensor | None:
        """Rotary positions [B, width], counted from the first token of each document; None: from 0 in each row.

        They would not separate documents by themselves, hence the mask.
        """
        if self.document_ids is None:
            if not self.two_streams:
                return None
            return torch.arange(self.width, device=self.device)[None] % self.length
        positions = torch.arange(self.length, device=self.device) - self._starts_of_documents()
        return positions.repeat(1, 2) if self.two_streams else positions

    def _starts_of_documents(self) -> Tensor:
        assert self.document_ids is not None
        return _run_starts(_changes(self.document_ids))


def unbound(annealing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of [B, 3], as a `Visibility` takes them: contiguous, as FlexAttention wants what a rule reads."""
    key_0, key_1, threshold = (column.contiguous() for column in annealing.unbind(1))
    return key_0, key_1, threshold


def pair_words(key_0: Tensor, key_1: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A word in [0, 2**32) for each pair of places, keyed by two words of a row; int64, shapes that broadcast.

    Whole numbers only, so that CPU and CUDA agree to the bit, and a function of one pair, so that FlexAttention can
    evaluate it where it needs it.
    """
    return mix32(mix32(query + key_0 & _LOW_32) ^ mix32(key + key_1 & _LOW_32))


def turn_blocks(is_prompt: Tensor, block_length: int | None = None, document_ids: Tensor | None = None) -> Tensor:
    """Block ids [B, T] of prompts and answers, for `block_ids` of a model.

    `is_prompt` [B, T] bool: a run of prompt tokens, or of others, is a turn of its document. A prompt is one block; an
    answer is one, or blocks of `block_length` from its first token on. So every turn sees all turns before it and
    itself, an answer in blocks. Blocks count from 0 in each document; one that does not begin with a prompt has no
    block 0, so that `prompt_and_own_block` shows block 0 only where it is a prompt.
    """
    new_document = _changes(torch.zeros_like(is_prompt) if document_ids is None else document_ids)
    new_turn = _changes(is_prompt) | new_document
    new_block = new_turn
    if block_length is not None:
        place = torch.arange(is_prompt.shape[1], device=is_prompt.device) - _run_starts(new_turn)
        new_block = new_turn | (~is_prompt & (place % block_length == 0))
    number = new_block.cumsum(dim=1)
    start = _run_starts(new_document)
    return number - number.gather(1, start) + (~is_prompt.gather(1, start)).long()


def _changes(labels: Tensor) -> Tensor:
    """[B, T] bool: where a run of equal `labels` begins."""
    first = torch.ones_like(labels, dtype=torch.bool)
    first[:, 1:] = labels[:, 1:] != labels[:, :-1]
    return first


def _run_starts(first: Tensor) -> Tensor:
    """[B, T] the place where the run of each token began; `first` [B, T] says where runs begin."""
    index = torch.arange(first.shape[1], device=first.device).expand_as(first)
    return torch.where(first, index, 0).cummax(dim=1).values
