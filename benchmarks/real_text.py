"""Train configs/{rwkv7,qwen3}-real-text.yaml on PEPs and wikitext-2 and report the held-out bound before and after.

    python benchmarks/real_text.py [--output FILE]

The text is found through the environment variable DLM_DIST_DATA (default: ../shared/data): a folder with
peps/peps.jsonl and wikitext-2/valid.txt. Rows of 256 RWKV World tokens, 2 % of the documents held out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402 - the repository is found first

DATA = Path("runs/real_text/data")


def main() -> int:
    """Build, train both, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    parser.add_argument("--num-gpus", type=int, default=2, help="ranks (default 2)")
    parser.add_argument("--only", choices=("rwkv7", "qwen3"), help="train only one of the two")
    options = parser.parse_args()
    os.chdir(ROOT)
    text = Path(os.environ.get("DLM_DIST_DATA", "../shared/data"))
    inputs = [text / "peps" / "peps.jsonl", text / "wikitext-2" / "valid.txt"]
    for path in inputs:
        if not path.exists():
            print(f"real_text: {path} is missing: set DLM_DIST_DATA to a folder that holds it", file=sys.stderr)
            return 2
    build = [sys.executable, "-m", "launcher.cli", "data", "build", "--tokenizer", "rwkv-world"]
    build += ["--sequence-length", "256", "--validation-fraction", "0.02", "--output", str(DATA)]
    # Articles of wikitext begin with a line "= Title ="; sections have more signs.
    build += ["--split-text-at", r"(?m)^ = [^=]", "--input", *map(str, inputs)]
    subprocess.run(build, check=True)
    results = [run(backbone, options.num_gpus) for backbone in ("rwkv7", "qwen3") if options.only in (None, backbone)]
    report(results, options.output)
    return 0


def run(backbone: str, ranks: int) -> dict[str, Any]:
    """Train one configuration from the start and collect its numbers."""
    folder = Path("runs/real_text") / backbone
    shutil.rmtree(folder, ignore_errors=True)
    launcher = Path(sysconfig.get_path("scripts")) / "deepspeed"
    command = [str(launcher), "--num_gpus", str(ranks), "launcher/pretrain.py"]
    subprocess.run([*command, "--config", f"configs/{backbone}-real-text.yaml"], check=True)
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    start = json.loads((folder / "manifest.json").read_text())["starts"][-1]
    rates = sorted(step["tokens_per_second"] for step in steps[5:])
    parameters = {group["role"]: group["parameters"] for group in start["parameter_groups"]}
    return {
        "backbone": backbone,
        "parameters": sum(parameters.values()),
        "parameters_without_embedding_and_head": sum(parameters.values())
        - parameters["embedding"]
        - parameters.get("head", 0),
        "steps": len(steps),
        "tokens": steps[-1]["data_pos"] * 256,
        "bound_at_start": evaluations[0]["bound_nats_per_token"],
        "bound_at_end": evaluations[-1]["bound_nats_per_token"],
        "standard_error_at_end": evaluations[-1]["standard_error"],
        "bits_per_byte_at_end": evaluations[-1]["bits_per_byte"],
        "evaluations": {str(e["step"]): e["bound_nats_per_token"] for e in evaluations},
        "tokens_per_second_median": statistics.median(rates),
        "tokens_per_second_10_to_90_percent": [rates[len(rates) // 10], rates[-1 - len(rates) // 10]],
        "mfu_median": statistics.median(step["mfu"] for step in steps[5:]),
        "ranks": start["topology"]["world_size"],
    }


def report(results: list[dict[str, Any]], output: Path | None) -> None:
    """The table, and everything as one JSON line."""
    print(f"{'':8}{'params (body)':>16}{'steps':>7}{'bound start':>13}{'bound end':>18}{'bits/byte':>11}{'tok/s':>9}")
    for r in results:
        print(
            f"{r['backbone']:8}{r['parameters_without_embedding_and_head']:>16,}{r['steps']:>7}"
            f"{r['bound_at_start']:>13.3f}{r['bound_at_end']:>10.3f} +- {r['standard_error_at_end']:.3f}"
            f"{r['bits_per_byte_at_end']:>11.3f}{r['tokens_per_second_median']:>9,.0f}"
        )
    line = json.dumps(
        {
            "benchmark": "real_text",
            "machine": describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "results": results,
        }
    )
    print(line)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
