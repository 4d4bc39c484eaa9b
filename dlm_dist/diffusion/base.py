"""What every objective reads and gives: rows in, NoisyBatch out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


class RowsLike(Protocol):
    """What an objective reads of a batch (data_pipeline.rows.Rows)."""

    @property
    def tokens(self) -> NDArray[np.integer]: ...  # [B, T]

    @property
    def document_ids(self) -> NDArray[np.int32]: ...  # [B, T]

    @property
    def positions(self) -> IntArray: ...  # [B]

    @property
    def text_bytes(self) -> IntArray: ...  # [B]

    @property
    def before(self) -> IntArray: ...  # [B]


@dataclass(frozen=True)
class Vocabulary:
    """The ids that an objective needs to know.

    token_bytes: bytes of text per id [V], None if unknown. size: ids from 0 to size - 1 are tokens, None if unknown.
    named: further special tokens that the tokenizer knows ("bos", "pad") by name.

    Raises ValueError where the mask token is a token of text as well.
    """

    mask_id: int
    eos_id: int
    token_bytes: IntArray | None = None
    size: int | None = None
    named: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, token in {"eos": self.eos_id, **self.named}.items():
            if token == self.mask_id:
                raise ValueError(
                    f"The mask token has id {self.mask_id}, which is also the tokenizer's {name}: a hidden token could "
                    "not be told from it; give the mask token an id that occurs in no text."
                )

    def id_of(self, token: str) -> int:
        """The id of a special token's name, or of a number. Raises ValueError for what is no id here."""
        known = {"eos": self.eos_id, **self.named}
        if token.isdigit():
            if self.size is not None and int(token) >= self.size:
                raise ValueError(f"There is no token {token}: the ids of this tokenizer go to {self.size - 1}.")
            return int(token)
        if token not in known:
            raise ValueError(
                f"This tokenizer has no token called {token} (it knows {', '.join(sorted(known))}): give its id."
            )
        return known[token]


@dataclass(frozen=True)
class NoisyBatch:
    """A corrupted batch: what the model sees, and what it is asked.

    B samples, of which a row may give several, and L places: those of the row's T tokens, and where outputs are shifted
    (Dream) one in front. Targets come aligned with inputs: the model's output at a place is scored against the target
    there.
    """

    inputs: IntArray
    """[B, L] what the model reads."""
    targets: IntArray
    """[B, L] clean ids; only those with a positive weight are scored."""
    weights: NDArray[np.float32]
    """[B, L] weight of each cross entropy (nats) in the loss sum; 0 where a token is not scored."""
    document_ids: NDArray[np.int32] | None
    """[B, L] tokens see each other only where ids agree, -1 is not there; None: every row is one document."""
    times: FloatArray
    """[B] diffusion time of each sample, in [0, 1]."""
    lengths: IntArray
    """[B] tokens of each sample that are there (random-length truncation cuts the rest)."""
    positions: IntArray
    """[B] global sample positions."""
    text_bytes: IntArray
    """[B] bytes of text that the `lengths` tokens stand for; -1 where unknown."""
    counted: IntArray | None = None
    """[B] tokens that each sample counts for in the mean loss; None: its `lengths`."""
    clean: IntArray | None = None
    """[B, L] clean ids, of which a token sees the blocks before its own (block diffusion)."""
    block_ids: NDArray[np.int32] | None = None
    """[B, L] the block of each token: none sees a later one; None: one block."""
    annealing: IntArray | None = None
    """[B, 3] what tokens see of those behind them (`corruption.annealed_attention`); None: as the model's direction."""
    block_times: FloatArray | None = None
    """[B, L] the time of each token's block; None: that of its sample."""
    mask_noise_keys: IntArray | None = None
    """[B] what the noise on the embedding of masks is made from; None: there is none."""
    mask_noise_scales: NDArray[np.float32] | None = None
    """[B] standard deviation of that noise."""

    @property
    def denominator(self) -> int:
        """Tokens that this batch accounts for: the loss is the sum of weighted nats per such token."""
        return int((self.lengths if self.counted is None else self.counted).sum())

    @property
    def masks(self) -> BoolArray:
        """[B, L] what is scored."""
        return self.weights > 0


class Objective(Protocol):
    """An objective's name, whether its loss is a bound on the negative log-likelihood, and its corruption."""

    @property
    def name(self) -> str: ...

    @property
    def is_bound(self) -> bool: ...

    @property
    def has_times(self) -> bool:
        """Whether its samples have diffusion times, so that a loss can be told apart by them."""
        ...

    def not_a_bound(self) -> list[str]:
        """The settings for which the loss is no bound, as `key=value`; empty where it is one."""
        ...

    def corrupt(self, rows: RowsLike) -> NoisyBatch:
        """Corrupt a batch of clean rows; a pure function of the rows and their positions."""
        ...

    def head_settings(self) -> dict[str, float]:
        """Further arguments of the loss head, which the model's training forward takes; empty for plain losses."""
        ...


def visible_documents(
    document_ids: NDArray[np.int32], there: BoolArray, isolate_documents: bool
) -> NDArray[np.int32] | None:
    """Document ids [B, T] for the model, -1 for the cut tails; None when every row is whole and one document."""
    if isolate_documents:
        return np.where(there, document_ids, -1).astype(np.int32)
    return None if there.all() else np.where(there, 0, -1).astype(np.int32)


def text_bytes_of(row_bytes: IntArray, tokens: IntArray, there: BoolArray, token_bytes: IntArray | None) -> IntArray:
    """Bytes of text [B] of the tokens that are there: `row_bytes` [B] where a row is whole, else by id."""
    cut = np.where(there, 0 if token_bytes is None else token_bytes[tokens], 0).sum(axis=1).astype(np.int64)
    return np.where(there.all(axis=1), row_bytes, -1 if token_bytes is None else cut)
