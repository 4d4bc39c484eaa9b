"""A damaged file of each kind: passed over with the reason and the next older checkpoint used, or refused if named."""

import pytest

from dlm_dist.training.checkpoint_files import read_manifest
from tests.distributed import runs
from tests.faults import small_run, starts

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]

FILES = [
    "manifest.json",
    "trainer_state.json",
    "tensors/rank-00000.safetensors",
    "tensors/rank-00000.json",
    "model/model.safetensors",
    "model/config.json",
    "tokenizer/dlm_tokenizer.json",
]
NEWEST = 6


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run left alone, and a run up to NEWEST to be damaged."""
    folder = tmp_path_factory.mktemp("whole")
    return small_run.left_alone(data, folder), small_run.prepared(data, folder, NEWEST)


def damage(file, kind):
    content = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def test_each_kind_of_file_is_tried(whole):
    assert {*FILES[1:]} == {*read_manifest(whole[1] / "checkpoints" / f"step-{NEWEST}")}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing"])
def test_a_damaged_file(name, kind, whole, data, tmp_path, report):
    reference, before = whole
    run = small_run.copy(before, tmp_path / "run")
    newest = run / "checkpoints" / f"step-{NEWEST}"
    damage(newest / name, kind)
    damaged = small_run.contents(newest)

    found = small_run.contents(run / "checkpoints")
    settings = small_run.arguments(data, run)
    statuses, output = starts.to_the_end(settings, f"checkpoints/step-{NEWEST}", tmp_path / "named.log")
    assert statuses == [2]
    assert f"cannot resume from {newest}: " in output
    # A flipped manifest is still one, which says something else of a file.
    said = "does not have its recorded SHA-256" if (name, kind) == ("manifest.json", "flipped") else name
    assert said in output
    assert "Traceback" not in output
    assert small_run.contents(run / "checkpoints") == found

    statuses, output = starts.to_the_end(settings, "auto", tmp_path / "auto.log")
    assert statuses == [0], output
    reason = next(line for line in output.splitlines() if "passed over" in line)
    assert f"{newest} does not verify: " in reason
    assert said in reason
    assert f"resuming from {run / 'checkpoints' / 'step-4'}" in output
    small_run.assert_same_end(run, reference)
    assert small_run.contents(run / "checkpoints" / f"set-aside-{NEWEST}") == damaged
    repeated = (run / "metrics.replaced.jsonl").read_text().splitlines()
    assert repeated == (before / "metrics.jsonl").read_text().splitlines()[4:]
    why = reason.partition("does not verify: ")[2].replace(f"{newest}/", "")
    report.case("Damaged files", f"`{name}` {kind}", f"named: refused; auto: passed over ({why}), went on from step-4")


@pytest.mark.parametrize("name", ["manifest.json", "model/model.safetensors"])
def test_all_are_damaged(name, whole, data, tmp_path, report):
    """Not from step 0: that would be training again what may be mended."""
    run = small_run.copy(whole[1], tmp_path / "run")
    for path in (run / "checkpoints").iterdir():
        damage(path / name, "missing")
    found = small_run.contents(run / "checkpoints")
    statuses, output = starts.to_the_end(small_run.arguments(data, run), "auto", tmp_path / "auto.log")
    assert statuses == [2]
    assert "verifies (" in output
    assert "step-2" in output
    assert "Traceback" not in output
    assert small_run.contents(run / "checkpoints") == found
    assert runs.last_step(run) == NEWEST
    report.case("Damaged files", f"`{name}` missing in every checkpoint", "refused, nothing touched")
