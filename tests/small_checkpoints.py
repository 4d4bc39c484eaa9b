"""Checkpoints of untrained tiny models, without masters: what commands read that generate and evaluate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.tokenizers import Tokenizer
from dlm_dist import models
from dlm_dist.training import checkpoint_files, durable_files


def publish(final: Path, tokenizer: Tokenizer, identity: Mapping[str, Any], **settings: Any) -> Path:
    """A checkpoint at `final` of a Qwen3 with these settings -> `final`."""
    staging = final.with_name(f".{final.name}.writing")
    sizes = {"vocab_size": tokenizer.padded_vocab_size, "mask_token_id": tokenizer.mask_id, "seed": 1} | settings
    model = models.build("qwen3", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16, **sizes)
    model.save_pretrained(staging / "model")
    tokenizer.save(staging / "tokenizer")
    staging.rename(final)
    write_state(final, {"global_step": 7, "identity": identity})
    return final


def write_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Give `checkpoint` this trainer state, and a manifest that fits."""
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    paths = [path for path in checkpoint.rglob("*") if path.is_file()]
    files = {
        str(path.relative_to(checkpoint)): {"size": path.stat().st_size, "sha256": durable_files.file_sha256(path)}
        for path in paths
    }
    staging = checkpoint.with_name(f".{checkpoint.name}.writing")
    checkpoint.rename(staging)
    checkpoint_files.publish(files, staging, checkpoint)
