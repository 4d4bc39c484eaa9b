import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dlm_dist import models
from dlm_dist.training import checkpoint, checkpoint_files, durable_files, optimizers, safetensors_files, zero_state
from dlm_dist.training.checkpoint_contents import Contents, differences
from dlm_dist.training.checkpoint_files import CheckpointError
from dlm_dist.training.safetensors_files import safetensors_buffers
from tests.training.conftest import SIZES, run_steps, save_checkpoint, tiny_engine

STATE = {"global_step": 2, "data_pos": 16}


def save(engine, folder, step=2):
    return save_checkpoint(engine, folder, STATE | {"global_step": step}, {"tokenizer.json": b"{}"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    engine, _ = tiny_engine("zero.stage=2", "optimizer.name=adamw8bit")
    run_steps(engine, 0, 2)
    return save(engine, tmp_path_factory.mktemp("run") / "checkpoints")


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints" / saved.name)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit"])
def test_a_loaded_engine_goes_on_to_the_bit(stage, precision, optimizer, tmp_path):
    settings = (f"zero.stage={stage}", f"train.precision={precision}", f"optimizer.name={optimizer}")
    engine, _ = tiny_engine(*settings)
    run_steps(engine, 0, 2)
    path = save(engine, tmp_path)
    expected = run_steps(engine, 2, 3)
    loaded, _ = tiny_engine(*settings, model=models.load(path, dtype=torch.float32))
    checkpoint.load_shards(loaded, path)
    assert run_steps(loaded, 2, 3) == expected
    for one, other in zip(zero_state.shards(engine), zero_state.shards(loaded), strict=True):
        assert torch.equal(one.flat, other.flat)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_engine_that_went_on_is_put_back_to_the_bit(stage, precision, tmp_path):
    """Also to its start, where the optimizer had no state yet."""
    engine, _ = tiny_engine(f"zero.stage={stage}", f"train.precision={precision}", "optimizer.name=adamw8bit")
    start = save(engine, tmp_path, step=0)
    first = run_steps(engine, 0, 2)
    second = save(engine, tmp_path, step=2)
    expected = run_steps(engine, 2, 3)
    checkpoint.put_back(engine, second)
    assert run_steps(engine, 2, 3) == expected
    checkpoint.put_back(engine, start)
    assert run_steps(engine, 0, 2) == first
    assert run_steps(engine, 2, 3) == expected


def test_several_stage_3_sub_groups(tmp_path):
    settings = ("zero.stage=3", "optimizer.name=adamw8bit", "deepspeed.zero_optimization.sub_group_size=2000")
    engine, _ = tiny_engine(*settings)
    assert len(zero_state.shards(engine)) > 4
    run_steps(engine, 0, 2)
    path = save(engine, tmp_path)
    expected = run_steps(engine, 2, 2)
    loaded, _ = tiny_engine(*settings, model=models.load(path, dtype=torch.float32))
    checkpoint.load_shards(loaded, path)
    assert run_steps(loaded, 2, 2) == expected


def test_what_a_checkpoint_holds(saved):
    names = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert names == {
        "manifest.json",
        "trainer_state.json",
        "model/config.json",
        "model/model.safetensors",
        "tensors/rank-00000.json",
        "tensors/rank-00000.safetensors",
        "tokenizer/tokenizer.json",
    }
    assert set(json.loads((saved / "manifest.json").read_text())["files"]) == names - {"manifest.json"}
    assert checkpoint_files.verify(saved) == []
    assert checkpoint_files.load_trainer_state(saved) == STATE


def test_a_model_in_several_files_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "MODEL_FILE_BYTES", 10_000)
    engine, _ = tiny_engine("zero.stage=3")
    path = save(engine, tmp_path)
    assert len(list((path / "model").glob("*.safetensors"))) > 2
    loaded = models.load(path)
    for name, parameter in tiny_engine("zero.stage=0")[0].module.named_parameters():
        assert torch.equal(loaded.state_dict()[name], parameter)


@pytest.mark.parametrize("loaded_as", ["zero.stage=2", "zero.stage=3"])
def test_states_in_several_files_come_back(loaded_as, tmp_path, monkeypatch):
    """Large ones are hashed in several threads; a layout reads the files of another like its own."""
    monkeypatch.setattr(safetensors_files, "STATE_FILE_BYTES", 10_000)
    engine, _ = tiny_engine("zero.stage=2")
    run_steps(engine, 0, 2)
    path = save(engine, tmp_path)
    assert len(list((path / "tensors").glob("rank-00000*.safetensors"))) > 2
    assert checkpoint_files.verify(path) == []
    other, _ = tiny_engine(loaded_as)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.zero_()
    checkpoint.put_back(other, path)
    again = save(other, tmp_path, step=3)
    assert list(differences(Contents(path), Contents(again))) == []


def test_safetensors_files_are_what_the_library_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "codes": torch.arange(256, dtype=torch.uint8),
        "step": torch.tensor(4.0),
        "empty": torch.empty(0, 3),
        "long": torch.arange(6).view(2, 3),
    }
    written = durable_files.write_files(tmp_path, {"x.safetensors": safetensors_buffers(tensors)})
    assert written["x.safetensors"]["size"] == (tmp_path / "x.safetensors").stat().st_size
    assert written["x.safetensors"]["sha256"] == durable_files.file_sha256(tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


FILES = [
    "trainer_state.json",
    "model/config.json",
    "model/model.safetensors",
    "tensors/rank-00000.safetensors",
    "tensors/rank-00000.json",
    "tokenizer/tokenizer.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap bytes"])
def test_any_damage_is_found_and_named(copy, name, damage):
    file = copy / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "swap bytes":
        file.write_bytes(content[::-1])
    else:
        file.unlink()
    problems = checkpoint_files.verify(copy)
    assert len(problems) == 1
    assert name in problems[0]
    with pytest.raises(CheckpointError, match=r"cannot resume from .*step-2"):
        checkpoint.find_resumable(copy.parent, str(copy))


def test_a_checkpoint_without_manifest_does_not_exist(copy):
    (copy / "manifest.json").unlink()
    assert checkpoint_files.list_checkpoints(copy.parent) == []
    assert "manifest.json" in checkpoint_files.verify(copy)[0]


def test_a_manifest_that_was_lost_is_told_unless_a_deletion_took_it(saved, tmp_path):
    """Saves bring their manifest along and deletions begin at the oldest: a newest one without is damaged."""
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        shutil.copytree(saved, folder / f"step-{step}")
    (folder / "step-2" / "manifest.json").unlink()
    assert checkpoint.find_resumable(folder, "auto") == (folder / "step-6", [])
    (folder / "step-6" / "manifest.json").unlink()
    path, passed_over = checkpoint.find_resumable(folder, "auto")
    assert path == folder / "step-4"
    assert len(passed_over) == 1
    assert "step-6/manifest.json is missing" in passed_over[0]
    (folder / "step-4" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* verifies \(.*step-6/manifest.json is missing"):
        checkpoint.find_resumable(folder, "auto")


@pytest.mark.parametrize("at", [0, 0.1, 0.3, 0.5, 0.7, 0.9, 1])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_any_damage_to_the_manifest_is_found(copy, at, damage):
    content = bytearray((copy / "manifest.json").read_bytes())
    place = int(at * (len(content) - 1))
    content[place] ^= 1
    (copy / "manifest.json").write_bytes(content if damage == "flip" else content[:place])
    assert checkpoint_files.verify(copy)


OUTSIDE = ["../../secret", "/etc/passwd", "model/../../secret", "model//x", "./x", ".", "manifest.json", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_cannot_point_outside(copy, name):
    """Not even at a file that is there and has the size and hash that it says."""
    (copy.parent / "secret").write_bytes(b"1")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "sha256": durable_files.file_sha256(copy.parent / "secret")}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = checkpoint_files.verify(copy)
    assert f"names {name!r}, which is outside" in problem
    with pytest.raises(CheckpointError, match="outside"):
        checkpoint.find_resumable(copy.parent, str(copy))


@pytest.mark.parametrize("name", ["model/model.safetensors", "tensors/rank-00000.json", "trainer_state.json", "model"])
def test_no_file_of_a_checkpoint_is_a_link(copy, name):
    """The same bytes behind a link are somebody else's to change."""
    elsewhere = copy.parent / "elsewhere"
    (copy / name).rename(elsewhere)
    (copy / name).symlink_to(elsewhere)
    problems = checkpoint_files.verify(copy)
    assert problems
    assert all("is a link, or behind one" in problem for problem in problems)


def test_a_checkpoint_behind_a_link_is_one(copy, tmp_path):
    (tmp_path / "scratch").symlink_to(copy.parent)
    assert checkpoint_files.verify(tmp_path / "scratch" / copy.name) == []


@pytest.mark.parametrize("name", ["model/adapter_config.json", "tokenizer/code.py", "tensors/rank-00001.json"])
def test_nothing_is_slipped_in_where_files_are_read_by_name(copy, name):
    (copy / name).write_text("{}")
    (copy / "model" / ".nfs123").write_text("hidden files are nobody's")
    (copy / "notes.txt").write_text("neither is what lies beside")
    assert checkpoint_files.verify(copy) == [f"{copy / name} is not named in the manifest"]


@pytest.mark.parametrize(
    "shard", ["../../../weights.safetensors", "/weights.safetensors", "other.safetensors", 3, None]
)
def test_an_index_names_only_files_of_the_checkpoint(copy, shard):
    """With a manifest that fits it: as if someone had made the whole folder."""
    content = {"weight_map": {"x": "model.safetensors", "y": shard}} if shard is not None else {}
    index = copy / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    manifest = json.loads((copy / "manifest.json").read_text())
    entry = {"size": index.stat().st_size, "sha256": durable_files.file_sha256(index)}
    manifest["files"]["model/model.safetensors.index.json"] = entry
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = checkpoint_files.verify(copy)
    assert "which is no file of the checkpoint" in problem


@pytest.mark.parametrize("place", [".", "model"])
def test_commands_read_a_checkpoint_only_if_it_is_whole(copy, place):
    checkpoint_files.require_whole(copy / place)
    file = copy / "model" / "config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"step-2 is damaged: .*config.json has"):
        checkpoint_files.require_whole(copy / place)
    (copy / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-2 is damaged: .*manifest.json is missing"):
        checkpoint_files.require_whole(copy / place)
    checkpoint_files.require_whole(copy.parent)


def test_auto_falls_back_to_the_newest_that_verifies(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (2, 10, 9):
        shutil.copytree(saved, folder / f"step-{step}")
    (folder / "step-10" / "trainer_state.json").write_text("{}")
    path, passed_over = checkpoint.find_resumable(folder, "auto")
    assert path == folder / "step-9"
    assert len(passed_over) == 1
    assert "step-10" in passed_over[0]
    for step in (2, 9):
        (folder / f"step-{step}" / "model" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.find_resumable(folder, "auto")


def test_retention_keeps_the_newest_and_sweeps_what_kills_left(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 10):
        shutil.copytree(saved, folder / f"step-{step}")
    (folder / ".step-12.writing").mkdir()
    checkpoint_files.retain(folder, 2)
    checkpoint_files.sweep(folder)
    assert [path.name for path in checkpoint_files.list_checkpoints(folder)] == ["step-4", "step-10"]
    assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-4"]


def test_retention_keeps_every_so_many_steps(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (50, 100, 150, 200, 250, 300):
        shutil.copytree(saved, folder / f"step-{step}")
    checkpoint_files.retain(folder, 2, keep_every=100)
    assert [path.name for path in checkpoint_files.list_checkpoints(folder)] == [
        "step-100",
        "step-200",
        "step-250",
        "step-300",
    ]
    checkpoint_files.retain(folder, None)
    assert len(list(folder.iterdir())) == 4


def test_retention_never_deletes_the_last_good_one(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (2, 4):
        shutil.copytree(saved, folder / f"step-{step}")
    (folder / "step-4" / "model" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"step-4.*model.safetensors is missing"):
        checkpoint_files.retain(folder, 1)
    assert checkpoint_files.verify(folder / "step-2") == []


def test_setting_aside_keeps_what_it_moves_and_never_overwrites(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    for _ in range(2):
        for step in (2, 4, 10):
            if not (folder / f"step-{step}").exists():
                shutil.copytree(saved, folder / f"step-{step}")
        (folder / "step-10" / "manifest.json").unlink()
        moved = checkpoint_files.set_aside(folder, after=2)
        assert len(moved) == 2
    assert sorted(path.name for path in folder.iterdir()) == [
        "set-aside-10",
        "set-aside-10.2",
        "set-aside-4",
        "set-aside-4.2",
        "step-2",
    ]
    checkpoint_files.retain(folder, 1)
    assert len(list(folder.iterdir())) == 5


def test_the_config_says_what_the_file_holds_after_a_resume_too(saved, tmp_path):
    engine, _ = tiny_engine("optimizer.name=adamw8bit", model=models.load(saved, dtype=torch.float32))
    checkpoint.load_shards(engine, saved)
    again = save(engine, tmp_path)
    assert models.load(again).dtype == models.load(saved).dtype == torch.bfloat16
    # To the byte: where it was resumed from is no property of the model.
    assert (again / "model" / "config.json").read_bytes() == (saved / "model" / "config.json").read_bytes()


def test_a_full_disk_is_reported_and_harms_nothing(tmp_path, monkeypatch):
    engine, _ = tiny_engine("zero.stage=1")
    first = save(engine, tmp_path, step=2)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(CheckpointError, match=r"step-4 could not be written: rank 0: .*No space left"):
        save(engine, tmp_path, step=4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    assert checkpoint_files.verify(first) == []


def test_the_ranks_share_the_hashing_by_size(tmp_path):
    """Every file is hashed by one of them, and none of them gets all that are large."""
    staging = tmp_path / ".staging"
    sizes = {f"tensors/rank-{rank:05d}.{end}": size for rank in range(4) for end, size in (("json", 9), ("bin", 9000))}
    sizes["trainer_state.json"] = 20
    checkpoint_files.make_staging(staging)
    written = durable_files.write_files(staging, {name: [memoryview(bytes(size))] for name, size in sizes.items()})
    checkpoint_files.publish(written, staging, tmp_path / "step-1")
    read = []
    for rank in range(3):
        parts: list[int] = []
        assert checkpoint_files.verify(tmp_path / "step-1", (rank, 3), advance=parts.append) == []
        read.append(sum(parts))
    assert sum(read) == sum(sizes.values())
    assert max(read) < 2.1 * 9000
    damaged = tmp_path / "step-1/tensors/rank-00002.bin"
    damaged.write_bytes(b"x" * 9000)
    found = [checkpoint_files.verify(tmp_path / "step-1", (rank, 3)) for rank in range(3)]
    assert sorted(found) == [[], [], [f"{damaged} does not have its recorded SHA-256"]]


@pytest.mark.parametrize("stage", [2, 3])
def test_other_bits_of_a_role_are_refused(saved, stage, monkeypatch):
    monkeypatch.setattr(optimizers, "ROLE_RULES", {**optimizers.ROLE_RULES, "matrix": optimizers.RoleRule(decays=True)})
    engine, _ = tiny_engine(f"zero.stage={stage}", "optimizer.name=adamw8bit")
    with pytest.raises(CheckpointError, match=r"8-bit optimizer states of .*q_proj.weight, which has 32-bit states"):
        checkpoint.load_shards(engine, saved)


def test_another_model_is_refused(saved):
    sizes = {**SIZES, "num_hidden_layers": 1}
    engine, _ = tiny_engine("zero.stage=2", model=models.build("qwen3", seed=0, **sizes))
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.1\..*, which is no trained parameter"):
        checkpoint.load_shards(engine, saved)
