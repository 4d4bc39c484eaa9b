"""The pictures of docs/objectives.md, drawn by the code that trains: schedules, hidden sets, and who sees whom.

    python -m benchmarks.objective_pictures [--output docs/pictures]

Needs matplotlib. The same commit draws the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.rows import Rows
from dlm_dist.diffusion.base import NoisyBatch, Vocabulary
from dlm_dist.diffusion.objectives import OBJECTIVES
from dlm_dist.diffusion.schedules import SCHEDULES, make_schedule
from dlm_dist.models.visibility import LayerPattern, Visibility, turn_blocks

MASK, EOS, LENGTH, SAMPLES = 100, 0, 48, 12
_COLOURS = ["#f4f4f4", "#1f4e79", "#e07b00", "#9db8d2"]
_LEGEND = ["shown", "hidden and scored", "another token, scored", "not shown, not scored"]

PATTERNS: dict[str, tuple[str, dict[str, Any]]] = {
    "mdlm (exact)": ("mdlm", {}),
    "masking: bernoulli": ("mdlm", {"masking": "bernoulli"}),
    "t_min 0.3, t_max 0.8": ("mdlm", {"t_min": 0.3, "t_max": 0.8}),
    "mask_contiguous_region_prob: 1": ("mdlm", {"mask_contiguous_region_prob": 1.0}),
    "two_segment_prob: 1": ("mdlm", {"two_segment_prob": 1.0}),
    "one_block_length: 8": ("mdlm", {"one_block_length": 8}),
    "complementary_prob: 1 (pairs)": ("mdlm", {"draws_per_row": 2, "complementary_prob": 1.0}),
    "protected_tokens: [eos]": ("mdlm", {"protected_tokens": ("eos",)}),
    "noise_type: random_replace": ("mdlm", {"noise_type": "random_replace"}),
    "token_to_token_rate: 0.2": ("mdlm", {"token_to_token_rate": 0.2}),
    "random_length_prob: 1": ("mdlm", {"random_length_prob": 1.0}),
    "block, lengths of 8": ("block", {"block_lengths": ((0, 8),)}),
    "card": ("card", {}),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/objectives.md.")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"), metavar="DIR")
    folder = parser.parse_args(arguments).output
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        save(draw(), folder / f"{name}.svg")
        print(folder / f"{name}.svg")
    return 0


def save(figure: Any, path: Path) -> None:
    """Write the figure without date and with ids that do not change from run to run."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "dlm_dist", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def rows(count: int) -> Rows:
    """Rows of 48 tokens in which every eighth is an end of text."""
    tokens = np.tile(np.where(np.arange(LENGTH) % 8 == 7, EOS, 1 + np.arange(LENGTH)), (count, 1))
    zeros = np.zeros(count, dtype=np.int64)
    return Rows(tokens, np.zeros(tokens.shape, np.int32), np.arange(count), zeros, zeros)


def pattern(name: str, settings: dict[str, Any]) -> NDArray[np.int64]:
    """[12, 48] what became of each token, an index into `_LEGEND`; samples by rising time where they are not pairs."""
    vocabulary = Vocabulary(MASK, EOS, np.ones(MASK, dtype=np.int64), MASK)
    count = SAMPLES // settings.get("draws_per_row", 1)
    batch: NoisyBatch = OBJECTIVES[name](seed=3, vocabulary=vocabulary, **settings).corrupt(rows(count))
    targets = batch.targets
    masked = batch.inputs == MASK
    scored = batch.weights > 0
    if name == "card":  # read one place later, scored everywhere
        masked = np.concatenate([masked[:, 1:], np.zeros_like(masked[:, :1])], axis=1)
        kinds = np.where(masked, 1, 0)
    else:
        replaced = scored & (batch.inputs != targets) & ~masked
        kinds = np.select([masked & scored, replaced, masked], [1, 2, 3], 0)
    if "draws_per_row" in settings:
        return kinds
    return kinds[np.argsort(batch.times, kind="stable")]


def draw_schedules() -> Any:
    """Share of hidden tokens, and how likely each share is, for every schedule with its default parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    shares, densities = figure.subplots(1, 2)
    t = np.linspace(0.0, 1.0, 201)
    for name in SCHEDULES:
        parameters = {"points": [0.0, 0.1, 0.7, 1.0]} if name == "table" else {}
        schedule = make_schedule(name, **parameters)
        shares.plot(t, schedule.rate(t), label=name)
        edges = np.linspace(0.0, 1.0, 51)
        densities.stairs(np.diff(schedule.inverse(edges)) * 50, edges, label=name)
    shares.set(xlabel="time t", ylabel="share of hidden tokens, rate(t)")
    densities.set(xlabel="share of hidden tokens", ylabel="how often it is trained on (density)", ylim=(0.0, 4.0))
    shares.legend(fontsize=8)
    for axes in (shares, densities):
        axes.grid(alpha=0.3)
    return figure


def draw_patterns() -> Any:
    """Twelve samples of each way to hide tokens, by rising time."""
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = 3
    figure = Figure(figsize=(11, 7), layout="constrained")
    grid = figure.subplots(-(-len(PATTERNS) // columns), columns).reshape(-1)
    norm = BoundaryNorm(np.arange(len(_COLOURS) + 1) - 0.5, len(_COLOURS))
    for axes in grid:
        axes.set_axis_off()
    for axes, (title, (name, settings)) in zip(grid, PATTERNS.items(), strict=False):
        axes.imshow(pattern(name, settings), cmap=ListedColormap(_COLOURS), norm=norm, interpolation="none")
        axes.set_title(title, fontsize=9)
    patches = [
        Patch(facecolor=colour, edgecolor="grey", label=label) for colour, label in zip(_COLOURS, _LEGEND, strict=True)
    ]
    figure.legend(handles=patches, loc="lower right", fontsize=9)
    return figure


def visibilities() -> dict[str, Visibility]:
    """Rows of 16 tokens: two documents of 10 and 6, blocks of 4, a prompt of 3 before each answer."""
    cpu = torch.device("cpu")
    documents = torch.tensor([[0] * 10 + [1] * 6])
    blocks = (torch.arange(16) // 4)[None]
    prompt = (torch.arange(16) < 3)[None]
    chat = prompt | ((torch.arange(16) >= 9) & (torch.arange(16) < 12))[None]
    plain = Visibility(1, 16, cpu)
    annealing = torch.tensor([1]), torch.tensor([2]), torch.tensor([2**32 // 3])
    return {
        "bidirectional": Visibility(1, 16, cpu),
        "causal": Visibility(1, 16, cpu, causal=True),
        "documents apart": Visibility(1, 16, cpu, document_ids=documents),
        "causal, documents apart": Visibility(1, 16, cpu, document_ids=documents, causal=True),
        "blocks": Visibility(1, 16, cpu, block_ids=blocks),
        "prompt, answer in blocks": Visibility(1, 16, cpu, block_ids=turn_blocks(prompt, 4)),
        "prompt_and_own_block": Visibility(1, 16, cpu, block_ids=turn_blocks(prompt, 4), prompt_and_own_block=True),
        "chat of four turns": Visibility(1, 16, cpu, block_ids=turn_blocks(chat)),
        "chat, answers in blocks of 2": Visibility(1, 16, cpu, block_ids=turn_blocks(chat, 2)),
        "layer window:3": plain.in_layer(LayerPattern.parse("window:3")),
        "layer block_causal:4, documents apart": Visibility(1, 16, cpu, documents).in_layer(
            LayerPattern.parse("block_causal:4")
        ),
        "annealing, a third of the way": replace(plain, annealing=annealing),
        "block: noisy beside clean": Visibility(1, 16, cpu, block_ids=blocks, two_streams=True),
        "the same, documents apart": Visibility(1, 16, cpu, documents, blocks, two_streams=True),
    }


def draw_visibility() -> Any:
    """Who sees whom: a row for each token that looks, a column for each that is looked at."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    columns, shown = 5, visibilities()
    figure = Figure(figsize=(13, 2.8 * -(-len(shown) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(shown) // columns), columns).reshape(-1)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes, (title, visibility) in zip(grid, shown.items(), strict=False):
        axes.imshow(visibility.dense()[0, 0].numpy(), cmap=ListedColormap(_COLOURS[:2]), vmin=0, vmax=1)
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        if visibility.two_streams:
            axes.axhline(15.5, color=_COLOURS[2], linewidth=1)
            axes.axvline(15.5, color=_COLOURS[2], linewidth=1)
    return figure


PICTURES: dict[str, Callable[[], Any]] = {
    "schedules": draw_schedules,
    "hidden-tokens": draw_patterns,
    "visibility": draw_visibility,
}


if __name__ == "__main__":
    sys.exit(main())
