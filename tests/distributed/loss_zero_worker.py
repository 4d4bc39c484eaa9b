"""One rank of test_loss_zero: the loss and its full gradients under a ZeRO stage, as numbers in a file.

Started as `python -m tests.distributed.loss_zero_worker RANK WORLD FOLDER REPEATS`. Rank 0 writes
FOLDER/result.pt: for each case and repeat the loss of the global batch and the gradient of every parameter.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dlm_dist.models import build
from launcher.leaving import leave

ACCUMULATION = 2
BATCH, LENGTH, VOCABULARY = 2, 12, 211

# (backbone, tied head): RWKV-7 has no tied head.
HEADS = (("qwen3", False), ("qwen3", True), ("rwkv7", False))
STAGES = (0, 1, 2, 3)
Case = tuple[int, str, bool, str]  # stage, backbone, tied, precision

# bf16 at stage 0 goes through another DeepSpeed optimizer with a trap of its own; the trainer's tests cover it.
CASES: tuple[Case, ...] = (
    *((stage, backbone, tied, "fp32") for stage in STAGES for backbone, tied in HEADS),
    *((stage, "qwen3", tied, "bf16") for stage in STAGES[1:] for tied in (False, True)),
)


def make_model(backbone: str, tied: bool) -> PreTrainedModel:
    """A tiny model, the same on every rank."""
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "mask_token_id": VOCABULARY - 1, "num_hidden_layers": 2}
    if backbone == "qwen3":
        sizes |= {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "tie_word_embeddings": tied}
    else:
        sizes |= {"hidden_size": 64, "head_size": 32, "direction": "bidirectional"}
    model = build(backbone, seed=5, **sizes)
    for name, parameter in model.named_parameters():
        # The x070 init has zeros that would hide most gradients; and a larger head makes the loss depend on the rows.
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data.add_(noise, alpha=0.1)
    return model


def micro_batch(rank: int, index: int) -> dict[str, Tensor]:
    """The rows of one micro-batch; the second one of rank 1 supervises nothing at all."""
    generator = torch.Generator().manual_seed(100 * rank + index)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    count = 0 if (rank, index) == (1, 1) else 5 + 4 * rank + 3 * index
    return {
        "input_ids": ids,
        "supervised": torch.randperm(BATCH * LENGTH, generator=generator)[:count].sort().values,
        "targets": torch.randint(VOCABULARY, (count,), generator=generator),
        "weights": torch.rand(count, generator=generator) + 0.5,
    }


def micro_batch_of(case: Case, rank: int, index: int) -> dict[str, Tensor]:
    """`micro_batch`; in fp32 every other target is the one that the model thinks likeliest, for the confidence term."""
    batch = micro_batch(rank, index)
    if case[3] == "fp32" and len(batch["targets"]) > 0:
        with torch.no_grad():
            logits = make_model(case[1], case[2])(batch["input_ids"]).logits.flatten(0, 1)[batch["supervised"]]
        batch["targets"][::2] = logits.argmax(dim=1)[::2]
    return batch


def head_terms(case: Case) -> dict[str, float]:
    """Label smoothing everywhere; the confidence term, which no bf16 tie shall decide, in fp32."""
    return {"label_smoothing": 0.2, "confidence_weight": 1.5 if case[3] == "fp32" else 0.0}


def l2wrap(backbone: str, tied: bool) -> float:
    """Strength of L2Wrap in a mean over the supervised rows of the whole step; far above BlinkDL's, to be seen."""
    return 0.1 if backbone == "rwkv7" or tied else 0.0


def supervised(world: int) -> int:
    """How many rows enter the loss of the whole step."""
    return sum(len(micro_batch(rank, index)["targets"]) for rank in range(world) for index in range(ACCUMULATION))


def denominator(world: int) -> int:
    """One number for the whole step: all tokens of all micro-batches of all ranks."""
    return world * ACCUMULATION * BATCH * LENGTH


def _engine(case: Case) -> Any:
    import deepspeed

    stage, backbone, tied, precision = case
    model = make_model(backbone, tied)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        config={
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": precision == "bf16"},
            # Otherwise ZeRO-3 replaces F.linear for every engine that comes after it in this process.
            "zero_optimization": {
                "stage": stage,
                "memory_efficient_linear": False,
                "stage3_param_persistence_threshold": 0,
            },
        },
    )
    return engine


def _step(engine: Any, case: Case, rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The global loss of one optimizer step and the full gradient of each parameter, every term of the head in them."""
    from deepspeed.utils import safe_get_full_grad

    extra = {"l2wrap": l2wrap(case[1], case[2]) * denominator(world) / supervised(world), **head_terms(case)}
    total = torch.zeros(())
    for index in range(ACCUMULATION):
        loss = engine(**micro_batch_of(case, rank, index), **extra) / denominator(world)
        total += loss.detach()
        # DeepSpeed divides by the accumulation steps and averages over the ranks.
        engine.backward(loss * (ACCUMULATION * world))
        if index + 1 < ACCUMULATION:
            engine.step()
    gradients = {}
    for name, parameter in engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter)
        assert gradient is not None, name
        gradients[name] = gradient.detach().float().clone()
    engine.step()
    torch.distributed.all_reduce(total)
    return total, gradients


def main(rank: int, world: int, folder: Path, repeats: int) -> None:
    """With `repeats` > 1: only the ZeRO-3 cases in fp32, each that many times with a new engine."""
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, auto_mpi_discovery=False
    )
    cases = CASES if repeats == 1 else [case for case in CASES if case[0] == 3 and case[3] == "fp32"]
    results: dict[Case, list[tuple[Tensor, dict[str, Tensor]]]] = {case: [] for case in cases}
    for case in cases:
        for _ in range(repeats):
            engine = _engine(case)
            results[case].append(_step(engine, case, rank, world))
            engine.destroy()
    if rank == 0:
        torch.save(results, folder / "result.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    leave(0)
