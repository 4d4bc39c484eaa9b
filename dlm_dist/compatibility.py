"""Which objective runs on which backbone in which direction, and why the others are refused."""

from __future__ import annotations

OBJECTIVES = ("mdlm", "dllm", "soft_ce", "block", "ar", "card")
DIRECTIONS = {"qwen3": ("causal", "bidirectional"), "rwkv7": ("causal", "bidirectional", "alternate", "dw_jrt")}

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
    return "\n".join([*lines, "", *reasons])
