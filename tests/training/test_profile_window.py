"""Traces of a window of steps: what they hold, when they are written, and what stays behind outside."""

import gzip
import json

import pytest
import torch
from torch.autograd import _profiler_enabled

from dlm_dist.config import ConfigError, ProfileSection, load_config
from dlm_dist.training.phases import PhaseClock
from dlm_dist.training.profile_window import ProfileWindow, profile_notes
from tests.training.conftest import micro_batch, tiny_config, tiny_model

CPU = torch.device("cpu")


class Run:
    """Steps of a tiny model, in the phases of the loop."""

    def __init__(self, folder, settings, rank=0, done=0):
        self.clock, self.done, self.told = PhaseClock(CPU), done, []
        self.window = ProfileWindow(settings, folder, rank, CPU, self.clock, lambda: self.done, self.told.append)
        self.model = tiny_model()
        self.enabled = {}

    def step(self):
        self.clock.enter("data")
        batch = micro_batch(self.done)
        self.clock.enter("forward")
        self.enabled[self.done + 1] = _profiler_enabled()
        loss = self.model(**batch)
        self.clock.enter("backward")
        loss.backward()
        self.clock.enter("other")
        self.done += 1


def trace(path):
    """What ran, by name: [(start, end)] in microseconds."""
    found = {}
    for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
        if event.get("ph") == "X":
            found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def inside(spans, outer):
    return any(outer[0] <= start and end <= outer[1] for start, end in spans)


def test_a_trace_has_the_steps_of_the_window_their_phases_and_operators(tmp_path):
    run = Run(tmp_path, ProfileSection(start_step=3, steps=2, memory=True))
    with run.window:
        for _ in range(6):
            run.step()
            if run.done == 5:
                assert run.clock.listener is None
    # Warmed up in step 2, on in 3 and 4, and nothing is left afterwards.
    assert run.enabled == {1: False, 2: False, 3: True, 4: True, 5: False, 6: False}
    (path,) = tmp_path.rglob("*.*")
    assert path == tmp_path / "step-3-4" / "rank-0.json.gz"
    assert run.told == [f"profiled steps 3 to 4: {tmp_path / 'step-3-4'}"]
    events = trace(path)
    assert {name for name in events if name.startswith("step ")} == {"step 3", "step 4"}
    for step in ("step 3", "step 4"):
        ((begin, end),) = events[step]
        for phase, operator in (("forward", "aten::embedding"), ("backward", "MmBackward0")):
            (span,) = (span for span in events[phase] if inside([span], (begin, end)))
            assert inside(events[operator], span), (step, operator)
    names = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(event["name"] == "[memory]" for event in names)


@pytest.mark.parametrize(("done", "steps"), [(0, "1-3"), (1, "2-3"), (2, "3-3"), (3, None)])
def test_a_start_inside_the_window_profiles_the_rest_of_it(done, steps, tmp_path):
    settings = ProfileSection(start_step=1, steps=3)
    run = Run(tmp_path, settings, done=done)
    with run.window:
        while run.done < 5:
            run.step()
    assert [path.name for path in tmp_path.iterdir()] == ([] if steps is None else [f"step-{steps}"])
    notes = profile_notes(settings, done, 1, CPU)
    said = {0: [], 1: ["only steps 2 to 3 are profiled"], 2: ["only steps 3 to 3"], 3: ["nothing is profiled"]}[done]
    assert [note[: len(text)] for note, text in zip(notes, said, strict=True)] == said


def test_a_run_that_fails_in_the_window_leaves_what_it_has(tmp_path):
    run = Run(tmp_path, ProfileSection(start_step=2, steps=5))

    def fails():
        with run.window:
            for _ in range(3):
                run.step()
            raise MemoryError

    with pytest.raises(MemoryError):
        fails()
    assert not _profiler_enabled()
    assert {name for name in trace(tmp_path / "step-2-3" / "rank-0.json.gz") if "step " in name} == {"step 2", "step 3"}


def test_a_rollback_behind_the_window_ends_it(tmp_path):
    run = Run(tmp_path, ProfileSection(start_step=3, steps=4))
    with run.window:
        for _ in range(4):
            run.step()
        run.done = 1
        for _ in range(5):
            run.step()
        assert run.clock.listener is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-3-4"]


@pytest.mark.parametrize("settings", [None, ProfileSection(start_step=1, ranks=(1, 2))])
def test_other_ranks_and_runs_without_a_window_are_left_alone(settings, tmp_path):
    run = Run(tmp_path, settings)
    with run.window:
        assert run.clock.listener is None
        run.step()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_profiled_is_said_at_the_start():
    settings = ProfileSection(start_step=5, steps=2, ranks=(0, 3), memory=True)
    with pytest.raises(ConfigError, match=r"logging\.profile\.ranks names rank 3: expected at most 1, the last one"):
        profile_notes(settings, 0, 2, CPU)
    # A window that is over does not keep a smaller world from going on.
    assert profile_notes(settings, 6, 2, CPU) == [
        "nothing is profiled: logging.profile asks for steps 5 to 6, and this start is behind them"
    ]
    (note,) = profile_notes(settings, 0, 4, CPU)
    assert note == "logging.profile.memory: the trace has the allocations; there are no memory snapshots on cpu"
    assert profile_notes(settings, 0, 4, torch.device("cuda")) == []


def test_a_window_is_asked_for_by_configuration():
    config = tiny_config("logging.profile.start_step=10", "logging.profile.ranks=[0, 3]")
    assert config.logging.profile == ProfileSection(start_step=10, steps=3, ranks=(0, 3), memory=False)
    assert tiny_config().logging.profile is None
    with pytest.raises(ConfigError) as error:
        load_config(None, ["logging.profile.start=10", "logging.profile.steps=0"])
    text = str(error.value)
    assert "logging.profile.start (10) is not a key: the nearest valid one is logging.profile.start_step" in text
    assert "logging.profile.steps is 0: expected a whole number at least 1" in text
    assert "logging.profile.start_step is missing" in text


@pytest.mark.gpu
def test_on_cuda_a_memory_snapshot_lies_beside_the_trace(tmp_path):
    import pickle

    device = torch.device("cuda")
    clock, done = PhaseClock(device), [0]
    settings = ProfileSection(start_step=2, steps=1, memory=True)
    with ProfileWindow(settings, tmp_path, 0, device, clock, lambda: done[0], None):
        for _ in range(4):
            clock.enter("data")
            torch.ones(1000, 1000, device=device).matmul(torch.ones(1000, 1000, device=device)).sum().item()
            done[0] += 1
    folder = tmp_path / "step-2-2"
    snapshot = pickle.loads((folder / "rank-0.memory.pickle").read_bytes())
    assert any(entry["size"] >= 4_000_000 for entries in snapshot["device_traces"] for entry in entries)
    kernels = [name for name in trace(folder / "rank-0.json.gz") if "gemm" in name.lower()]
    assert kernels
