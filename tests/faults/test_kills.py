"""SIGKILL at random moments: every run comes to the same end, to the bit, as if it had been left alone.

`FAULT_KILLS` (204) kills are dealt out to 24 runs: ZeRO 0-3, three optimizers, synchronous and asynchronous saves, one
and two ranks. `FAULT_SEED` draws the moments.
"""

import os
import random
import time
from collections import Counter

import pytest

from tests.distributed import runs
from tests.faults import starts
from tests.faults.campaign import (
    DEFAULT_KILLS,
    EVERY,
    KEEP_LAST,
    PHASES,
    Chain,
    Pace,
    Setting,
    View,
    lease_number,
    phase,
    plan,
)
from tests.faults.report import SEED

KILLS = int(os.environ.get("FAULT_KILLS", str(DEFAULT_KILLS)))
CAMPAIGN = [pytest.mark.faults, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1800)]


def arguments(setting, data, run, **changes):
    """Overrides of a run of `setting` in `run`, with what else a run records between steps."""
    common = {"train__max_steps": setting.steps, "zero__stage": setting.stage, "optimizer__name": setting.optimizer}
    common |= {"checkpoint__every": EVERY, "checkpoint__keep_last": KEEP_LAST, "logging__every": 1}
    common |= {"checkpoint__asynchronous": setting.asynchronous, "model__direction": "bidirectional"}
    if not setting.asynchronous:
        common |= {"data__validation": data / "validation", "train__eval_rows": 3, "train__eval_every": 6}
    return runs.overrides(data, run, setting.backbone, **common | changes)


def leave_alone(setting, data, folder):
    """The same run without kills, which saves at its end only -> its folder, and the pace of this machine."""
    run = folder / "reference"
    settings = arguments(setting, data, run, checkpoint__every=None)
    start = starts.begin("forked", settings, None, folder / "reference.log", setting.ranks)
    begun = time.monotonic()
    while not lease_number(run) and start.running():
        time.sleep(0.002)
    lease = time.monotonic() - begun
    while "\nstep 1/" not in start.output() and start.running():
        time.sleep(0.01)
    load = time.monotonic() - begun
    assert start.wait() == [0] * setting.ranks, start.output()[-6000:]
    records = runs.metrics(run)
    save = float(start.output().rpartition(" MB in ")[2].split()[0])
    return run, Pace(lease, load, sorted(record["step_seconds"] for record in records)[len(records) // 2], save)


def under_fire(setting, data, folder):
    """Run `setting` through its kills, in as many runs as they need -> the chains, all of them checked."""
    draw = random.Random(f"{SEED} {setting}")
    reference, pace = leave_alone(setting, data, folder)
    truth = runs.metrics(reference)
    chains, wanted = [], setting.kills
    while wanted > 0:
        run = folder / f"run-{len(chains)}"
        chain = Chain(setting, arguments(setting, data, run), run, truth, draw, pace)
        finished = False
        while not finished:
            finished = chain.one_start(kill=wanted > sum(kill.phase != "finished" for kill in chain.kills))
        chain.check_end(reference)
        wanted -= sum(kill.phase != "finished" for kill in chain.kills)
        chains.append(chain)
    return chains


@pytest.mark.faults
def test_the_plan_is_as_large_as_it_says():
    settings = plan(DEFAULT_KILLS)
    assert sum(setting.kills for setting in settings) == DEFAULT_KILLS >= 200
    by_combination = Counter()
    for setting in settings:
        by_combination[setting.stage, setting.optimizer] += setting.kills
    assert len(by_combination) == 12
    assert min(by_combination.values()) >= 16
    for stage in range(4):
        for name in ("ranks", "asynchronous", "backbone"):
            assert len({getattr(setting, name) for setting in settings if setting.stage == stage}) == 2


def test_what_a_kill_has_left_says_what_it_hit(tmp_path):
    def view(run, *names, manifests=()):
        for name in names:
            (run / "checkpoints" / name).mkdir(parents=True)
        for name in manifests:
            (run / "checkpoints" / name / "manifest.json").touch()
        return View.of(run)

    empty = View.of(tmp_path / "nothing")
    assert phase(tmp_path / "nothing", empty, empty, "") == PHASES[0]
    run = tmp_path / "run"
    (run / ".lease").mkdir(parents=True)
    before = view(run, "step-3", "step-6", ".step-9.a.writing", manifests=["step-3", "step-6", ".step-9.a.writing"])
    assert before.newest == 6
    (run / ".lease" / "4").touch()
    assert phase(run, before, View.of(run), "resuming\n") == PHASES[1]
    assert phase(run, before, View.of(run), "resuming\nstep 7/60") == PHASES[2]
    assert phase(run, before, view(run, "step-9", manifests=["step-9"]), "\nstep ") == PHASES[5]
    (run / "checkpoints" / "step-3" / "manifest.json").unlink()
    assert phase(run, before, View.of(run), "\nstep ") == PHASES[6]
    assert phase(run, before, view(run, ".step-12.b.writing"), "\nstep ") == PHASES[3]
    assert phase(run, before, view(run, manifests=[".step-12.b.writing"]), "\nstep ") == PHASES[4]


def test_a_few_kills(data, tmp_path):
    """The campaign in small, in `make test`: enough to know that its parts work."""
    for chain in under_fire(Setting(1, "adamw8bit", True, 1, "qwen3", kills=2, steps=15), data, tmp_path):
        assert len(chain.kills) >= 1


@pytest.mark.parametrize("setting", [pytest.param(one, marks=CAMPAIGN, id=str(one)) for one in plan(KILLS)])
def test_kills_at_random_moments(setting, data, tmp_path, report):
    started = time.monotonic()
    for chain in under_fire(setting, data, tmp_path):
        report.chains.append(chain.record(time.monotonic() - started))
        started = time.monotonic()


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.skipif(KILLS < 200, reason="FAULT_KILLS asks for a smaller campaign")
def test_every_moment_was_hit(report):
    kills = report.kills()
    if {str(setting) for setting in plan(KILLS)} > {str(Setting(**chain["setting"])) for chain in report.chains}:
        pytest.skip("not all of the campaign was run")
    assert len(kills) >= KILLS
    hit = Counter(kill["phase"] for kill in kills)
    assert all(hit[name] >= 3 for name in PHASES), hit
    assert {(kill["stage"], kill["ranks"]) for kill in kills} == {(s, r) for s in range(4) for r in (1, 2)}
