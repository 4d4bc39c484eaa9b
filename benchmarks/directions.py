"""The seed experiment (DW-JRT against a plain causal scan), and every direction of RWKV-7 at equal compute.

    python -m benchmarks.directions characters|gpt2|compute [--seeds 0 1 2] [--jobs 1] [--output FILE] [--plot FILE]

characters: the small overfit of rwkvdllm's README: with and without DW-JRT at scale 20, 200 steps.
gpt2:       its larger comparison: GPT-2 ids in a vocabulary of 50,304, read from llm.c files, 1,000 steps.
compute:    causal against every other direction, the steps of each arm cut so that all spend the same FLOPs.

Fixed before any run: the metric is the bound on held-out rows after the last step, in nats per token, with the same
frozen noise for every arm and seed. An arm is compared with the causal one by the mean over seeds of the
difference at equal seed (same rows, same masks), with its 95 % interval (Student's t). An arm is called better or
worse only where the interval does not hold 0. Finished runs are not run again; one that was stopped goes on.

The text is found through the environment variable DLM_DIST_DATA (default: ../shared/data): a folder with
shakespeare/tiny_shakespeare.txt, for gpt2 peps/peps.jsonl and tok_gpt2/.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import paired_runs
from benchmarks.machine import describe
from benchmarks.paired_runs import evaluations, interval, metrics, span
from dlm_dist.training.metrics import json_line

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs/directions")

SEED_ARMS = {
    "causal": [],
    "dw_jrt seed, scale 20": ["model.direction=dw_jrt", "model.dw_jrt_scale=20"],
}
COMPUTE_ARMS = {
    "causal": [],
    "bidirectional, tied": ["model.direction=bidirectional", "model.tie_directions=true"],
    "bidirectional, separate": ["model.direction=bidirectional"],
    "alternate": ["model.direction=alternate"],
    "dw_jrt seed": ["model.direction=dw_jrt"],
    "dw_jrt seed, gated": ["model.direction=dw_jrt", "model.dw_jrt_gate=true"],
    "dw_jrt inject": ["model.direction=dw_jrt", "model.dw_jrt_variant=inject"],
}


@dataclass(frozen=True)
class Experiment:
    """One comparison: its configuration, its arms (the first is the baseline), and whether FLOPs are made equal."""

    config: Path
    arms: dict[str, list[str]]
    equal_compute: bool = False


EXPERIMENTS = {
    "characters": Experiment(Path("configs/seed-characters.yaml"), SEED_ARMS),
    "gpt2": Experiment(Path("configs/seed-gpt2.yaml"), SEED_ARMS),
    "compute": Experiment(Path("configs/directions-characters.yaml"), COMPUTE_ARMS, equal_compute=True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the data, run what is missing, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")
    parser.add_argument("--arms", nargs="+", help="only these arms beside the baseline")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file (.svg, .png); needs matplotlib")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to every run")
    options = parser.parse_intermixed_args(arguments)
    os.chdir(ROOT)
    experiment = EXPERIMENTS[options.experiment]
    names = [name for i, name in enumerate(experiment.arms) if i == 0 or options.arms is None or name in options.arms]
    try:
        build_data(options.experiment)
        plans = [plan_arm(experiment, name, options.overrides) for name in names]
    except ValueError as error:
        print(f"directions: {error}", file=sys.stderr)
        return 2
    for plan in plans:
        plan["flops_ratio"] = plan["flops"] / plans[0]["flops"]
    jobs = [(plan, seed) for seed in options.seeds for plan in plans]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda job: train(options.experiment, experiment, *job, threads), jobs))
    except ValueError as error:
        print(f"directions: {error}", file=sys.stderr)
        return 2
    result = summary(options.experiment, plans, options.seeds)
    print(table(result))
    if options.plot is not None:
        draw(result, options.plot)
    print(line := json_line(result))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(line + "\n", encoding="utf-8")
    return 0


# --- data ------------------------------------------------------------------------------------------------------


def build_data(name: str) -> None:
    """The data sets of an experiment, where they are not there yet. ValueError where the text is missing."""
    text = Path(os.environ.get("DLM_DIST_DATA", "../shared/data"))
    folder = RUNS / name
    options = {
        # A speech begins with its speaker in capitals and a colon.
        "characters": ("shakespeare/tiny_shakespeare.txt", "characters", 64, 0.1),
        "compute": ("shakespeare/tiny_shakespeare.txt", "characters", 128, 0.1),
        "gpt2": ("peps/peps.jsonl", str(text / "tok_gpt2"), 128, 0.05),
    }
    source, tokenizer, length, held_out = options[name]
    for path in (text / source, *([Path(tokenizer)] if name == "gpt2" else [])):
        if not path.exists():
            raise ValueError(f"{path} is missing: set DLM_DIST_DATA to a folder that holds it")
    build = ["data", "build", "--input", str(text / source), "--tokenizer", tokenizer, "--sequence-length", str(length)]
    build += ["--validation-fraction", str(held_out), "--output", str(folder / "data")]
    if name != "gpt2":
        build += ["--split-text-at", r"(?m)^(?=[A-Z][^\n]*:$)"]
    _dlm(build)
    if name == "gpt2":
        for split in ("train", "validation"):
            if not (folder / f"{split}.bin").exists():
                export = ["data", "export", str(folder / "data" / split), "--to", "llmc"]
                _dlm([*export, "--output", str(folder / split)])


def _dlm(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "launcher.cli", *arguments], check=True)


# --- runs ------------------------------------------------------------------------------------------------------


def plan_arm(experiment: Experiment, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What an arm runs: its overrides, steps, and model FLOPs. At equal compute the first arm's FLOPs are the measure.

    FLOPs are those of training on masked rows, half of whose tokens reach the head in the mean.
    """
    config, step_flops = _flops_per_step(experiment, [*experiment.arms[name], *overrides])
    steps = config.train.max_steps
    arm = [*experiment.arms[name], *overrides]
    if experiment.equal_compute:
        _, baseline = _flops_per_step(experiment, [*next(iter(experiment.arms.values())), *overrides])
        share = baseline / step_flops
        steps = round(config.train.max_steps * share)
        decay = max(1, round(config.optimizer.decay_steps * share))
        every = max(1, round(config.train.eval_every * share))
        arm += [f"train.max_steps={steps}", f"optimizer.decay_steps={decay}", f"train.eval_every={every}"]
    return {"arm": name, "overrides": arm, "steps": steps, "flops": steps * step_flops}


def _flops_per_step(experiment: Experiment, overrides: Sequence[str]) -> tuple[Any, float]:
    from dlm_dist import models
    from dlm_dist.config import load_config
    from dlm_dist.training.sources import open_sources
    from dlm_dist.training.starting_model import resolve_sizes

    config = load_config(experiment.config, overrides)
    (source,) = open_sources(config)
    config = resolve_sizes(config, source)
    described = models.configuration(config.model.backbone, mask_token_id=source.mask_id, **config.model.sizes())
    model: Any = models.skeleton(described)
    tokens = config.train.global_batch_size * source.sequence_length
    return config, 3.0 * tokens * (model.flops_per_token(source.sequence_length) + 0.5 * model.head_flops_per_row())


def run_folder(name: str, arm: str, seed: int) -> Path:
    """Where one run lives."""
    return RUNS / name / f"{arm.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def train(name: str, experiment: Experiment, plan: dict[str, Any], seed: int, threads: int) -> None:
    """Make one run of a plan, unless it is there."""
    folder = run_folder(name, plan["arm"], seed)
    paired_runs.train(experiment.config, folder, seed, plan["overrides"], plan["steps"], threads)


# --- outcome ---------------------------------------------------------------------------------------------------


def summary(name: str, plans: list[dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Curves, final bounds, and differences from the baseline with their intervals."""
    import torch

    arms = []
    for plan in plans:
        curves = [evaluations(run_folder(name, plan["arm"], seed)) for seed in seeds]
        records = [metrics(run_folder(name, plan["arm"], seed)) for seed in seeds]
        assert all(curve[-1]["step"] == plan["steps"] for curve in curves)
        final = [curve[-1]["bound_nats_per_token"] for curve in curves]
        arms.append(
            plan
            | {
                "final_bound": final,
                "mean": statistics.fmean(final),
                "standard_error_of_one_evaluation": curves[0][-1]["standard_error"],
                "train_loss_last_50": [statistics.fmean(m["loss"] for m in steps[-50:]) for steps in records],
                "curves": [{e["step"]: e["bound_nats_per_token"] for e in curve} for curve in curves],
            }
        )
    for arm in arms[1:]:
        arm["difference"] = interval([a - b for a, b in zip(arm["final_bound"], arms[0]["final_bound"], strict=True)])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"benchmark": f"directions {name}", "seeds": list(seeds), "machine": describe(device), "arms": arms}


def table(result: dict[str, Any]) -> str:
    """One line an arm."""
    lines = [f"{'arm':<26}{'steps':>7}{'FLOPs':>8}{'train loss':>12}{'held-out bound':>16}   difference from causal"]
    for arm in result["arms"]:
        line = f"{arm['arm']:<26}{arm['steps']:>7}{arm['flops_ratio']:>8.3f}"
        line += f"{statistics.fmean(arm['train_loss_last_50']):>12.4f}{arm['mean']:>16.4f}"
        if "difference" in arm:
            line += f"   {span(arm['difference'])}"
        lines.append(line)
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Held-out bound over the share of the compute, a line for the mean of each arm and a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(result["arms"]):
        color = f"C{number}"
        steps = sorted({int(step) for curve in arm["curves"] for step in curve} - {0})
        shares = [step / arm["steps"] * arm["flops_ratio"] for step in steps]
        rows = [[curve[step] for curve in arm["curves"]] for step in steps]
        axes.plot(shares, [statistics.fmean(row) for row in rows], color=color, label=arm["arm"])
        for share, row in zip(shares, rows, strict=True):
            axes.plot([share] * len(row), row, ".", color=color, markersize=4)
    axes.set_xlabel("compute, relative to the causal arm")
    axes.set_ylabel("held-out bound (nats per token)")
    axes.set_title(f"{result['benchmark']}, {len(result['seeds'])} seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
