import json
import math
import os
from pathlib import Path

import pytest

from dlm_dist.training.metrics import JsonLines


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
    file.rewind(5)  # nothing there yet
    for step in range(1, 6):
        file.write({"step": step})
    with open(path, "a") as raw:
        raw.write('{"step": 6, "lo')
    file.rewind(4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    moved = (tmp_path / "metrics.replaced.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in moved] == [4, 5]
    file.write({"step": 4})
    assert path.read_text().count("\n") == 4


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("at", range(5))
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
        patch.setattr("os.replace", counted(os.replace, lambda *arguments: None))
        if at < 4:
            with pytest.raises(KilledError):
                file.rewind(4)
        else:
            file.rewind(4)
            assert len(calls) == 4
    file.rewind(4)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": step} for step in (1, 2, 3)]
    expected = [{"step": 4}, {"step": 5}, {"step": 4, "again": True}, {"step": 5, "again": True}]
    assert [json.loads(line) for line in aside.read_text().splitlines()] == expected
