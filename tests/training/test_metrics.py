import json
import math
import os
from pathlib import Path

import pytest

from dlm_dist.training.metrics import JsonLines, MetricsLog
from dlm_dist.training.scalars import scalars

RECORD = {
    "loss": 2.5,
    "bound_nats_per_token": None,
    "grad_norm": 0.5,
    "lr": 3e-4,
    "tokens_per_second": 12345.0,
    "mfu": 0.25,
    "skipped": False,
    "skip_reason": None,
    "positions": [0, 8],
    "rows_sha256": "ab",
    "seconds_left": 3725.4,
}
EVALUATION = {
    "bound_nats_per_token": 3.5,
    "standard_error": None,
    "bits_per_byte": 1.25,
    "exact": False,
    "loss_by_time": [
        {"first": 0.0, "last": 0.1, "draws": 0, "nats_per_token": None},
        {"first": 0.1, "last": 0.2, "draws": 3, "nats_per_token": 1.5},
    ],
    "clip_search": None,
}


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_floats_read_back_bit_equal_and_what_json_lacks_is_null(tmp_path):
    file = JsonLines(tmp_path / "metrics.jsonl")
    values = {
        "step": 1,
        "a": 0.1 + 0.2,
        "b": 1e-308,
        "c": math.pi * 1e17,
        "nan": math.nan,
        "inf": -math.inf,
        "none": None,
    }
    file.write(values)
    read = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert {key: read[key] for key in "abc"} == {key: values[key] for key in "abc"}
    assert read["nan"] is read["inf"] is read["none"] is None


def test_rewind_keeps_the_past_moves_the_rest_and_drops_a_cut_off_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = JsonLines(path)
    assert file.rewind(5) == -1  # nothing there yet
    for step in range(1, 6):
        file.write({"step": step})
    with open(path, "a") as raw:
        raw.write('{"step": 6, "lo')
    assert file.rewind(4) == 5
    assert steps(path) == [1, 2, 3]
    assert steps(tmp_path / "metrics.replaced.jsonl") == [4, 5]
    file.write({"step": 4})
    assert steps(path) == [1, 2, 3, 4]
    assert file.rewind(5) == 4
    assert steps(path) == [1, 2, 3, 4]
    assert file.rewind(0) == 4
    assert path.read_bytes() == b""
    assert file.rewind(3) == -1
    assert steps(tmp_path / "metrics.replaced.jsonl") == [4, 5, 1, 2, 3, 4]


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("at", range(4))
def test_a_rewind_that_is_killed_is_done_again(at, tmp_path, monkeypatch):
    """Killed at any of its calls that change files: no line is lost, cut off, or put aside twice."""
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.replaced.jsonl"
    file = JsonLines(path)
    for step in range(1, 6):
        file.write({"step": step})
    file.rewind(4)
    for step in (4, 5):
        file.write({"step": step, "again": True})
    calls = []

    def counted(call, half):
        def instead(*arguments):
            calls.append(call)
            if len(calls) - 1 == at:
                half(*arguments)
                raise KilledError
            return call(*arguments)

        return instead

    write = Path.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "write_bytes", counted(write, lambda path, content: write(path, content[: len(content) // 2]))
        )
        for name in ("replace", "truncate"):
            patch.setattr(f"os.{name}", counted(getattr(os, name), lambda *arguments: None))
        if at < 3:
            with pytest.raises(KilledError):
                file.rewind(4)
        else:
            file.rewind(4)
            assert len(calls) == 3
    file.rewind(4)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": step} for step in (1, 2, 3)]
    expected = [{"step": 4}, {"step": 5}, {"step": 4, "again": True}, {"step": 5, "again": True}]
    assert [json.loads(line) for line in aside.read_text().splitlines()] == expected


def test_a_line_is_with_the_operating_system_when_it_is_written(tmp_path):
    """What a SIGKILL leaves: the file as another reader sees it, while ours is open."""
    file = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(3):
        file.write({"step": step})
        assert steps(tmp_path / "metrics.jsonl")[-1] == step


def test_a_log_goes_on_behind_its_step_and_behind_a_rollback(tmp_path, capsys):
    first = MetricsLog(tmp_path, 0, 9, 2, None)
    first.evaluation({"step": 0, **EVALUATION})
    for step in range(1, 7):
        first.step({"step": step, **RECORD})
    first.evaluation({"step": 6, **EVALUATION})
    first.sample(6, "text")
    # A kill: nothing is closed. The run goes on from the checkpoint of step 4.
    second = MetricsLog(tmp_path, 4, 9, 2, None)
    for step in (5, 6, 7):
        second.step({"step": step, **RECORD})
    second.rolled_back(7, 6, "a spike")
    second.step({"step": 7, **RECORD, "skipped": True, "skip_reason": "a spike: left out after a rollback"})
    second.close(finished=False)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6, 7]
    assert steps(tmp_path / "metrics.replaced.jsonl") == [5, 6, 7]
    assert steps(tmp_path / "evaluations.jsonl") == [0]
    assert steps(tmp_path / "samples.replaced.jsonl") == [6]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 0  held-out bound 3.5000 nats/token  1.2500 bits/byte"
    assert lines[1] == "step 2/9  loss 2.5000  grad 0.500  lr 3.00e-04  12,345 tok/s  MFU 25.0 %  left 1:02:05"
    assert lines[-2] == "step 7  a spike: back to the checkpoint of step 6, and on without step 7"
    # A skipped step is told, whether its turn has come or not.
    assert lines[-1].endswith("(skipped: a spike: left out after a rollback; data positions 0 to 7)")
    assert [line.split()[1] for line in lines[1:]] == ["2/9", "4/9", "6/9", "6", "6", "6/9", "7", "7/9"]


def test_scalars_are_the_finite_numbers_by_name():
    assert scalars({"step": 3, "data_pos": 8, "nan": math.nan, **RECORD, "by_role": {"matrix": 1.0, "none": None}}) == {
        "data_pos": 8.0,
        "loss": 2.5,
        "grad_norm": 0.5,
        "lr": 3e-4,
        "tokens_per_second": 12345.0,
        "mfu": 0.25,
        "skipped": 0.0,
        "seconds_left": 3725.4,
        "by_role/matrix": 1.0,
    }
    assert scalars({"step": 3, **EVALUATION}) == {
        "bound_nats_per_token": 3.5,
        "bits_per_byte": 1.25,
        "exact": 0.0,
        "loss_by_time/0.1-0.2": 1.5,
    }


def test_a_full_disk_is_told_with_the_file(tmp_path):
    path = Path("/dev/full")
    if not path.exists():
        pytest.skip("no /dev/full here")
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.path.symlink_to(path)
    with pytest.raises(OSError, match=r"No space left on device: .*metrics.jsonl"):
        file.write({"step": 1})
    file.close()
