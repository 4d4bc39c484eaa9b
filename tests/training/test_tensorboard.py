"""Curves in TensorBoard that neither double nor branch, as its own reader sees them."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dlm_dist.training import tensorboard
from dlm_dist.training.tensorboard import TensorBoard
from tests.training.test_metrics import EVALUATION, RECORD


def curve(folder, name) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def resumed_and_rolled_back(folder):
    first = TensorBoard(folder, start_step=0, every=1)
    first.evaluation({"step": 0, **EVALUATION})
    for step in range(1, 7):
        first.step({"step": step, **RECORD, "loss": 1.0})
        if step == 4:
            first.evaluation({"step": 4, **EVALUATION})
    first.close(finished=False)
    second = TensorBoard(folder, start_step=4, every=1)
    second.evaluation({"step": 4, **EVALUATION, "bound_nats_per_token": 3.25})
    for step in (5, 6, 7):
        second.step({"step": step, **RECORD, "loss": 2.0})
    second.rolled_back(7, 5, "a spike")
    for step in (6, 7, 8):
        second.step({"step": step, **RECORD, "loss": 3.0})
    second.sample({"step": 8, "text": "words"})
    second.close(finished=True)


def test_a_resume_and_a_rollback_replace_what_they_go_back_behind(tmp_path):
    resumed_and_rolled_back(tmp_path)
    assert curve(tmp_path / "train", "loss") == list(zip(range(1, 9), [1.0] * 4 + [2.0] + [3.0] * 3, strict=True))
    assert curve(tmp_path / "validation", "bound_nats_per_token") == [(0, 3.5), (4, 3.25)]
    assert curve(tmp_path / "validation", "loss_by_time/0.1-0.2") == [(0, 1.5), (4, 1.5)]
    events = EventAccumulator(str(tmp_path / "validation"))
    events.Reload()
    assert [event.step for event in events.Tensors("sample/text_summary")] == [8]


def test_without_the_note_they_would_double(tmp_path, monkeypatch):
    """That the test above can fail: it is the note at the head of a new file that does it."""
    writer = tensorboard.SummaryWriter
    monkeypatch.setattr(
        tensorboard, "SummaryWriter", lambda folder, flush_secs, purge_step: writer(folder, flush_secs=flush_secs)
    )
    resumed_and_rolled_back(tmp_path)
    assert len(curve(tmp_path / "train", "loss")) > 8


def test_what_goes_wrong_in_its_thread_is_raised(tmp_path):
    board = TensorBoard(tmp_path, start_step=0, every=1)
    board.sample({"step": "no number", "text": "words"})
    with pytest.raises(ValueError, match="no number"):
        board.close(finished=False)


def test_steps_in_between_are_left_out(tmp_path):
    board = TensorBoard(tmp_path, start_step=0, every=3)
    for step in range(1, 8):
        board.step({"step": step, **RECORD})
    board.close(finished=True)
    assert [step for step, _ in curve(tmp_path / "train", "lr")] == [3, 6]
    with pytest.raises(KeyError):
        curve(tmp_path / "train", "rows_sha256")
