"""A run that is killed and resumed is the run that was never stopped: to the bit, over every kind of engine.

Real processes, the real launcher, SIGKILL. The quick cases run in `make test`, all of them in `make test-resume`.
"""

import shutil

import numpy as np
import pytest
import torch

from dlm_dist.training.checkpoint_files import load_trainer_state
from tests.data_pipeline.test_token_files import write_llmc, write_megatron
from tests.distributed import runs

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

MATRIX = [
    (stage, optimizer, backbone)
    for stage in range(4)
    for optimizer in ("adamw", "adamw8bit", "lion8bit")
    for backbone in ("rwkv7", "qwen3")
]
QUICK = {(0, "adamw", "rwkv7"), (3, "adamw8bit", "qwen3")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.build_data(tmp_path_factory.mktemp("data"))


def kill_twice_and_compare(settings, folder, ranks, samples=96):
    """One run to the end, one killed between checkpoints 4 and 8 and again behind 8; every step must agree."""
    reference, killed = folder / "reference", folder / "killed"
    runs.train(settings(reference), ranks)
    assert runs.last_step(reference) == 12
    assert runs.train_and_kill(settings(killed), killed, at_step=6, ranks=ranks) < 12
    assert runs.train_and_kill(settings(killed), killed, at_step=10, ranks=ranks, resume="auto") < 12
    output = runs.train(settings(killed), ranks, resume="auto")
    assert "resuming from" in output
    runs.assert_same_steps(killed, reference)
    # The killed runs crossed a border between two epochs before, between and behind the kills.
    state = load_trainer_state(reference / "checkpoints" / "step-12")
    assert state["data_pos"] == samples
    assert state["epoch"] >= 2


@pytest.mark.parametrize(
    ("stage", "optimizer", "backbone"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in MATRIX],
)
def test_resume_is_exact(stage, optimizer, backbone, data, tmp_path):
    def settings(run):
        changes = {"zero__stage": stage, "optimizer__name": optimizer, "model__direction": "bidirectional"}
        # Figures over several steps, some of them on either side of a checkpoint.
        return runs.overrides(data, run, backbone, logging__every=3, **changes)

    kill_twice_and_compare(settings, tmp_path, ranks=2)


RAMP = {
    "train__micro_batch_size": 2,
    "train__gradient_accumulation_steps": None,
    "train__global_batch_size": 16,
    "train__batch_size_ramp": "[[14,4],[40,8]]",
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_resume_in_a_ramp_of_batch_sizes_is_exact(stage, data, tmp_path):
    """Four steps of 4, three of 8, then 16; killed among those of 8."""
    kill_twice_and_compare(lambda run: runs.overrides(data, run, zero__stage=stage, **RAMP), tmp_path, 2, samples=120)
    ends = [record["data_pos"] for record in runs.metrics(tmp_path / "killed")]
    assert ends == [4, 8, 12, 16, 24, 32, 40, 56, 72, 88, 104, 120]


@pytest.mark.slow
def test_a_ramp_goes_on_with_other_ranks(data, tmp_path):
    reference, grown = tmp_path / "reference", tmp_path / "grown"
    runs.train(runs.overrides(data, reference, **RAMP), ranks=2)
    runs.train_and_kill(runs.overrides(data, grown, **RAMP), grown, at_step=6, ranks=1)
    runs.train(runs.overrides(data, grown, zero__stage=3, **RAMP), ranks=2, resume="auto")
    for key in ("data_pos", "positions", "rows_sha256", "noise_sha256", "lr"):
        one, other = ([record[key] for record in runs.metrics(run)] for run in (reference, grown))
        assert one == other, key
    refused = runs.attempt(runs.overrides(data, grown, **(RAMP | {"train__batch_size_ramp": "[]"})), 1, "auto")
    assert refused.returncode != 0
    assert "train.batch_size_ramp is None, the checkpoint was trained with [[14, 4], [40, 8]]: set it" in refused.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "optimizer", "precision"), [(1, "adamw", "fp32"), (2, "adamw8bit", "bf16"), (3, "lion8bit", "bf16")]
)
def test_resume_of_offloaded_states_is_exact(stage, optimizer, precision, data, tmp_path):
    changes = {"zero__stage": stage, "zero__offload_optimizer": "cpu", "optimizer__name": optimizer}

    def settings(run):
        return runs.overrides(data, run, train__precision=precision, **changes)

    kill_twice_and_compare(settings, tmp_path, ranks=2)


@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [(1, "adamw8bit"), *(pytest.param(stage, "adamw", marks=pytest.mark.slow) for stage in (0, 2, 3))],
)
def test_resume_from_asynchronous_saves_is_exact(stage, optimizer, data, tmp_path):
    def settings(run):
        changes = {"zero__stage": stage, "optimizer__name": optimizer, "checkpoint__asynchronous": True}
        return runs.overrides(data, run, "qwen3", checkpoint__every=1, checkpoint__keep_last=2, **changes)

    kill_twice_and_compare(settings, tmp_path, ranks=2)
    kept = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert kept == ["step-11", "step-12"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["llmc", "megatron"])
def test_resume_is_exact_on_token_files(form, tmp_path):
    """Uninterrupted and killed, as above; BlinkDL's order crosses its border every 41 samples."""
    tokens = np.random.default_rng(1).integers(0, 257, 44 * 32)
    if form == "llmc":
        write_llmc(tmp_path / "tokens.bin", tokens)
        order = "keyed"
    else:
        write_megatron(tmp_path / "tokens", [tokens.tolist()])
        order = "cubic_prime"

    def settings(run):
        changes = {"data__tokenizer": "bytes", "data__sequence_length": 32, "data__order": order}
        return runs.overrides(tmp_path, run, data__train__0__path=tmp_path / "tokens.bin", **changes)

    kill_twice_and_compare(settings, tmp_path, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "backbone"), [(2, "rwkv7"), (3, "qwen3")])
def test_resume_of_causal_language_modelling_is_exact(stage, backbone, data, tmp_path):
    def settings(run):
        changes = {"zero__stage": stage, "objective__name": "ar", "objective__l2wrap": 1e-2}
        changes |= {"data__isolate_documents": True, "data__validation": data / "validation", "train__eval_rows": 5}
        changes |= {"train__eval_every": 4, "train__sample_every": 4, "train__sample_prompt": "time"}
        return runs.overrides(data, run, backbone, **changes)

    kill_twice_and_compare(settings, tmp_path, ranks=2)
    for kind in ("evaluations", "samples"):
        killed, reference = ((tmp_path / run / f"{kind}.jsonl").read_text() for run in ("killed", "reference"))
        assert killed == reference


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "backbone"), [(2, "qwen3"), (3, "rwkv7")])
def test_resume_of_a_run_that_chooses_its_times_is_exact(stage, backbone, data, tmp_path):
    """Killed before and behind choices, which lie between checkpoints as well as on them."""

    def settings(run):
        changes = {"zero__stage": stage, "model__direction": "bidirectional", "optimizer__lr": 1e-2}
        changes |= {"objective__name": "block", "objective__block_lengths": "[[0,4]]", "objective__clip_search": True}
        changes |= {"data__validation": data / "validation", "train__eval_every": 2, "train__eval_rows": 5}
        return runs.overrides(data, run, backbone, **changes)

    kill_twice_and_compare(settings, tmp_path, ranks=2)
    killed, reference = ((tmp_path / run / "evaluations.jsonl").read_text() for run in ("killed", "reference"))
    assert killed == reference
    assert load_trainer_state(tmp_path / "reference" / "checkpoints" / "step-12")["clip_ranges"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("backbone", ["rwkv7", "qwen3"])
def test_resume_is_exact_on_cuda(stage, optimizer, backbone, data, tmp_path):
    def settings(run):
        changes = {"zero__stage": stage, "optimizer__name": optimizer, "model__direction": "bidirectional"}
        return runs.overrides(data, run, backbone, train__device="cuda", train__deterministic=True, **changes)

    kill_twice_and_compare(settings, tmp_path, ranks=min(2, torch.cuda.device_count()))


def test_rows_and_noise_do_not_depend_on_the_topology(data, tmp_path):
    cuts = {
        "one": (1, {"train__gradient_accumulation_steps": 1, "data__loader_threads": 1}),
        "two": (2, {"train__gradient_accumulation_steps": 4, "data__loader_threads": 3}),
        "four": (4, {"train__gradient_accumulation_steps": 2, "data__read_ahead_steps": 1}),
    }
    recorded = {}
    for name, (ranks, changes) in cuts.items():
        run = tmp_path / name
        runs.train(runs.overrides(data, run, train__max_steps=8, train__precision="fp32", **changes), ranks)
        recorded[name] = runs.metrics(run)
    for name in ("two", "four"):
        for key in ("step", "rows_sha256", "noise_sha256", "data_pos", "lr"):
            assert [r[key] for r in recorded[name]] == [r[key] for r in recorded["one"]]
        # Nothing but the order of summation differs.
        for key in ("loss", "grad_norm"):
            assert recorded[name][0][key] == pytest.approx(recorded["one"][0][key], rel=1e-5)
            assert recorded[name][-1][key] == pytest.approx(recorded["one"][-1][key], rel=1e-3)
    assert len({record["noise_sha256"] for record in recorded["one"]}) == 8


def test_a_skipped_range_is_left_out_and_remembered(data, tmp_path):
    plain, skipping = tmp_path / "plain", tmp_path / "skipping"
    runs.train(runs.overrides(data, plain, train__max_steps=6, checkpoint__every=2), ranks=1)
    runs.train(runs.overrides(data, skipping, train__max_steps=6, data__skip="[[16,32]]"), ranks=1)
    hashes = [record["rows_sha256"] for record in runs.metrics(plain)]
    # Steps 3 and 4 of the plain run hold positions 16-31.
    assert [record["rows_sha256"] for record in runs.metrics(skipping)][:4] == hashes[:2] + hashes[4:6]
    late = runs.attempt(runs.overrides(data, plain, train__max_steps=8, data__skip="[[16,32]]"), 1, resume="auto")
    assert late.returncode != 0
    assert "data.skip names positions from 16" in late.stdout
    runs.train(runs.overrides(data, plain, train__max_steps=8, data__skip="[[48,56]]"), ranks=1, resume="auto")
    assert [record["rows_sha256"] for record in runs.metrics(plain)][:6] == hashes


def test_a_damaged_newest_checkpoint_is_passed_over_by_name(data, tmp_path):
    reference, run = tmp_path / "reference", tmp_path / "run"
    runs.train(runs.overrides(data, reference), ranks=1)
    shutil.copytree(reference, run)
    (run / "checkpoints" / "step-12" / "model" / "model.safetensors").unlink()
    output = runs.train(runs.overrides(data, run), ranks=1, resume="auto")
    assert "passed over" in output
    assert "model.safetensors is missing" in output
    runs.assert_same_steps(run, reference)
    named = runs.attempt(runs.overrides(data, run), ranks=1, resume=str(run / "checkpoints" / "step-99"))
    assert named.returncode != 0
    assert "cannot resume from" in named.stdout
    assert "Traceback" not in named.stdout


def test_a_rollback_leaves_the_other_branch_for_good(data, tmp_path):
    run = tmp_path / "run"
    settings = runs.overrides(data, run, checkpoint__every=3, checkpoint__keep_last=2)
    runs.train(settings, ranks=1)
    folder = run / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-12", "step-9"]
    rolled = runs.overrides(data, run, checkpoint__every=1, checkpoint__keep_last=2, train__max_steps=11)
    output = runs.train(rolled, ranks=1, resume="checkpoints/step-9")
    assert "set aside as" in output
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["set-aside-12", "step-10", "step-11"]
    assert "resuming from" in runs.train(runs.overrides(data, run), ranks=1, resume="auto")
    steps = [record["step"] for record in runs.metrics(run)]
    assert steps == list(range(1, 13))


@pytest.mark.slow
def test_a_decay_begins_at_any_checkpoint_of_the_stable_phase(data, tmp_path):
    """It is the run that was given this end from the start."""
    wsd = {"optimizer__schedule": "wsd", "optimizer__decay_steps": 3, "train__max_steps": 9}
    long, short, decay = tmp_path / "long", tmp_path / "short", tmp_path / "decay"
    runs.train(runs.overrides(data, long, **wsd | {"train__max_steps": 12}), ranks=1)
    runs.train(runs.overrides(data, short, **wsd), ranks=1)
    runs.train(runs.overrides(data, decay, **wsd), ranks=1, resume=str(long / "checkpoints" / "step-4"))
    assert [record["step"] for record in runs.metrics(decay)] == [5, 6, 7, 8, 9]
    for mine, other in zip(runs.metrics(decay), runs.metrics(short)[4:], strict=True):
        assert {key: mine[key] for key in runs.EXACT} == {key: other[key] for key in runs.EXACT}
    assert runs.metrics(decay)[-1]["lr"] < runs.metrics(long)[8]["lr"]


def test_what_the_end_of_a_run_needs_is_checked_at_its_start(data, tmp_path):
    for change, said in (
        ({"data__validation": tmp_path / "nowhere"}, "does not exist"),
        ({"train__max_steps": None, "train__max_epochs": 0.01}, "that is 0 steps"),
    ):
        refused = runs.attempt(runs.overrides(data, tmp_path / "run", **change), ranks=1)
        assert refused.returncode != 0
        assert said in refused.stdout
        assert "Traceback" not in refused.stdout
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_one_folder_one_run(data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    settings = runs.overrides(data, first, train__max_steps=2000, checkpoint__every=None)
    with runs.started(settings, first, at_step=2, ranks=1):
        refused = runs.attempt(settings, ranks=1, resume="auto")
        assert refused.returncode != 0
        assert "is in use by process" in refused.stdout
    runs.train(runs.overrides(data, second, train__max_steps=4), ranks=1)
    other = runs.attempt(
        runs.overrides(data, first, train__max_steps=2000, checkpoint__every=None),
        ranks=1,
        resume=str(second / "checkpoints" / "step-4"),
    )
    assert other.returncode != 0
    assert "belongs to another run" in other.stdout


def test_a_changed_run_is_refused(data, tmp_path):
    run = tmp_path / "run"
    runs.train(runs.overrides(data, run, train__max_steps=3, checkpoint__every=3), ranks=1)
    for change, said in (
        ({"train__global_batch_size": 16}, "train.global_batch_size is 16"),
        ({"run__seed": 4}, "run.seed is 4"),
        ({"objective__masking": "bernoulli"}, "objective.masking is 'bernoulli'"),
        ({"train__precision": "fp32"}, "train.precision is 'fp32'"),
    ):
        refused = runs.attempt(runs.overrides(data, run, train__max_steps=4, **change), ranks=1, resume="auto")
        assert refused.returncode != 0
        assert said in refused.stdout
    again = runs.attempt(runs.overrides(data, run, train__max_steps=4), ranks=1)
    assert again.returncode != 0
    assert "already holds a run" in again.stdout
    asked = {"train__global_batch_size": 16, "train__change_batch_size": True}
    output = runs.train(runs.overrides(data, run, train__max_steps=4, **asked), ranks=1, resume="auto")
    assert "the checkpoint was trained with 8: changed from step 3, data_pos 24 on, as asked" in output
    assert [record["data_pos"] for record in runs.metrics(run)] == [8, 16, 24, 40]


def test_a_run_that_is_not_finite_stops_and_says_where(data, tmp_path):
    run = tmp_path / "run"
    settings = runs.overrides(data, run, optimizer__lr=1e30, optimizer__warmup_steps=0, guards__max_consecutive_skips=3)
    ended = runs.attempt(settings, ranks=1)
    assert ended.returncode != 0
    assert "3 steps in a row were skipped" in ended.stdout
    assert "Traceback" not in ended.stdout
    assert [record["skipped"] for record in runs.metrics(run)][-3:] == [True] * 3
