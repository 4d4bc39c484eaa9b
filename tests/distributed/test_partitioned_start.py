"""At ZeRO-3 a model is born in parts: its parts, masters and buffers are those of the whole model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import runs

pytestmark = pytest.mark.distributed

WORLD = 2
REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = """
import sys
import torch
import deepspeed
from dlm_dist.config import load_config, resolve_batch
from dlm_dist.training import zero_state
from dlm_dist.training.distributed import start_distributed
from dlm_dist.training.engine import build_engine
from dlm_dist.training.starting_model import starting_model

start_distributed("cpu")
found = {}
for backbone, extra in (("rwkv7", ["model.head_size=16"]), ("qwen3", ["model.num_attention_heads=2"])):
    for precision in ("bf16", "fp32"):
        config = load_config(None, [
            "run.dir=unused", "run.seed=7", f"model.backbone={backbone}", "model.hidden_size=48",
            "model.num_hidden_layers=2", "model.vocab_size=99", *extra, "data.train.0.path=unused", "zero.stage=3",
            f"train.precision={precision}", "train.max_steps=3", "train.global_batch_size=2",
            "train.micro_batch_size=1",
        ])
        plan = resolve_batch(config.train, 2)
        start = starting_model(config, plan, mask_token_id=98)
        sizes = [p.numel() for p in start.model.parameters()]
        roles = start.model.parameter_roles()
        engine, table = build_engine(start.model, config, plan, start.unrounded)
        values = {}
        for name, parameter in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                values[name] = parameter.detach().clone()
        pieces = [
            (piece.name, piece.start, shard.flat[piece.offset : piece.offset + piece.numel].clone())
            for shard in zero_state.shards(engine) for piece in shard.pieces
        ]
        buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
        found[backbone, precision] = sizes, values, pieces, buffers, roles, table
torch.save(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("partitioned")
    shared = os.environ | {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(WORLD), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(runs.free_port()), "WORLD_SIZE": str(WORLD)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder / f"{rank}.pt")],
            cwd=REPOSITORY,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * WORLD, "\n".join(text[-3000:] for text in outputs)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("backbone", ["rwkv7", "qwen3"])
def test_a_model_born_in_parts_holds_the_initial_values(found: list[dict], backbone: str, precision: str) -> None:
    from dlm_dist.models import build

    extra = {"head_size": 16} if backbone == "rwkv7" else {"num_attention_heads": 2, "head_dim": 128}
    sizes = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2, "mask_token_id": 98, **extra}
    if backbone == "rwkv7":
        sizes["tie_directions"] = False
    whole = build(backbone, seed=7, direction="bidirectional", **sizes)
    want = dict(whole.named_parameters())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    covered = dict.fromkeys(want, 0)
    for rank in range(WORLD):
        numbers, values, pieces, buffers, roles, table = found[rank][backbone, precision]
        assert not any(numbers), "no rank held whole parameters of its own"
        assert roles == whole.parameter_roles()
        assert {row["role"] for row in table} == set(roles.values())
        assert sum(row["parameters"] for row in table) == sum(p.numel() for p in whole.parameters())
        assert set(values) == set(want)
        for name, value in values.items():
            assert torch.equal(value, want[name].to(dtype)), name
        for name, first, master in pieces:
            assert torch.equal(master, want[name].detach().flatten()[first : first + len(master)]), name
            covered[name] += len(master)
        assert {name: b.dtype for name, b in buffers.items()} == {n: b.dtype for n, b in whole.named_buffers()}
        assert all(torch.equal(buffers[name], b) for name, b in whole.named_buffers())
    assert covered == {name: p.numel() for name, p in want.items()}
