"""What a checkpoint says of the training that it comes from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

OBJECTIVES = ("mdlm", "block", "ar")


def trained_identity(checkpoint: Path) -> dict[str, Any]:
    """The run that wrote `checkpoint` (or the model/ folder of one), by configuration key; empty if nothing says it."""
    identity: dict[str, Any] = _trainer_state(checkpoint).get("identity", {})
    return identity


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    from dlm_dist.training.checkpoint_files import TRAINER_STATE, load_trainer_state

    for folder in (checkpoint, checkpoint.parent):
        if (folder / TRAINER_STATE).is_file():
            return load_trainer_state(folder)
    return {}


def objective_of(checkpoint: Path, direction: str, wanted: str | None, tell: bool = True) -> str:
    """`wanted`, else how what `checkpoint` was trained as is scored: `ar` (and `card`), `block`, or `mdlm`.

    `direction` is its model's. Where nothing says it, a causal model counts as `ar` and any other as `mdlm`; with
    `tell` a note says so on standard error. Raises ValueError for `ar` with a model that sees later tokens.
    """
    name = wanted or trained_identity(checkpoint).get("objective.name")
    if name is not None:
        name = {"ar": "ar", "card": "ar", "block": "block"}.get(name, "mdlm")
    if name is None:
        name = "ar" if direction == "causal" else "mdlm"
        if tell:
            print(
                f"note: {checkpoint} does not say its objective; it is {direction}, so taken as {name}", file=sys.stderr
            )
    if name == "ar" and direction != "causal":
        raise ValueError(f"the objective ar needs a causal model, and that of {checkpoint} is {direction}")
    return str(name)


def block_length(checkpoint: Path, wanted: int | None, sequence_length: int | None = None) -> int:
    """`wanted`, else the block length that holds where `checkpoint` was saved; 0, the whole row, if nothing says it.

    `sequence_length` of the rows; None: that of the checkpoint, or ValueError where the checkpoint does not say it.
    """
    from data_pipeline.order import SkipList
    from dlm_dist.diffusion.block_diffusion import BlockLengths

    state = _trainer_state(checkpoint)
    phases = state.get("identity", {}).get("objective.block_lengths")
    if wanted is not None or not phases:
        return wanted or 0
    sequence_length = sequence_length or state.get("sequence_length")
    if sequence_length is None:
        raise ValueError(f"{checkpoint} does not say how long the rows were: give --block-length")
    position = SkipList([(first, stop) for first, stop in state["skipped_ranges"]]).positions(state["data_pos"], 1)
    schedule = BlockLengths(tuple((tokens, length) for tokens, length in phases))
    return int(schedule.at(position, sequence_length)[0]) % sequence_length


def shifted(checkpoint: Path) -> bool:
    """Whether the model predicts a token at the place in front of it; false where nothing says it."""
    return bool(trained_identity(checkpoint).get("objective.shift", False))
