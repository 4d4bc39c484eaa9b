"""What a checkpoint says of the training that it comes from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

OBJECTIVES = ("mdlm", "block", "ar")


def trained_identity(checkpoint: Path) -> dict[str, Any]:
    """The run that wrote `checkpoint` (or the model/ folder of one), by configuration key; empty if nothing says it."""
    from dlm_dist.training.checkpoint_files import TRAINER_STATE, load_trainer_state

    for folder in (checkpoint, checkpoint.parent):
        if (folder / TRAINER_STATE).is_file():
            identity: dict[str, Any] = load_trainer_state(folder).get("identity", {})
            return identity
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


def block_length(checkpoint: Path, wanted: int | None) -> int:
    """`wanted`, else the last block length that `checkpoint` was trained with; 0, the whole row, if nothing says it."""
    phases = trained_identity(checkpoint).get("objective.block_lengths")
    return wanted if wanted is not None else int(phases[-1][1]) if phases else 0


def shifted(checkpoint: Path) -> bool:
    """Whether the model predicts a token at the place in front of it; false where nothing says it."""
    return bool(trained_identity(checkpoint).get("objective.shift", False))
