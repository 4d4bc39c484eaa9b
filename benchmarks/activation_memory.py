"""Peak memory of a training step with and without activation checkpointing (model.gradient_checkpointing).

    python -m benchmarks.activation_memory [--layers 8] [--hidden 256] [--tokens 2048] [--device cpu] [--output FILE]

Each figure is the growth of a fresh process over its weights and gradients, at its highest, in one forward and
backward pass of the diffusion loss in fp32 on one row (RWKV-7 on its own kernel on a CPU). The seconds of the pass
stand beside it. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import PeakMemory, describe, in_fresh_process, timed
from dlm_dist.training.metrics import json_line

VOCABULARY = 512
SIZES: dict[str, dict[str, int]] = {"rwkv7": {"head_size": 64}, "qwen3": {"head_dim": 64}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both backbones, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 64")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args(arguments)
    shape = options.hidden, options.layers, options.tokens
    results = []
    print(f"{'':8}{'checkpointing':>15}{'peak MB':>10}{'s':>8}")
    for backbone in SIZES:
        for checkpointed in (False, True):
            peak, seconds = in_fresh_process(measure, backbone, checkpointed, *shape, options.device)
            results.append(
                {"backbone": backbone, "checkpointing": checkpointed, "peak_bytes": peak, "seconds": seconds}
            )
            print(f"{backbone:8}{'on' if checkpointed else 'off':>15}{peak / 1e6:>10.1f}{seconds:>8.2f}", flush=True)
    result = {"benchmark": "activation_memory", "machine": describe(torch.device(options.device)), "results": results}
    result |= {"hidden_size": options.hidden, "layers": options.layers, "tokens": options.tokens}
    print(line := json_line(result))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(line + "\n", encoding="utf-8")
    return 0


def measure(backbone: str, checkpointed: bool, hidden: int, layers: int, tokens: int, device: str) -> tuple[int, float]:
    """Peak bytes above weights and gradients, and seconds, of one forward and backward pass."""
    from dlm_dist import models

    where = torch.device(device)
    if where.type == "cpu":
        torch.set_num_threads(1)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "mask_token_id": VOCABULARY - 1, "hidden_size": hidden}
    if backbone == "qwen3":
        sizes |= {"num_attention_heads": hidden // 64, "intermediate_size": 3 * hidden}
    model: Any = models.build(backbone, num_hidden_layers=layers, **SIZES[backbone], **sizes).to(where).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    ids = torch.arange(tokens, device=where).view(1, -1) % (VOCABULARY - 1)

    def step() -> None:
        everything = torch.arange(tokens, device=where)
        weights = torch.ones(tokens, device=where)
        (model(input_ids=ids, supervised=everything, targets=ids.view(-1), weights=weights) / tokens).backward()

    ids, row = ids[:, :64], ids
    tokens, length = 64, tokens
    step()  # gradients and the buffers of kernels are there from here on
    ids, tokens = row, length
    with PeakMemory(where) as memory:
        seconds = timed(step, where)
    return memory.bytes, seconds


if __name__ == "__main__":
    sys.exit(main())
