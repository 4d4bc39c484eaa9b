"""`dlm checkpoint`: lists what is there, finds every damage, and needs no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dlm_dist.training import checkpoint_files, durable_files
from launcher import cli

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = {
    "trainer_state.json": b"",
    "model/config.json": b"{}",
    "model/model.safetensors": bytes(range(256)) * 40,
    "tensors/rank-00000.safetensors": b"masters",
}


def publish(checkpoints: Path, step: int, masters: bytes = b"masters") -> Path:
    """A published checkpoint with a real manifest; its tensors are any bytes."""
    state = {
        "global_step": step,
        "data_pos": 8 * step,
        "epoch": step // 10,
        "optimizer": "adamw8bit",
        "topology": {"world_size": 2, "zero_stage": 3, "precision": "bf16"},
    }
    staging = checkpoints / ".staging"
    contents = FILES | {"trainer_state.json": json.dumps(state).encode(), "tensors/rank-00000.safetensors": masters}
    written = durable_files.write_files(staging, {name: [memoryview(text)] for name, text in contents.items()})
    checkpoint_files.publish(written, staging, checkpoints / f"step-{step}")
    return checkpoints / f"step-{step}"


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "manifest.json").write_text("{}")  # every run has one; it makes no checkpoint of the run
    (tmp_path / "run" / "config.yaml").write_text("{}")
    for step in (9, 100, 20):
        publish(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


@pytest.fixture
def dlm(capsys, monkeypatch):
    """dlm(arguments) -> (status, standard output, standard error)."""
    monkeypatch.delenv("DLM_DEBUG", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return call


@pytest.mark.parametrize("place", [".", "checkpoints"])
def test_list_shows_the_steps_in_order(dlm, run, place):
    status, out, _ = dlm("checkpoint", "list", run / place)
    header, *rows = [line.split() for line in out.splitlines()]
    assert status == 0
    assert header == ["step", "date", "size", "epoch", "data_pos", "ranks", "ZeRO", "precision", "optimizer"]
    assert [row[0] for row in rows] == ["9", "20", "100"]
    assert rows[1][3:5] == ["10.4", "kB"]
    assert rows[1][5:] == ["2", "160", "2", "3", "bf16", "adamw8bit"]


def test_list_as_json(dlm, run):
    status, out, _ = dlm("checkpoint", "list", run, "--json")
    first = json.loads(out)["checkpoints"][0]
    assert status == 0
    size = sum(file.stat().st_size for file in (run / "checkpoints" / "step-9").rglob("*") if file.is_file())
    assert first["bytes"] == size - (run / "checkpoints" / "step-9" / "manifest.json").stat().st_size
    assert (first["step"], first["data_pos"], first["zero_stage"], first["problem"]) == (9, 72, 3, None)


def test_list_marks_what_is_no_checkpoint(dlm, run):
    (run / "checkpoints" / "step-20" / "manifest.json").unlink()
    (run / "checkpoints" / "step-100" / "trainer_state.json").write_text("{")
    status, out, _ = dlm("checkpoint", "list", run)
    lines = out.splitlines()
    assert status == 0
    assert "no manifest: not a checkpoint" in lines[2]
    assert "damaged" in lines[3]


def test_list_of_a_run_that_has_saved_nothing(dlm, run):
    shutil.rmtree(run / "checkpoints")
    assert dlm("checkpoint", "list", run) == (0, f"{run} has no checkpoints\n", "")
    assert json.loads(dlm("checkpoint", "list", run, "--json")[1]) == {"checkpoints": []}


def test_verify_reads_one_or_all(dlm, run):
    status, out, _ = dlm("checkpoint", "verify", run / "checkpoints" / "step-20")
    assert (status, len(out.splitlines())) == (0, 1)
    assert "step-20: whole, 4 files, 10.4 kB" in out
    status, out, _ = dlm("checkpoint", "verify", run)
    assert status == 0
    assert [line.partition(":")[0][-8:] for line in out.splitlines()] == ["s/step-9", "/step-20", "step-100"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_verify_names_every_damaged_file(dlm, run, name, harm):
    file = run / "checkpoints" / "step-100" / name
    harm(file)
    status, out, _ = dlm("checkpoint", "verify", run)
    lines = out.splitlines()
    assert status == 1
    assert [": whole, " in line for line in lines] == [True, True, False]
    assert str(file) in lines[2]
    status, out, _ = dlm("checkpoint", "verify", run / "checkpoints" / "step-100", "--json")
    (report,) = json.loads(out)["checkpoints"]
    assert status == 1
    assert len(report["problems"]) == 1


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format_version": 1, "files": {}}', '{"format_version": 1, "files": 3}']
)
def test_verify_does_not_believe_a_damaged_manifest(dlm, run, text):
    manifest = run / "checkpoints" / "step-9" / "manifest.json"
    manifest.write_text(text)
    status, out, _ = dlm("checkpoint", "verify", run / "checkpoints" / "step-9")
    assert status == 1
    assert f"{manifest} is damaged" in out
    assert len(out.splitlines()) == 1


def test_another_format_is_told(dlm, run):
    manifest = run / "checkpoints" / "step-9" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 7'))
    assert "has format 7, this version reads 1" in dlm("checkpoint", "verify", run)[1]


def test_a_large_checkpoint_shows_how_far_it_is(dlm, run, monkeypatch):
    from launcher import checkpoint_commands

    monkeypatch.setattr(checkpoint_commands, "_LARGE_BYTES", 1)
    status, _, err = dlm("checkpoint", "verify", run / "checkpoints" / "step-9")
    assert status == 0
    assert "(100 %)" in err


@pytest.mark.parametrize("command", ["list", "verify"])
def test_a_wrong_path_is_one_sentence(dlm, run, command):
    status, out, err = dlm("checkpoint", command, run / "nothing")
    assert (status, out) == (2, "")
    assert err.startswith(f"dlm: error: {run / 'nothing'}: there is no such folder")
    status, _, err = dlm("checkpoint", command, run.parent)
    assert status == 2
    assert "neither a run nor a checkpoint" in err


def test_verify_of_nothing_is_no_success(dlm, run):
    shutil.rmtree(run / "checkpoints")
    status, _, err = dlm("checkpoint", "verify", run)
    assert status == 2
    assert "has no checkpoints: nothing to verify" in err


def test_it_needs_no_torch(run):
    program = (
        "import sys; from launcher import cli; status = cli.main(['checkpoint', 'verify', sys.argv[1]]); "
        "print([m for m in ('torch', 'numpy', 'deepspeed', 'pydantic') if m in sys.modules]); sys.exit(status)"
    )
    command = [sys.executable, "-c", program, str(run)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
