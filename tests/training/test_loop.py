"""What the loop hands to the model, and how it scales what comes back."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dlm_dist.config import resolve_batch
from dlm_dist.diffusion.time_buckets import TIME_BUCKETS
from dlm_dist.training.batches import RankStep, StepTotals
from dlm_dist.training.guards import Guards
from dlm_dist.training.phases import PhaseClock
from dlm_dist.training.progress import Progress
from dlm_dist.training.step import Stepper
from dlm_dist.training.stop_requests import StopRequest
from tests.training.conftest import micro_batch, tiny_config, tiny_model


class PlainEngine(SimpleNamespace):
    """An engine of one rank without an optimizer: gradients stay where autograd leaves them."""

    def __call__(self, **inputs):
        self.calls.append(inputs)
        return self.module(**inputs)

    def set_gradient_accumulation_boundary(self, is_boundary):
        pass

    def backward(self, loss, scale_wrt_gas):
        loss.backward()

    def step(self):
        pass


def gradients(l2wrap: float, scored: list[int], scale_of_weights: float = 1.0, changes: tuple[str, ...] = ()):
    """(loss, gradients, keyword arguments of the first forward) of a step with micro-batches of `scored` rows."""
    config = tiny_config(f"objective.l2wrap={l2wrap}", *changes)
    engine = PlainEngine(module=tiny_model(), calls=[])
    stepper = Stepper(
        config=config,
        plan=resolve_batch(config.train, 1),
        max_steps=3,
        engine=engine,
        device=torch.device("cpu"),
        host_group=None,
        read_ahead=None,
        head_settings={},
        is_bound=True,
        peak_flops=1.0,
        log=None,
        writer=None,
        alarm=lambda: None,
        guards=Guards(),
        stop=StopRequest(None),
        clock=PhaseClock(torch.device("cpu")),
        figures=None,
    )
    micro_batches = []
    for number, count in enumerate(scored):
        batch = micro_batch(number)
        batch |= {name: batch[name][:count] for name in ("supervised", "targets", "weights")}
        batch["weights"] = batch["weights"] * scale_of_weights
        micro_batches.append(batch)
    size = 16 * len(scored)
    totals = StepTotals(size, sum(scored), size, None, size, (0,) * TIME_BUCKETS, "", "", False, False)
    step = RankStep(
        micro_batches=micro_batches,
        counts=np.zeros(5, dtype=np.int64),
        digests=np.zeros((2, 4, 32), dtype=np.uint8),
        span=(0, 4),
        tokens_by_time=np.zeros(TIME_BUCKETS, dtype=np.int64),
        time_buckets=None,
    )
    loss = stepper._train_step(step, totals, Progress()).loss
    return loss, {name: parameter.grad for name, parameter in engine.module.named_parameters()}, engine.calls[0]


@pytest.mark.parametrize("scored", [[16, 16], [3, 5], [8, 0]])
def test_l2wrap_is_a_mean_over_the_scored_rows_of_the_step(scored):
    """Its strength depends neither on how much is hidden, nor on the rows' weights, nor on the micro-batches."""
    plain_loss, plain, _ = gradients(0.0, scored, scale_of_weights=7.0)
    loss, wrapped, _ = gradients(0.5, scored, scale_of_weights=7.0)
    assert loss == plain_loss
    model = tiny_model()
    squares = torch.zeros(())
    for number, count in enumerate(scored):
        batch = micro_batch(number)
        logits = model(input_ids=batch["input_ids"]).logits.flatten(0, 1)[:count]
        squares = squares + logits.amax(dim=1).square().sum()
    (0.5 / 2 * squares / sum(scored)).backward()
    for name, parameter in model.named_parameters():
        difference = wrapped[name] - plain[name]
        assert (difference - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-8, name


def test_z_loss_is_a_mean_over_the_scored_rows_and_no_part_of_the_loss():
    from dlm_dist.models.loss_head import LossHead

    seen = []
    forward = LossHead.forward

    def spy(self, *arguments, **named):
        seen.append((arguments, named))
        return forward(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossHead, "forward", spy)
        plain, _, _ = gradients(0.0, [3, 5])
        loss, _, call = gradients(0.0, [3, 5], changes=("objective.z_loss=0.25",))
    assert loss == plain
    # 32 tokens are accounted for, 8 of them enter the loss.
    assert call["z_loss"] == 0.25 * 32 / 8
    assert seen[-1][0][-1] == call["z_loss"]


def test_without_l2wrap_the_model_is_not_asked_for_it():
    assert "l2wrap" not in gradients(0.0, [4])[2]
    assert "l2wrap" in gradients(1e-4, [4])[2]


def test_what_the_model_reads_is_counted():
    """Two streams of block diffusion, several draws of a row: each is read."""
    from dlm_dist.config import BatchPlan
    from dlm_dist.diffusion.objectives import OBJECTIVES, Vocabulary
    from dlm_dist.training.batches import gather_totals, prepare_step
    from tests.diffusion.test_block_diffusion import rows

    vocabulary = Vocabulary(mask_id=30, eos_id=0, size=30)
    for name, extra, streams in (
        ("mdlm", {}, 1),
        ("mdlm", {"draws_per_row": 2}, 2),
        ("block", {"block_lengths": ((0, 4),)}, 2),
        ("block", {"block_lengths": ((0, 0),)}, 1),
    ):
        objective = OBJECTIVES[name](seed=1, vocabulary=vocabulary, **extra)
        read = rows(8, 12)
        step = prepare_step(
            lambda at, read=read: read[at[0] : at[-1] + 1], objective, read.positions, BatchPlan(8, 4, 2), 0, 1
        )
        totals = gather_totals(step, None, ready=False, alarm=False)
        assert totals.read == streams * 8 * 12, name
        with_memory = gather_totals(step, None, ready=False, alarm=False, memory=[7, 9])
        assert with_memory == replace(totals, memory=(7, 9))
