"""The EMA of the weights: the plain formula on whole masters, through every layout, skip and rollback."""

import math

import pytest
import torch

from dlm_dist import models
from dlm_dist.config import ConfigError
from dlm_dist.training import checkpoint, zero_state
from dlm_dist.training.checkpoint_contents import Contents, differences
from dlm_dist.training.checkpoint_files import CheckpointError
from dlm_dist.training.checkpoint_snapshot import HostBuffers, take_snapshot
from dlm_dist.training.checkpoint_writer import CheckpointWriter
from dlm_dist.training.elastic import SavedShards
from dlm_dist.training.resume import Resume, average_notes
from dlm_dist.training.weight_average import WeightAverage, decay
from tests.training.conftest import run_steps, save_checkpoint, tiny_config, tiny_engine

LAYOUTS = {
    "0": ("zero.stage=0",),
    "1": ("zero.stage=1",),
    "2": ("zero.stage=2",),
    "3": ("zero.stage=3",),
    "3, sub-groups": ("zero.stage=3", "deepspeed.zero_optimization.sub_group_size=2000"),
}
BATCH, HALF_LIFE = 4, 10


def by_parameter(engine, tensor_of):
    """Whole fp32 vectors from what `tensor_of` gives for each shard."""
    pieces = [
        (piece.name, piece.start, tensor_of(shard)[piece.offset : piece.offset + piece.numel].clone())
        for shard in zero_state.shards(engine)
        for piece in shard.pieces
    ]
    names = dict.fromkeys(name for name, _, _ in pieces)
    ordered = sorted(pieces, key=lambda piece: piece[1])
    return {name: torch.cat([values for owner, _, values in ordered if owner == name]) for name in names}


def masters(engine):
    return by_parameter(engine, lambda shard: shard.flat)


def train(engine, average, first, count):
    """Steps with an update of the average behind each -> masters behind each."""
    found = []
    for step in range(first, first + count):
        run_steps(engine, step, 1)
        average.update((step + 1) * BATCH, BATCH)
        found.append(masters(engine))
    return found


def save(engine, average, folder, step, buffers=None):
    return save_checkpoint(engine, folder, {"global_step": step}, average=average, buffers=buffers)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_half_of_the_weight_is_gone_after_a_half_life():
    data_pos = 10**6
    whole = math.prod(decay(1000, data_pos + n, 8) for n in range(0, 1000, 8))
    assert whole == pytest.approx(0.5)
    assert decay(1000, data_pos, 16) == pytest.approx(decay(1000, data_pos, 8) ** 2), "whatever the batch size"
    # At the start a twentieth of what there was so far counts half: initial weights are soon gone.
    assert decay(10**9, 8000, 8) == pytest.approx(0.5 ** (8 / 400))
    assert math.prod(decay(10**9, n, 8) for n in range(8, 8008, 8)) < 1e-12


@pytest.mark.parametrize(
    ("layout", "precision", "optimizer"),
    [
        ("0", "fp32", "adamw"),
        ("0", "bf16", "adamw8bit"),
        ("1", "bf16", "lion8bit"),
        ("2", "bf16", "adamw8bit"),
        ("2", "fp32", "adamw"),
        ("3", "bf16", "adamw8bit"),
        ("3, sub-groups", "fp32", "lion8bit"),
    ],
)
def test_it_is_the_plain_average_of_the_masters(layout, precision, optimizer):
    engine, _ = tiny_engine(*LAYOUTS[layout], f"train.precision={precision}", f"optimizer.name={optimizer}")
    average = WeightAverage(engine, HALF_LIFE)
    expected = masters(engine)
    assert_equal(by_parameter(engine, average.of), expected)
    for number, behind in enumerate(train(engine, average, 0, 5), 1):
        share = 0.5 ** (BATCH / min(HALF_LIFE, 0.05 * number * BATCH))
        expected = {name: share * old + (1.0 - share) * behind[name] for name, old in expected.items()}
    for name, value in by_parameter(engine, average.of).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8)
        assert not torch.equal(value, behind[name])


def test_a_chain_through_all_stages_keeps_its_bits(tmp_path):
    """And the average goes on from there as it would have."""
    options = ("train.precision=bf16", "optimizer.name=adamw8bit")
    engine, _ = tiny_engine(*options, *LAYOUTS["2"])
    average = WeightAverage(engine, HALF_LIFE)
    train(engine, average, 0, 2)
    saved, path = by_parameter(engine, average.of), save(engine, average, tmp_path / "start", 2)
    train(engine, average, 2, 1)
    later = by_parameter(engine, average.of)
    for layout in ["0", "3", "1", "3, sub-groups", "2"]:
        engine, _ = tiny_engine(*options, *LAYOUTS[layout], model=models.load(path, dtype=torch.float32))
        checkpoint.load_shards(engine, path)
        average = WeightAverage(engine, HALF_LIFE)
        average.load(path)
        assert_equal(by_parameter(engine, average.of), saved)
        path = save(engine, average, tmp_path / layout, 2)
        train(engine, average, 2, 1)
        for name, value in by_parameter(engine, average.of).items():
            torch.testing.assert_close(value, later[name], rtol=2e-3, atol=1e-5)
    assert_equal(by_parameter(engine, average.of), later)


@pytest.mark.parametrize("layout", ["0", "2", "3"])
def test_a_rollback_brings_it_back(layout, tmp_path):
    engine, _ = tiny_engine(*LAYOUTS[layout], "optimizer.name=adamw8bit")
    average = WeightAverage(engine, HALF_LIFE)
    bare = save(engine, None, tmp_path / "bare", 0)
    initial = masters(engine)
    train(engine, average, 0, 2)
    path, then = save(engine, average, tmp_path, 2), by_parameter(engine, average.of)
    train(engine, average, 2, 2)
    behind = by_parameter(engine, average.of)
    checkpoint.put_back(engine, path, average)
    assert_equal(by_parameter(engine, average.of), then)
    train(engine, average, 2, 2)
    assert_equal(by_parameter(engine, average.of), behind)
    # A checkpoint from before the average was asked for.
    checkpoint.put_back(engine, bare, average)
    assert_equal(by_parameter(engine, average.of), initial)


def test_an_asynchronous_save_holds_it_still(tmp_path):
    engine, _ = tiny_engine("zero.stage=1")
    average = WeightAverage(engine, HALF_LIFE)
    train(engine, average, 0, 1)
    then = by_parameter(engine, average.of)
    writer = CheckpointWriter(tmp_path)
    snapshot = take_snapshot(engine, 1, {"global_step": 1}, {}, HostBuffers(), average)
    train(engine, average, 1, 2)
    writer.start(snapshot)
    writer.finish()
    writer.close()
    contents = Contents(tmp_path / "step-1")
    assert_equal({name: contents.read(name, "ema").view(-1) for name in contents.shapes}, then)


def test_diff_sees_it(tmp_path):
    engine, _ = tiny_engine("zero.stage=2")
    average = WeightAverage(engine, HALF_LIFE)
    path = save(engine, average, tmp_path / "one", 0)
    bare = save(engine, None, tmp_path / "bare", 0)
    average.of(zero_state.shards(engine)[0])[0] += 1.0
    moved = save(engine, average, tmp_path / "other", 0)
    (found,) = differences(Contents(path), Contents(moved))
    assert (found.what, found.largest) == ("ema", pytest.approx(1.0))
    missing = list(differences(Contents(path), Contents(bare)))
    assert {(one.what, one.largest) for one in missing} == {("ema", None)}
    assert len(missing) == len(Contents(path).shapes)


def test_an_average_of_some_shards_only_is_refused(tmp_path):
    engine, _ = tiny_engine("zero.stage=2")
    path = save(engine, WeightAverage(engine, HALF_LIFE), tmp_path, 0)
    index = path / "tensors" / "rank-00000.json"
    index.write_text(index.read_text().replace('"ema": true', '"ema": false', 1))
    saved = SavedShards(path, zero_state.parameter_sizes(engine))
    with pytest.raises(CheckpointError, match="some of its shards have an EMA and some have none"):
        _ = saved.has_ema


@pytest.mark.parametrize(
    ("before", "here", "said"),
    [
        (None, None, None),
        (100, 100, None),
        (None, 100, "has no EMA: it starts from the weights of step-4"),
        (100, None, "the EMA of step-4 is dropped"),
        (100, 200, "is 200, and was 100 up to step-4: its EMA goes on"),
    ],
)
def test_a_resume_says_what_becomes_of_it(before, here, said, tmp_path):
    notes = average_notes(Resume(tmp_path / "step-4", {"ema_half_life": before}), here)
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]
    if before is None:
        assert average_notes(Resume(tmp_path / "step-4", {}), here) == notes, "checkpoints of older versions"


def test_its_other_name_is_known():
    with pytest.raises(ConfigError, match=r"train\.ema_half_life"):
        tiny_config("train.ema_decay=0.9999")
    with pytest.raises(ConfigError, match=r"train\.ema_half_life"):
        tiny_config("train.ema_half_life=0")
