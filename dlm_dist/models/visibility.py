"""Who sees whom in attention: one rule over the labels of tokens, as a dense mask or for FlexAttention.

A token belongs to a document and to a block of it, and sees the tokens of its document whose block is not later than
its own. Blocks of one token are causal attention, one block is bidirectional attention; a prompt that is the first
block is seen by every block behind it and sees itself; the turns of a chat are blocks too. With a second stream (block
diffusion, Arriola et al., "Block Diffusion", 2025: x_t beside x_0) a noisy token sees its own noisy block and the
earlier blocks of the clean stream, and a clean token sees the clean stream alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def sees(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether `query` sees `key`: indices into a row, of any shapes that broadcast; bool of the broadcast shape."""
        place_q, place_k = query % self.length, key % self.length
        seen = torch.ones_like(place_q == place_k)
        if self.document_ids is not None:
            seen = seen & (self.document_ids[row, place_q] == self.document_ids[row, place_k])
        if self.causal:
            seen = seen & (place_k <= place_q)
        if self.block_ids is None:
            return seen
        block_q, block_k = self.block_ids[row, place_q], self.block_ids[row, place_k]
        own = block_q == block_k
        if self.two_streams:
            clean_q, clean_k = query >= self.length, key >= self.length
            earlier = clean_k & (block_k < block_q)
            return seen & (earlier | (own & (clean_q == clean_k)))
        if self.prompt_and_own_block:
            return seen & (own | (block_k == 0))
        return seen & (block_k <= block_q)

    @property
    def is_everything(self) -> bool:
        """Whether every token of a row sees every other, or with `causal` all before it: no mask is needed then."""
        return self.document_ids is None and self.block_ids is None

    @property
    def width(self) -> int:
        """Tokens of a row that attention works on: T, or 2 T."""
        return self.length * (2 if self.two_streams else 1)

    def dense(self) -> Tensor:
        """[B or 1, 1, width, width] bool, True = visible."""
        rows = self.batch if self.document_ids is not None or self.block_ids is not None else 1
        index = torch.arange(self.width, device=self.device)
        row = torch.arange(rows, device=self.device)[:, None, None]
        return self.sees(row, index[None, :, None], index[None, None, :])[:, None]

    def block_mask(self) -> object:
        """FlexAttention's BlockMask of the same rule: tiles, and no [width, width] mask in memory."""
        from torch.nn.attention.flex_attention import create_block_mask

        def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.sees(row, query, key)

        return create_block_mask(mask_mod, self.batch, None, self.width, self.width, device=str(self.device))

    def positions(self) -> Tensor | None:
        """Rotary positions [B, width], counted from the first token of each document; None: from 0 in each row.

        They would not separate documents by themselves, hence the mask.
        """
        if self.document_ids is None:
            if not self.two_streams:
                return None
            return torch.arange(self.width, device=self.device)[None] % self.length
        first = torch.ones_like(self.document_ids, dtype=torch.bool)
        first[:, 1:] = self.document_ids[:, 1:] != self.document_ids[:, :-1]
        index = torch.arange(self.length, device=self.device).expand_as(self.document_ids)
        positions = index - torch.where(first, index, 0).cummax(dim=1).values
        return positions.repeat(1, 2) if self.two_streams else positions
