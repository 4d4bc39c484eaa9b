"""Steps of different sizes in one run: what each holds, when its update comes, and what its gradient is."""

import json
import math

import numpy as np
import pytest
import torch

from data_pipeline.loader import SampleStream
from dlm_dist.config import load_config, resolve_batch
from dlm_dist.training.batches import gather_totals, prepare_step
from dlm_dist.training.engine import gradient_norm, set_learning_rate
from dlm_dist.training.objective import make_objective
from dlm_dist.training.run import train
from dlm_dist.training.sources import open_sources
from tests.data_pipeline.test_token_files import write_llmc
from tests.distributed import runs
from tests.training.conftest import micro_batch, tiny_engine

LENGTH = 32


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_update_comes_with_the_last_of_any_number_of_micro_batches(stage, precision):
    """Learning rate 0: every gradient is that of the first weights, so parts of it add up."""
    engine, _ = tiny_engine(f"zero.stage={stage}", f"train.precision={precision}", "train.gradient_clipping=0")
    alone = []
    set_learning_rate(engine, 0.0)
    for counts in ([0], [1], [2], [0, 1], [0, 1, 2], [1], [0, 1, 2]):
        for number in counts:
            engine.set_gradient_accumulation_boundary(number == counts[-1])
            engine.backward(engine(**micro_batch(number)) / 48, scale_wrt_gas=False)
            engine.step()
        assert engine.was_step_applied()
        alone.append(gradient_norm(engine))
    one, two, three, pair, all_three, again, last = alone
    assert again == two
    assert last == all_three
    assert max(one, two) < pair <= (one + two) * 1.001
    assert math.sqrt(one**2 + two**2 + three**2) * 0.9 < all_three <= (one + two + three) * 1.001


def test_steps_hold_what_the_ramp_says_and_rows_and_noise_stay_those_of_their_positions(tmp_path):
    write_llmc(tmp_path / "train.bin", np.random.default_rng(0).integers(0, 250, 1 + 64 * LENGTH))
    settings = [
        *runs.MODELS["qwen3"],
        *(f"run.dir={tmp_path / 'run'}", f"data.train.0.path={tmp_path / 'train.bin'}", "data.tokenizer=bytes"),
        *(f"data.sequence_length={LENGTH}", "train.global_batch_size=16", "train.micro_batch_size=2"),
        *("train.batch_size_ramp=[[6, 4], [20, 8]]", "train.max_epochs=1", "train.device=cpu", "checkpoint.every=3"),
    ]
    config = load_config(None, settings)
    train(config, torch.device("cpu"), None, [])
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    spans = [tuple(record["positions"]) for record in found]
    # 64 rows: what is left of the epoch behind 56 is no whole step.
    assert spans == [(0, 4), (4, 8), (8, 16), (16, 24), (24, 40), (40, 56)]
    assert [record["data_pos"] for record in found] == [end for _, end in spans]
    sources = open_sources(config)
    objective, plan = make_objective(config, sources[0]), resolve_batch(config.train, 1)
    stream = SampleStream(sources, [1.0], config.run.seed)
    for (start, end), record in zip(spans, found, strict=True):
        # The same rows one by one, whatever steps they are in.
        whole, *parts = [
            prepare_step(stream.read, objective, stream.positions(first, size), plan, 0, 1)
            for first, size in [(start, end - start), *((position, 1) for position in range(start, end))]
        ]
        assert np.array_equal(whole.digests, np.concatenate([part.digests for part in parts], axis=1))
        assert gather_totals(whole, None, False, False).noise_sha256 == record["noise_sha256"]
    # On from step 3, which the second phase holds, with the same steps behind it.
    (tmp_path / "run" / "checkpoints" / "step-6").rename(tmp_path / "away")
    train(config, torch.device("cpu"), "auto", [])
    again = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for key in runs.EXACT:
        assert [record[key] for record in again] == [record[key] for record in found], key
