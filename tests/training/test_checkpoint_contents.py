"""`dlm checkpoint diff` and `export` on real checkpoints of several layouts."""

import json

import pytest
import torch

from dlm_dist import models
from dlm_dist.training import zero_state
from dlm_dist.training.checkpoint_contents import Contents, differences
from launcher import cli
from tests.training.conftest import run_steps, save_checkpoint, tiny_engine


def save(engine, folder, step, **state):
    state = {"global_step": step, "identity": {"run.seed": 1}} | state
    return save_checkpoint(engine, folder, state, {"tokenizer.json": b"{}"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two steps of 8-bit AdamW at ZeRO-2, the same at ZeRO-3 in several sub-groups, and one step more."""
    folder = tmp_path_factory.mktemp("contents")
    settings = ("optimizer.name=adamw8bit", "train.precision=bf16")
    engine, _ = tiny_engine("zero.stage=2", *settings)
    run_steps(engine, 0, 2)
    found = {"two": save(engine, folder, 2)}
    masters = {piece.name: None for shard in zero_state.shards(engine) for piece in shard.pieces}
    for shard in zero_state.shards(engine):
        for piece in shard.pieces:
            masters[piece.name] = shard.flat[piece.offset : piece.offset + piece.numel].clone()
    found["masters"] = masters
    run_steps(engine, 2, 1)
    found["three"] = save(engine, folder, 3, identity={"run.seed": 2})
    other, _ = tiny_engine("zero.stage=3", "deepspeed.zero_optimization.sub_group_size=2000", *settings)
    run_steps(other, 0, 2)
    found["sub-groups"] = save(other, folder / "stage-3", 2)
    return found


def test_masters_come_by_parameter_whatever_layout(saved):
    contents = Contents(saved["two"])
    assert contents.shapes.keys() == saved["masters"].keys()
    for name, master in saved["masters"].items():
        assert torch.equal(contents.read(name, "master").view(-1), master), name
        assert contents.read(name, "master").shape == contents.shapes[name]


def test_a_checkpoint_differs_in_nothing_from_itself(saved, capsys):
    assert list(differences(Contents(saved["two"]), Contents(saved["two"]))) == []
    assert cli.main(["checkpoint", "diff", str(saved["two"]), str(saved["two"])]) == 0
    assert capsys.readouterr().out.startswith("0 values of the state and 0 of ")


def test_what_one_step_changes_is_told(saved, capsys):
    assert cli.main(["checkpoint", "diff", str(saved["two"]), str(saved["three"]), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["equal"]
    assert {"key": "identity.run.seed", "a": 1, "b": 2} in found["keys"]
    assert {tensor["what"] for tensor in found["tensors"]} == {"weight", "master", "state1", "state2"}
    before, after = Contents(saved["two"]), Contents(saved["three"])
    for tensor in found["tensors"]:
        if tensor["what"] == "master":
            change = (
                (before.read(tensor["parameter"], "master") - after.read(tensor["parameter"], "master")).abs().max()
            )
            assert tensor["largest"] == change.item() > 0


def test_layouts_are_no_difference(saved):
    """Equal numbers in other shards: only 8-bit states may differ, by where their blocks of 256 begin."""
    found = list(differences(Contents(saved["two"]), Contents(saved["sub-groups"])))
    assert {one.what for one in found} <= {"weight", "master", "state1", "state2"}
    assert all(one.largest is not None and one.largest < 1e-3 for one in found)


@pytest.mark.parametrize("options", [[], ["--weights", "master"]])
def test_an_exported_model_loads(saved, tmp_path, options, capsys):
    out = tmp_path / "out"
    assert cli.main(["checkpoint", "export", str(saved["two"]), str(out), *options]) == 0
    model = models.load(out)
    assert (out / "tokenizer" / "tokenizer.json").is_file()
    assert (out / "tokenizer.json").is_file()
    assert model.dtype == (torch.float32 if options else torch.bfloat16)
    for name, parameter in model.named_parameters():
        master = saved["masters"][name].view(parameter.shape)
        assert torch.equal(parameter, master if options else master.bfloat16()), name
    assert cli.main(["checkpoint", "export", str(saved["two"]), str(out), *options]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_neither_compared_nor_exported(saved, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(saved["two"], tmp_path / "step-2")
    (copy / "model" / "config.json").write_text("{}")
    for arguments in (["diff", str(saved["two"]), str(copy)], ["export", str(copy), str(tmp_path / "out")]):
        assert cli.main(["checkpoint", *arguments]) == 2
        assert "is no whole checkpoint: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
