"""What a checkpoint says of the training that it comes from."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OBJECTIVES = ("mdlm", "block", "ar")


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    """Add --weights, for `load_weights`."""
    parser.add_argument(
        "--weights",
        choices=("trained", "master", "ema"),
        default="trained",
        help="of a checkpoint: as the forward pass had them (default), the fp32 masters, or their EMA",
    )


def load_weights(checkpoint: Path, weights: str, dtype: torch.dtype | None = None) -> Any:
    """The model of a checkpoint with the weights that --weights names, in `dtype` (None: as stored).

    Behind `require_weights`. Raises ValueError where there is no model, or no such weights.
    """
    from dlm_dist import models
    from dlm_dist.training.checkpoint_contents import Contents
    from dlm_dist.training.model_files import put_weights

    model = models.load(checkpoint, dtype)
    if weights != "trained":
        put_weights(model, Contents(checkpoint), weights)
    return model


def require_weights(checkpoint: Path, weights: str) -> None:
    """Raise ValueError where `checkpoint` is damaged, or holds nothing but weights as trained and others are wanted."""
    from dlm_dist.training.checkpoint_files import MANIFEST, TRAINER_STATE, require_whole

    if weights == "trained":
        require_whole(checkpoint)
    elif not (checkpoint / MANIFEST).is_file():
        raise ValueError(f"--weights {weights} is for a checkpoint (RUN/checkpoints/step-N), and {checkpoint} is none")
    else:
        require_whole(checkpoint, ("model/", "tokenizer/", "tensors/", TRAINER_STATE))


def trained_identity(checkpoint: Path) -> dict[str, Any]:
    """The run behind `checkpoint` (or its model/ folder, or an exported one), by configuration key; {} if unknown."""
    identity: dict[str, Any] = _trainer_state(checkpoint).get("identity", {})
    return identity


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    from dlm_dist.training.checkpoint_files import ORIGIN, TRAINER_STATE, load_trainer_state

    for folder in (checkpoint, checkpoint.parent):
        if (folder / TRAINER_STATE).is_file():
            return load_trainer_state(folder)
    if (checkpoint / ORIGIN).is_file():
        state: dict[str, Any] = json.loads((checkpoint / ORIGIN).read_bytes())["trainer_state"]
        return state
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
