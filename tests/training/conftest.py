import pytest
import torch

from dlm_dist.config import RunConfig, load_config, resolve_batch
from dlm_dist.training.distributed import start_distributed

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "mask_token_id": 60,
}


@pytest.fixture(scope="session", autouse=True)
def world_of_one():
    return start_distributed("cpu")


def tiny_model(seed=0):
    from dlm_dist import models

    return models.build("qwen3", seed=seed, **SIZES)


def tiny_config(*changes: str) -> RunConfig:
    return load_config(
        None,
        [
            "run.dir=unused",
            "model.backbone=qwen3",
            "model.hidden_size=32",
            "model.num_hidden_layers=2",
            "model.num_attention_heads=2",
            "data.train.0.path=unused",
            "train.max_steps=3",
            "train.global_batch_size=4",
            "train.micro_batch_size=2",
            "optimizer.weight_decay=0.1",
            *changes,
        ],
    )


def tiny_engine(*changes: str, model=None):
    from dlm_dist.training.engine import build_engine
    from dlm_dist.training.starting_model import whole_parts

    config = tiny_config(*changes)
    model = model if model is not None else tiny_model()
    engine, table = build_engine(model, config, resolve_batch(config.train, 1), whole_parts(model))
    engine.train()
    return engine, table


def micro_batch(number):
    ids = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "supervised": torch.arange(16), "targets": ids.view(-1), "weights": torch.ones(16)}


def run_steps(engine, first, count, spoil=None, accumulation=2, lr=1e-3):
    """Losses, gradient norms and applied flags of `count` steps; spoil(step, micro) multiplies a micro-batch's loss."""
    from dlm_dist.training.engine import gradient_norm, set_learning_rate

    results = []
    for step in range(first, first + count):
        set_learning_rate(engine, lr)
        for micro in range(accumulation):
            loss = engine(**micro_batch(step * accumulation + micro))
            factor = spoil(step, micro) if spoil is not None else 1.0
            engine.backward(loss * factor / (16 * accumulation), scale_wrt_gas=False)
            engine.step()
        results.append((loss.item(), gradient_norm(engine), engine.was_step_applied()))
    return results


def save_checkpoint(engine, folder, state, files=None, average=None, buffers=None):
    """A published checkpoint of `engine` with this trainer state -> its path."""
    from dlm_dist.training.checkpoint_snapshot import take_snapshot
    from dlm_dist.training.checkpoint_writer import CheckpointWriter

    writer = CheckpointWriter(folder)
    step = state["global_step"]
    writer.start(take_snapshot(engine, step, state, files or {}, buffers, average))
    writer.finish()
    writer.close()
    return folder / f"step-{step}"
