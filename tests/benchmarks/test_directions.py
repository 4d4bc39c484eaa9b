"""The comparison of directions: its plan, its statistics, and that it never passes off one run for another."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from benchmarks import directions, paired_runs
from dlm_dist.config import load_config, to_yaml


def test_the_interval_is_students() -> None:
    values = [0.1, 0.3, 0.2]
    found = paired_runs.interval(values)
    half = 4.303 * statistics.stdev(values) / 3**0.5
    assert found == {
        "mean": pytest.approx(0.2),
        "low": pytest.approx(0.2 - half),
        "high": pytest.approx(0.2 + half),
    }
    wide = paired_runs.interval([float(i) for i in range(40)])
    assert wide["high"] - wide["mean"] > 1.96 * statistics.stdev(range(40)) / 40**0.5
    assert paired_runs.interval([0.5]) == {"mean": 0.5, "low": None, "high": None}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([-0.2, -0.21, -0.19], "better"),
        ([0.2, 0.21, 0.19], "worse"),
        ([-0.2, 0.2, 0.1], "undecided"),
        ([1.0], "one seed"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(values: list[float], said: str) -> None:
    assert paired_runs.verdict(paired_runs.interval(values)) == said


def test_equal_compute_is_equal_within_three_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every arm's steps, with the FLOPs of its own model; the data is not needed for that."""
    from dlm_dist import models

    def flops(experiment: directions.Experiment, overrides: list[str]):
        config = load_config(experiment.config, overrides)
        sizes = {"vocab_size": 80, "mask_token_id": 79, **config.model.sizes()}
        model = models.skeleton(models.configuration("rwkv7", **sizes))
        return config, 3.0 * (model.flops_per_token(128) + 0.5 * model.head_flops_per_row())

    monkeypatch.setattr(directions, "_flops_per_step", flops)
    monkeypatch.chdir(directions.ROOT)
    experiment = directions.EXPERIMENTS["compute"]
    plans = [directions.plan_arm(experiment, name, []) for name in experiment.arms]
    for plan in plans:
        assert plan["flops"] / plans[0]["flops"] == pytest.approx(1.0, abs=0.03), plan["arm"]
        load_config(experiment.config, plan["overrides"])
    assert plans[1]["steps"] < plans[0]["steps"] == plans[3]["steps"]


def test_the_runs_of_another_plan_are_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directions.ROOT)
    experiment = directions.EXPERIMENTS["characters"]
    paired_runs.require_same_run(tmp_path, experiment.config, 1, [])
    resolved = ["run.seed=1", "model.vocab_size=80", "data.sequence_length=64", "train.cpu_threads=1"]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(experiment.config, resolved)))
    paired_runs.require_same_run(tmp_path, experiment.config, 1, [])
    with pytest.raises(ValueError, match=r"optimizer\.lr = 0\.002, and this one has 1e-05: remove the folder"):
        paired_runs.require_same_run(tmp_path, experiment.config, 1, ["optimizer.lr=1e-5"])
    with pytest.raises(ValueError, match=r"run\.seed = 1, and this one has 2"):
        paired_runs.require_same_run(tmp_path, experiment.config, 2, [])


def test_the_summary_pairs_seeds_and_wants_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "RUNS", tmp_path)
    plans = [{"arm": arm, "overrides": [], "steps": 4, "flops": 1.0, "flops_ratio": 1.0} for arm in ("causal", "other")]
    for plan, shift in zip(plans, (0.0, -0.5), strict=True):
        for seed in (0, 1, 2):
            folder = directions.run_folder("x", plan["arm"], seed)
            folder.mkdir(parents=True)
            lines = [{"step": s, "bound_nats_per_token": 5 - s + seed + shift, "standard_error": 0.1} for s in (0, 4)]
            (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (folder / "metrics.jsonl").write_text(json.dumps({"loss": 2.0}) + "\n")
    result = directions.summary("x", plans, [0, 1, 2])
    assert result["arms"][1]["difference"]["mean"] == pytest.approx(-0.5)
    assert "better" in directions.table(result)
    with pytest.raises(AssertionError):
        directions.summary("x", [plan | {"steps": 3} for plan in plans], [0, 1, 2])
