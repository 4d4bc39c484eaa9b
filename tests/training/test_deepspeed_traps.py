"""Traps of DeepSpeed that no other test closes, and that each line of docs/deepspeed-traps.md has its test."""

import ast
import re
from pathlib import Path

import pytest
import torch

from dlm_dist import models
from dlm_dist.training import checkpoint
from dlm_dist.training.engine import set_learning_rate
from tests.training.conftest import run_steps, tiny_engine
from tests.training.test_elastic import save

REPOSITORY = Path(__file__).resolve().parents[2]


def test_each_trap_has_a_test_that_exists():
    lines = (REPOSITORY / "docs" / "deepspeed-traps.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) > 25
    for row in rows:
        trap, _, test = (cell.strip() for cell in row.strip("|").split(" | "))
        found = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", test)
        assert found, trap
        tree = ast.parse((REPOSITORY / found[1]).read_text(encoding="utf-8"))
        assert found[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_its_checkpoints_getters_and_schedulers_are_not_used():
    """Each has a trap of its own, and a wrapper in which it does something else."""
    refused = re.compile(r"safe_[gs]et_\w+|(load|save)_checkpoint|client_state|lr_scheduler|ds_to_universal|no_sync")
    for package in ("dlm_dist", "launcher"):
        for file in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                name = getattr(node, "attr", getattr(node, "id", getattr(node, "arg", None)))
                assert not (isinstance(name, str) and refused.fullmatch(name)), f"{file}:{node.lineno} uses {name}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_options_of_groups_are_those_of_the_configuration(stage, tmp_path):
    """Rates, decay and betas may change on the way; what the checkpoint was trained with does not come back."""
    before = f"zero.stage={stage}", "optimizer.weight_decay=0.1", "optimizer.betas=[0.9,0.95]"
    engine, _ = tiny_engine(*before)
    run_steps(engine, 0, 1)
    path = save(engine, tmp_path)
    after = f"zero.stage={stage}", "optimizer.weight_decay=0.5", "optimizer.betas=[0.8,0.9]"
    resumed, _ = tiny_engine(*after, model=models.load(path, dtype=torch.float32))
    checkpoint.load_shards(resumed, path)
    set_learning_rate(resumed, 3e-3)
    groups = {group["name"]: group for group in resumed.optimizer.param_groups}
    for name, decay in (("matrix", 0.5), ("embedding", 0.5), ("vector", 0.0)):
        group = groups[name]
        assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (3e-3, decay, (0.8, 0.9))
