"""One wandb run over all starts, without a network: what its offline files hold."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from dlm_dist.training.wandb_run import WandbRun
from tests.training.test_metrics import EVALUATION, RECORD


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def history(folder: Path) -> list[tuple[str, int, dict[str, str]]]:
    """(run id, step, numbers) of every start, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for raw in records(path):
            record = Record.FromString(raw)
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                found.append((path.stem.removeprefix("run-"), int(items["_step"]), items))
    return found


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    return {"project": "test", "mode": "offline", "dir": str(tmp_path)}


def test_a_resume_continues_the_run_and_doubles_no_step(tmp_path, settings):
    first = WandbRun({**settings, "id": None, "resume": None}, every=1, logged=-1, evaluated=-1)
    run_id = first.id
    first.evaluation({"step": 0, **EVALUATION})
    for step in range(1, 7):
        first.step({"step": step, **RECORD})
        if step == 4:
            first.evaluation({"step": 4, **EVALUATION})
    first.close(finished=False)
    wandb.teardown()  # as the end of a process does; its service writes in a process of its own
    # From the checkpoint of step 4, whose evaluation is made again; metrics.jsonl had reached step 6.
    second = WandbRun({**settings, "id": run_id, "resume": "allow"}, every=1, logged=6, evaluated=4)
    assert second.id == run_id
    second.evaluation({"step": 4, **EVALUATION})
    for step in (5, 6, 7):
        second.step({"step": step, **RECORD})
    second.rolled_back(7, 6, "a spike")
    for step in (7, 8):
        second.step({"step": step, **RECORD})
    second.evaluation({"step": 8, **EVALUATION})
    second.close(finished=True)
    wandb.teardown()

    rows = history(tmp_path)
    assert {name for name, _, _ in rows} == {run_id}
    assert [step for _, step, items in rows if "loss" in items] == list(range(1, 9))
    evaluated = [step for _, step, items in rows if "validation/bound_nats_per_token" in items]
    assert evaluated == [0, 4, 8]
    assert rows[-1][2]["validation/loss_by_time/0.1-0.2"] == "1.5"
