"""8-bit against 32-bit optimizer states on real text: held-out bound by seed, and what the states take.

    python -m benchmarks.optimizer_bits [--seeds 0 1 2] [--threads 1] [--output FILE]

Trains configs/optimizer-bits.yaml with AdamW, AdamW8bit, Lion and Lion8bit on bytes of PEPs and wikitext-2. Fixed
before any run: the metric is the bound on held-out rows after the last step, in nats per token (here a byte), with
the same frozen noise for every arm and seed. An 8-bit arm is compared with its 32-bit form by the mean over seeds of
the difference at equal seed (same rows, masks, initial values), with its 95 % interval (Student's t); it is called
better or worse only where the interval does not hold 0. Bytes per parameter are counted in the states themselves, as
the last checkpoint of each run holds them: codes, scales and code books. Finished runs are not run again.

The text is found through the environment variable DLM_DIST_DATA (default: ../shared/data): a folder with
peps/peps.jsonl and wikitext-2/valid.txt. Nothing stands in for it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import paired_runs
from benchmarks.machine import describe
from dlm_dist.training.metrics import json_line

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs/optimizer-bits")
CONFIG = Path("configs/optimizer-bits.yaml")

# Lion's rate and decay as its paper advises: AdamW's rate over 5, AdamW's decay times 5.
_LION = ["optimizer.lr=4e-4", "optimizer.weight_decay=0.5"]
ARMS = {
    "adamw": ["optimizer.name=adamw"],
    "adamw8bit": ["optimizer.name=adamw8bit"],
    "lion": ["optimizer.name=lion", *_LION],
    "lion8bit": ["optimizer.name=lion8bit", *_LION],
}
IN_32_BITS = {"adamw8bit": "adamw", "lion8bit": "lion"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the data, run what is missing, print two tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="torch threads of a run")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to every run")
    options = parser.parse_intermixed_args(arguments)
    os.chdir(ROOT)
    try:
        build_data()
        for seed in options.seeds:
            for arm, changes in ARMS.items():
                train_arm(arm, seed, [*changes, *options.overrides], options.threads)
    except ValueError as error:
        print(f"optimizer_bits: {error}", file=sys.stderr)
        return 2
    result = summary(options.seeds)
    print(table(result))
    print(line := json_line(result))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(line + "\n", encoding="utf-8")
    return 0


def build_data() -> None:
    """The data set of all runs, where it is not there yet. ValueError where the text is missing."""
    text = Path(os.environ.get("DLM_DIST_DATA", "../shared/data"))
    inputs = [text / "peps" / "peps.jsonl", text / "wikitext-2" / "valid.txt"]
    for path in inputs:
        if not path.exists():
            raise ValueError(f"{path} is missing: set DLM_DIST_DATA to a folder that holds it")
    build = [sys.executable, "-m", "launcher.cli", "data", "build", "--tokenizer", "bytes", "--sequence-length", "128"]
    # Articles of wikitext begin with a line "= Title ="; sections have more signs.
    build += ["--validation-fraction", "0.02", "--split-text-at", r"(?m)^ = [^=]", "--output", str(RUNS / "data")]
    subprocess.run([*build, "--input", *map(str, inputs)], check=True)


def run_folder(arm: str, seed: int) -> Path:
    """Where one run lives."""
    return RUNS / f"{arm}-seed{seed}"


def train_arm(arm: str, seed: int, overrides: Sequence[str], threads: int) -> None:
    """Make one run, unless it is there."""
    from dlm_dist.config import load_config

    steps = load_config(CONFIG, overrides).train.max_steps
    assert steps is not None
    paired_runs.train(CONFIG, run_folder(arm, seed), seed, overrides, steps, threads)


def state_sizes(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """By role: parameters, bytes of their optimizer states, and the types that these have, counted in a checkpoint."""
    from safetensors import safe_open

    from dlm_dist import models

    roles = models.skeleton(models.read_config(checkpoint)).parameter_roles()
    sizes: dict[str, dict[str, Any]] = {}
    for index in sorted((checkpoint / "tensors").glob("*.json")):
        with safe_open(index.with_suffix(".safetensors"), framework="pt") as file:
            for shard in json.loads(index.read_bytes()):
                (role,) = {roles[name] for name, *_ in shard["pieces"]}
                size = sizes.setdefault(role, {"parameters": 0, "state_bytes": 0, "types": []})
                size["parameters"] += sum(numel for *_, numel in shard["pieces"])
                for name in shard["tensors"]:
                    tensor = file.get_tensor(f"{shard['key']}/{name}")
                    size["state_bytes"] += tensor.numel() * tensor.element_size()
                    if name.startswith(("state", "exp_avg")):
                        size["types"] = sorted({*size["types"], str(tensor.dtype).removeprefix("torch.")})
    for size in sizes.values():
        size["bytes_per_parameter"] = size["state_bytes"] / size["parameters"]
    return sizes


def summary(seeds: Sequence[int]) -> dict[str, Any]:
    """Final bounds, differences of 8 from 32 bits with their intervals, and state sizes by role."""
    import torch

    arms: dict[str, Any] = {}
    for arm in ARMS:
        folders = [run_folder(arm, seed) for seed in seeds]
        curves = [paired_runs.evaluations(folder) for folder in folders]
        steps = [paired_runs.metrics(folder) for folder in folders]
        final = [curve[-1]["bound_nats_per_token"] for curve in curves]
        arms[arm] = {
            "steps": len(steps[0]),
            "final_bound": final,
            "mean": statistics.fmean(final),
            "deviation_over_seeds": statistics.stdev(final) if len(final) > 1 else None,
            "standard_error_of_one_evaluation": curves[0][-1]["standard_error"],
            "bits_per_byte": [curve[-1]["bits_per_byte"] for curve in curves],
            "train_loss_last_100": [statistics.fmean(step["loss"] for step in run[-100:]) for run in steps],
            "rows_sha256": [run[-1]["rows_sha256"] for run in steps],
            "noise_sha256": [run[-1]["noise_sha256"] for run in steps],
            "curves": [{e["step"]: e["bound_nats_per_token"] for e in curve} for curve in curves],
            "states": state_sizes(folders[0] / "checkpoints" / f"step-{len(steps[0])}"),
        }
    for arm, other in IN_32_BITS.items():
        assert all(arms[arm][key] == arms[other][key] for key in ("steps", "rows_sha256", "noise_sha256"))
        pairs = zip(arms[arm]["final_bound"], arms[other]["final_bound"], strict=True)
        arms[arm]["difference"] = paired_runs.interval([a - b for a, b in pairs])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"benchmark": "optimizer_bits", "seeds": list(seeds), "machine": describe(device), "arms": arms}


def table(result: dict[str, Any]) -> str:
    """One line an arm, then one line a role."""
    lines = [
        f"{'arm':<12}{'steps':>6}{'train loss':>12}{'held-out bound':>16}{'over seeds':>12}   difference from 32 bits"
    ]
    for arm, found in result["arms"].items():
        deviation = found["deviation_over_seeds"]
        lines.append(
            f"{arm:<12}{found['steps']:>6}{statistics.fmean(found['train_loss_last_100']):>12.4f}{found['mean']:>16.4f}"
            f"{math.nan if deviation is None else deviation:>12.4f}"
            + (f"   {paired_runs.span(found['difference'])}" if "difference" in found else "")
        )
    lines += ["", f"{'bytes of states per parameter':<32}" + "".join(f"{arm:>12}" for arm in result["arms"])]
    per_arm = [found["states"] for found in result["arms"].values()]
    for role, size in per_arm[0].items():
        cells = "".join(f"{states[role]['bytes_per_parameter']:>12.3f}" for states in per_arm)
        lines.append(f"{role + ' (' + format(size['parameters'], ',') + ')':<32}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
