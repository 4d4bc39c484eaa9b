"""Which objective runs on which backbone in which direction, and why the others are refused."""

from __future__ import annotations

import re
from collections.abc import Sequence

DIRECTIONS = {"qwen3": ("causal", "bidirectional"), "rwkv7": ("causal", "bidirectional", "alternate", "dw_jrt")}

MASKED = ("mdlm", "dllm", "soft_ce", "iid_t", "wsd")
"""The objectives of masked diffusion."""

OBJECTIVES = (*MASKED, "block", "ar", "card")

_READ_THE_NEXT_TOKEN = ("ar", "card")


def refusal(objective: str, backbone: str, direction: str) -> str | None:
    """Why the combination is refused, in words that follow "expected"; None where it runs."""
    if direction not in DIRECTIONS[backbone]:
        return f"one of {', '.join(DIRECTIONS[backbone])}, the directions of {backbone}"
    if objective in _READ_THE_NEXT_TOKEN and direction != "causal":
        return f"causal, since objective.name is {objective}: a model that sees the next token has nothing to predict"
    if objective == "block" and direction == "dw_jrt":
        return "another direction, since objective.name is block: a seed has seen the blocks that are to come"
    return None


LAYER_PATTERN = re.compile(r"(bidirectional|causal)|(block_causal|window):([1-9][0-9]*)")
"""What an entry of model.layer_patterns may be."""


def layer_patterns_refusal(patterns: Sequence[str] | None, direction: str, layers: int) -> str | None:
    """What is expected of model.layer_patterns in a model of that `direction`; None where nothing is wrong."""
    if patterns is None:
        return None
    if not 0 < len(patterns) <= layers:
        return f"expected from 1 to {layers} entries, the number of layers"
    for text in patterns:
        if LAYER_PATTERN.fullmatch(text) is None:
            return f"expected bidirectional, causal, block_causal:N or window:N, which {text} is not"
        if direction == "causal" and text != "causal" and not text.startswith("window"):
            return (
                f"expected causal and window:N alone, since the direction is causal: a layer that is {text} would show "
                "what follows a token, or says nothing here"
            )
    return None


def annealing_refusal(backbone: str, direction: str, patterns: Sequence[str] | None = None) -> str | None:
    """Why objective.attention_annealing is refused, in words that follow "expected null,"; None where it runs.

    It is a key of the objectives of masked diffusion alone.
    """
    if backbone != "qwen3":
        return f"since model.backbone is {backbone}: a scan cannot see some of the later tokens, only attention can"
    if direction != "bidirectional":
        return f"since model.direction is {direction}: attention would stay so"
    if patterns and set(patterns) == {"causal"}:
        return "since model.layer_patterns is causal in all layers: attention would stay so"
    return None


def table() -> str:
    """The whole table as text: a line for each backbone and direction, a column for each objective."""
    width = max(len(f"{backbone} {direction}") for backbone in DIRECTIONS for direction in DIRECTIONS[backbone])
    lines = [" " * width + "".join(f"{name:>9}" for name in OBJECTIVES)]
    reasons: dict[str, None] = {}
    for backbone, directions in DIRECTIONS.items():
        for direction in directions:
            found = [refusal(objective, backbone, direction) for objective in OBJECTIVES]
            cells = "".join(f"{'yes' if reason is None else 'no':>9}" for reason in found)
            lines.append(f"{backbone} {direction}".ljust(width) + cells)
            reasons |= {
                f"{name} on {backbone} {direction}: expected {reason}": None
                for name, reason in zip(OBJECTIVES, found, strict=True)
                if reason is not None
            }
    annealed = [
        f"{backbone} {direction}"
        for backbone, directions in DIRECTIONS.items()
        for direction in directions
        if annealing_refusal(backbone, direction) is None
    ]
    where = f"objective.attention_annealing: {', '.join(MASKED)} on {', '.join(annealed)} only"
    return "\n".join([*lines, "", *reasons, where])
