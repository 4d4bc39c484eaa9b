"""Grid files: which runs they hold, under which names, and what is said of bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dlm_dist.runs.sweep import read_sweep
from dlm_dist.settings import ConfigError
from tests.commands import dlm, mistake

CONFIG = {
    "run": {"dir": "unused"},
    "model": {"backbone": "qwen3", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "data": {"train": [{"path": "unused"}]},
    "train": {"max_steps": 10, "global_batch_size": 4, "micro_batch_size": 2},
}


@pytest.fixture
def grid(tmp_path):
    """Writes a grid file; keys as given, `config` the one above."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))

    def write(**keys) -> Path:
        tree = {"config": str(tmp_path / "config.yaml"), "dir": str(tmp_path / "sweep"), **keys}
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(tree))
        return tmp_path / "grid.yaml"

    return write


TWO_BY_THREE = {"optimizer.lr": [3e-4, 1e-3], "run.seed": [0, 1, 2]}


def test_every_combination_is_a_run_of_its_own(grid, tmp_path):
    sweep = read_sweep(grid(grid=TWO_BY_THREE, overrides=["train.max_steps=20"]))
    assert [run.folder.name for run in sweep.runs] == [
        "lr=0.0003,seed=0",
        "lr=0.0003,seed=1",
        "lr=0.0003,seed=2",
        "lr=0.001,seed=0",
        "lr=0.001,seed=1",
        "lr=0.001,seed=2",
    ]
    config = sweep.load(sweep.runs[4])
    assert (config.optimizer.lr, config.run.seed, config.train.max_steps) == (1e-3, 1, 20)
    assert config.run.dir == tmp_path / "sweep" / "lr=0.001,seed=1"


def test_values_of_any_kind_survive_the_way_through_a_command_line(grid):
    path = grid(
        grid={
            "optimizer.betas": [[0.9, 0.95]],
            "optimizer.schedule": ["wsd"],
            "optimizer.decay_steps": [2],
            "train.sample_prompt": ['a "b" = {c}: \u00e9\n'],
            "train.sample_every": [5],
            "train.deterministic": [True],
            "checkpoint.keep_last": [None],
        }
    )
    sweep = read_sweep(path)
    (run,) = sweep.runs
    config = sweep.load(run)
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.train.sample_prompt == 'a "b" = {c}: \u00e9\n'
    assert (config.train.deterministic, config.checkpoint.keep_last) == (True, None)
    assert all(len(override.splitlines()) == 1 for override in run.overrides)
    assert "/" not in run.folder.name
    assert " " not in run.folder.name


def test_keys_of_the_same_last_part_are_told_apart(grid):
    (run,) = read_sweep(grid(grid={"checkpoint.every": [4], "logging.every": [5]})).runs
    assert run.folder.name == "checkpoint.every=4,logging.every=5"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "grid is missing"),
        ({"grid": {}}, "grid is empty: expected full keys, each with a list of values"),
        ({"grid": {"run.seed": 3}}, "grid: run.seed is 3: expected a list of values, [a, b]"),
        ({"grid": {"run.seed": [1, 1]}}, "grid: run.seed is [1, 1]: expected each value once"),
        ({"grid": {"run.dir": ["x"]}}, "grid has run.dir: remove it"),
        ({"grid": {"train.sample_prompt": ["a b", "a-b"]}}, "several combinations would be in the folder"),
        ({"grid": {"run.seed": [1]}, "overides": []}, "overides ([]) is not a key: the nearest valid one is overrides"),
        ({"grid": {"run.seed": [1]}, "overrides": ["a=\n"]}, "overrides holds the end of a line"),
    ],
)
def test_a_bad_grid_is_answered_with_a_sentence(grid, keys, words):
    with pytest.raises(ConfigError) as caught:
        read_sweep(grid(**keys))
    assert words in str(caught.value)


def test_a_grid_file_makes_no_objects(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(f"config: !!python/object/apply:pathlib.Path.touch ['{tmp_path}/made']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_sweep(path)
    assert not (tmp_path / "made").exists()


def test_the_commands(grid, tmp_path, capsys):
    path = grid(grid=TWO_BY_THREE)
    assert dlm("sweep", "arguments", path, 4) == 0
    lines = capsys.readouterr().out.splitlines()
    folder = tmp_path / "sweep" / "lr=0.001,seed=1"
    assert lines == [str(tmp_path / "config.yaml"), "optimizer.lr=0.001", "run.seed=1", f'run.dir="{folder}"']
    folder.mkdir(parents=True)
    (folder / "DONE").touch()
    other = tmp_path / "sweep" / "lr=0.0003,seed=0"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"step": 7}\n')
    assert dlm("sweep", "list", path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["0", "step", "7", "of", "10"]
    assert "not started" in lines[1]
    assert "done" in lines[4]
    assert "--array=0-3,5 slurm/sweep.sbatch" in lines[-1]
    assert dlm("sweep", "list", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [entry["done"] for entry in found] == [False] * 4 + [True, False]
    assert "has 6 runs, 0 to 5, and no 6: submit it with --array=0-5" in mistake(capsys, "sweep", "arguments", path, 6)


def test_a_wrong_key_is_told_before_anything_is_submitted(grid, capsys):
    path = grid(grid={"optimizer.lrr": [1]})
    for arguments in (["list", path], ["arguments", path, 0]):
        words = mistake(capsys, "sweep", *arguments)
        assert "run 0 of" in words
        assert "optimizer.lrr (1) is not a key: the nearest valid one is optimizer.lr" in words
