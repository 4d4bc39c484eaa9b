"""The loss over two ranks, ZeRO 0-3 and accumulation, against full logits in fp64 with one global denominator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed import runs
from tests.distributed.loss_zero_worker import (
    ACCUMULATION,
    CASES,
    HEADS,
    Case,
    denominator,
    head_terms,
    l2wrap,
    make_model,
    micro_batch_of,
    supervised,
)

pytestmark = pytest.mark.distributed

WORLD = 2
Results = dict[Case, list[tuple[Tensor, dict[str, Tensor]]]]


def _run(folder: Path, repeats: int) -> Results:
    runs.run_workers("tests.distributed.loss_zero_worker", WORLD, folder, str(repeats))
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return _run(tmp_path_factory.mktemp("zero"), repeats=1)


def _reference(case: Case) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole global batch from full logits in fp64, weights rounded as the run's were.

    L2Wrap's gradient is that of half the square of each row's highest logit, which the loss does not show.
    """
    _, backbone, tied, precision = case
    model = make_model(backbone, tied)
    terms = head_terms(case)
    if precision == "bf16":
        model = model.bfloat16()
    model = model.double()
    total, squares = torch.zeros(2, dtype=torch.float64).unbind()
    for rank in range(WORLD):
        for index in range(ACCUMULATION):
            batch = micro_batch_of(case, rank, index)
            logits = model(batch["input_ids"]).logits.flatten(0, 1)[batch["supervised"]]
            rows = torch.nn.functional.cross_entropy(
                logits, batch["targets"], reduction="none", label_smoothing=terms["label_smoothing"]
            )
            entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
            right = logits.argmax(dim=1) == batch["targets"]
            rows = rows + terms["confidence_weight"] * torch.where(right, entropy, 0.0)
            total = total + (rows * batch["weights"].double()).sum()
            squares = squares + logits.amax(dim=1).square().sum()
    total = total / denominator(WORLD)
    (total + 0.5 * l2wrap(backbone, tied) / supervised(WORLD) * squares).backward()
    return total.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"zero{case[0]}-{case[1]}-{'tied' * case[2]}-{case[3]}")
def test_loss_and_gradients_equal_full_logits_in_fp64(case: Case, results: Results) -> None:
    precision = case[3]
    loss, gradients = results[case][0]
    reference_loss, reference = _reference(case)
    assert loss.item() == pytest.approx(reference_loss, rel=1e-6 if precision == "fp32" else 3e-3)
    assert gradients.keys() == reference.keys()
    for name, expected in reference.items():
        error = (gradients[name].double() - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < (1e-5 if precision == "fp32" else 0.05), (name, float(error))


@pytest.mark.slow
def test_the_zero3_gather_gives_the_same_bits_every_time(tmp_path: Path) -> None:
    """A gather that races on CPU has been reported for DeepSpeed: 20 engines per head must agree to the bit."""
    results = _run(tmp_path, repeats=20)
    assert len(results) == len(HEADS)
    for case, repeats in results.items():
        assert len(repeats) == 20
        first_loss, first = repeats[0]
        for loss, gradients in repeats[1:]:
            assert torch.equal(loss, first_loss), case
            assert all(torch.equal(gradients[name], first[name]) for name in first), case
