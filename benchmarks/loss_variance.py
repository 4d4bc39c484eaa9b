"""The spread of the loss of a batch of 8 rows: our draws of times and masks beside independent Bernoulli draws (LLaDA).

    python -m benchmarks.loss_variance [--checkpoint DIR --data DIR] [--groups 64] [--draws 8] [--output FILE]

analytic: a model whose loss depends on the share of hidden tokens alone, rows of 64 tokens.
trained:  a model on held-out text. Without --checkpoint a Qwen3 of four layers and width 128 is trained on characters
          of Shakespeare first (600 steps of 2,048 tokens, minutes on a core); the text is found through the
          environment variable DLM_DIST_DATA (default: ../shared/data), in shakespeare/tiny_shakespeare.txt.

Each of G groups of 8 rows is drawn D times, once in each of D epochs, as batches of training draw them. The spread due
to the noise is that of the D losses of a group, pooled over the groups; that of a training curve has the differences
between groups in it as well. All variants estimate the same bound, so their means must agree.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import directions
from benchmarks.machine import describe
from data_pipeline.rows import Rows
from data_pipeline.source import Source
from dlm_dist.diffusion.base import NoisyBatch, Vocabulary
from dlm_dist.diffusion.masked import MaskedDiffusion
from dlm_dist.training.metrics import json_line

BATCH = 8
RUN = Path("runs/loss_variance/run")
STEPS = 600
VARIANTS: dict[str, dict[str, str]] = {
    "exact counts, stratified times (default)": {},
    "exact counts, independent times": {"times": "independent"},
    "Bernoulli masks, stratified times": {"masking": "bernoulli"},
    "Bernoulli masks, independent times (LLaDA)": {"masking": "bernoulli", "times": "independent"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train where nothing is given, measure, print tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="RUN/checkpoints/step-N of a masked objective")
    parser.add_argument("--data", type=Path, help="data set of held-out rows for it")
    parser.add_argument("--groups", type=int, default=64, help="groups of 8 held-out rows (default 64)")
    parser.add_argument("--draws", type=int, default=8, help="batches drawn of each group (default 8)")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) != (options.data is None):
        parser.error("--checkpoint and --data belong together")
    try:
        checkpoint, data = (options.checkpoint, options.data) if options.checkpoint else trained_here()
        real = trained(checkpoint, data, options.groups, options.draws)
    except (ValueError, OSError) as error:
        print(f"loss_variance: {error}", file=sys.stderr)
        return 2
    result = {
        "benchmark": "loss_variance",
        "machine": describe(torch.device("cpu")),
        "batch": BATCH,
        "groups": options.groups,
        "draws": options.draws,
        "analytic": analytic(options.groups, options.draws),
        "trained": real,
    }
    for name in ("analytic", "trained"):
        print(table(name, result[name]))
    print(line := json_line(result))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(line + "\n", encoding="utf-8")
    return 0


# --- the two models --------------------------------------------------------------------------------------------


def analytic(groups: int, draws: int, length: int = 64) -> dict[str, Any]:
    """A hidden token costs 0.3 + 4 (k / length)^2 nats where k of them are hidden."""
    mask_id = 1
    cost = 0.3 + 4.0 * (np.arange(length + 1) / length) ** 2

    def loss(batch: NoisyBatch) -> float:
        hidden = (batch.inputs == mask_id).sum(axis=1)
        return float((batch.weights.astype(np.float64) * cost[hidden][:, None]).sum() / batch.denominator)

    tokens = np.zeros((groups * BATCH, length), dtype=np.int64)
    return {
        "sequence_length": length,
        "truth": float(cost[1:].mean()),
        "variants": compare(loss, tokens, draws, Vocabulary(mask_id, eos_id=0)),
    }


@torch.no_grad()
def trained(checkpoint: Path, data: Path, groups: int, draws: int) -> dict[str, Any]:
    """The model of `checkpoint` on the first rows of `data`. Raises ValueError where there are not enough."""
    from dlm_dist import models
    from dlm_dist.diffusion.model_inputs import model_inputs

    source, cpu = opened(data, groups), torch.device("cpu")
    model: Any = models.load(checkpoint, torch.float32)
    model.eval()

    def loss(batch: NoisyBatch) -> float:
        return float(model(**model_inputs(batch, cpu))) / batch.denominator

    tokens = source.read(np.arange(groups * BATCH)).tokens
    return {
        "checkpoint": str(checkpoint),
        "data": str(data),
        "model": f"{model.config.model_type}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "sequence_length": source.sequence_length,
        "variants": compare(loss, tokens, draws, Vocabulary(source.mask_id, source.eos_id)),
    }


def opened(data: Path, groups: int) -> Source:
    """The rows of a data set. ValueError where there are not enough."""
    from data_pipeline.sources import open_source

    source = open_source(data)
    if source.num_rows < groups * BATCH:
        raise ValueError(f"{data} has {source.num_rows} rows, and {groups} groups need {groups * BATCH}: --groups less")
    return source


def trained_here() -> tuple[Path, Path]:
    """(checkpoint, held-out rows) of a small model of characters, trained where it is not there yet."""
    os.chdir(directions.ROOT)
    directions.build_data("compute")
    checkpoint = RUN / "checkpoints" / f"step-{STEPS}"
    if not checkpoint.exists():
        command = [sys.executable, "launcher/pretrain.py", "--config", str(directions.EXPERIMENTS["compute"].config)]
        command += ["--resume", "auto", f"run.dir={RUN}", "model.backbone=qwen3", "model.direction=bidirectional"]
        command += ["model.head_size=null", "model.num_attention_heads=4", "model.head_dim=32", "train.precision=fp32"]
        command += [f"train.max_steps={STEPS}", "train.eval_every=250", "train.eval_rows=256", "train.device=cpu"]
        command += ["train.cpu_threads=1", "optimizer.schedule=constant", "optimizer.decay_steps=null"]
        subprocess.run(command, check=True)
    return checkpoint, directions.RUNS / "compute" / "data" / "validation"


# --- the comparison --------------------------------------------------------------------------------------------


def compare(
    loss: Callable[[NoisyBatch], float], tokens: NDArray[np.integer], draws: int, vocabulary: Vocabulary
) -> dict[str, dict[str, float]]:
    """What `spread` finds for every variant, on the rows `tokens` [groups * 8, T], and its noise over the default's."""
    groups = tokens.reshape(-1, BATCH, tokens.shape[1])
    found: dict[str, dict[str, float]] = {}
    for name, settings in VARIANTS.items():
        objective = MaskedDiffusion(seed=11, vocabulary=vocabulary, **settings)
        losses = np.array(
            [
                [loss(objective.corrupt(as_rows(rows, draw * len(groups) + group))) for draw in range(draws)]
                for group, rows in enumerate(groups)
            ]
        )
        found[name] = spread(losses)
        first = next(iter(found.values()))
        error = math.hypot(*(one["noise_error"] / one["noise_std"] for one in (first, found[name])))
        ratio = found[name]["noise_std"] / first["noise_std"]
        found[name] |= {"ratio": ratio, "ratio_error": ratio * error if found[name] is not first else 0.0}
    return found


def as_rows(tokens: NDArray[np.integer], batch: int) -> Rows:
    """Rows [8, T] as the batch number `batch` of training."""
    zeros = np.zeros(len(tokens), dtype=np.int64)
    positions = np.arange(batch * BATCH, (batch + 1) * BATCH)
    return Rows(tokens, np.zeros(tokens.shape, dtype=np.int32), positions, zeros, zeros)


def spread(losses: NDArray[np.float64]) -> dict[str, float]:
    """Mean, spread within groups (with its standard error) and over all, of the losses [groups, draws] of batches."""
    groups, draws = losses.shape
    within = losses.var(axis=1, ddof=1)
    noise = float(within.mean())
    between = max(0.0, float(losses.mean(axis=1).var(ddof=1)) - noise / draws)
    return {
        "mean": float(losses.mean()),
        "mean_error": math.sqrt(noise / losses.size),
        "noise_std": math.sqrt(noise),
        "noise_error": float(within.std(ddof=1)) / math.sqrt(groups) / (2.0 * math.sqrt(noise)),
        "curve_std": math.sqrt(noise + between),
    }


def table(name: str, result: Mapping[str, Any]) -> str:
    """The variants of one model, a line each."""
    lines = [f"{name}, rows of {result['sequence_length']} tokens, batches of {BATCH}; nats per token"]
    lines.append(f"  {'':<44}{'mean':>17}{'std, same rows':>20}{'times':>13}{'std, curve':>13}")
    for variant, found in result["variants"].items():
        lines.append(
            f"  {variant:<44}{found['mean']:>8.4f} +- {found['mean_error']:.4f}"
            f"{found['noise_std']:>10.4f} +- {found['noise_error']:.4f}"
            f"{found['ratio']:>6.2f} +- {found['ratio_error']:.2f}{found['curve_std']:>11.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
