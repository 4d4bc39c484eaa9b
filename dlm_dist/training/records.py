"""What a start of a run leaves behind for people: config.yaml, manifest.json, and the first lines of its log."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dlm_dist.config import BatchPlan, RunConfig, to_yaml

_PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes", "flash-linear-attention", "triton", "numpy")


@dataclass(frozen=True)
class StartRecord:
    """One start of a run, as it goes into manifest.json."""

    command: list[str]
    world_size: int
    plan: BatchPlan
    parameter_groups: list[dict[str, Any]]
    """What each role trains with (optimizers.group_table)."""
    max_steps: int
    """Steps of the whole run; of train.max_epochs what follows from the data."""
    gemm_peak_flops: float
    """Measured FLOP/s of all ranks together, the base of MFU."""
    resumed_from: Path | None = None
    conversion: dict[str, Any] | None = None
    """Topologies from and to, and the counts of checkpoint.Loaded, where another layout wrote the checkpoint."""
    wkv7_backend: dict[str, Any] | None = None
    attention: dict[str, str] | None = None
    """What computes attention where a mask is needed, and why (models.attention.Choice)."""
    init_from: Mapping[str, list[str]] | None = None
    """The report of models.warm_start."""
    fallbacks: list[str] = field(default_factory=list)
    """What runs in place of something faster or better, and why."""
    notes: list[str] = field(default_factory=list)
    """What else the user should know and may not expect: checkpoints passed over or set aside."""

    def write(self, config: RunConfig) -> None:
        """config.yaml as this start uses it, and one more entry of manifest.json."""
        folder = config.run.dir
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text()) if path.exists() else {"starts": []}
        manifest["starts"].append(self._entry(config))
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        os.replace(temporary, path)

    def _entry(self, config: RunConfig) -> dict[str, Any]:
        return {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": self.command,
            "commit": git_commit(),
            "versions": versions(),
            "host": platform.node(),
            "resumed_from": str(self.resumed_from) if self.resumed_from is not None else None,
            "conversion": self.conversion,
            "topology": {
                "world_size": self.world_size,
                "zero_stage": config.zero.stage,
                "micro_batch_size": self.plan.micro_batch_size,
                "gradient_accumulation_steps": self.plan.gradient_accumulation_steps,
                "torch_threads": torch.get_num_threads(),
            },
            "max_steps": self.max_steps,
            "parameter_groups": self.parameter_groups,
            "wkv7_backend": self.wkv7_backend,
            "attention": self.attention,
            "fallbacks": self.fallbacks,
            "notes": self.notes,
            "init_from": self.init_from,
            "gemm_peak_flops": self.gemm_peak_flops,
        }

    def headline(self, config: RunConfig) -> str:
        """What runs, in a few lines."""
        total = sum(group["parameters"] for group in self.parameter_groups)
        model, plan = config.model, self.plan
        lines = [
            f"{model.backbone} {model.direction}, {total:,} parameters, {config.train.precision}, "
            f"ZeRO-{config.zero.stage}, {config.optimizer.name}; {self.world_size} ranks x {plan.micro_batch_size} "
            f"rows x {plan.gradient_accumulation_steps} = {plan.global_batch_size} rows of "
            f"{config.data.sequence_length} tokens",
        ]
        if plan.ramp:
            phases = ", ".join(f"{size} before sample {end:,}" for end, size in plan.ramp)
            lines.append(f"  at the start steps of fewer or more rows: {phases}")
        for group in self.parameter_groups:
            decay = f"decay {group['weight_decay']:g}" if group["weight_decay"] else "no decay"
            lines.append(
                f"  {group['role']:<10} {group['tensors']:>5} tensors {group['parameters']:>14,} parameters  "
                f"lr {group['lr']:g}  {decay}  {group['optimizer_bits']}-bit states"
            )
            names = ", ".join(group["names"])
            lines.append(textwrap.fill(names, 116, initial_indent="    ", subsequent_indent="    "))
        if self.init_from is not None:
            lines.append(f"weights from {model.init_from}: {len(self.init_from['matched'])} tensors matched")
            lines += [
                f"  {kind} ({len(self.init_from[kind])}): {', '.join(self.init_from[kind])}"
                for kind in ("resized", "skipped", "unused")
                if self.init_from[kind]
            ]
        lines += [f"warning: {fallback}" for fallback in self.fallbacks]
        lines += [f"note: {note}" for note in self.notes]
        if self.resumed_from is not None:
            lines.append(f"resuming from {self.resumed_from}")
        return "\n".join(lines)


def versions() -> dict[str, str | None]:
    """Versions of python and the packages that decide results; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit() -> str | None:
    """The commit of this code, "+changes" if the tree is not clean; None outside a git checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
