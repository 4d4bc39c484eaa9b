"""The blocked loss against full logits in fp64, and the promise that logits are never held whole."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dlm_dist.kernels import vocabulary_blocks
from dlm_dist.kernels.cross_entropy import (
    cross_entropy_rows,
    weighted_cross_entropy,
    weighted_cross_entropy_sum,
)
from dlm_dist.models.loss_head import LossHead


def _inputs(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).mul(0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator) * 3
    return hidden, weight, targets, weights


def _reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, its two gradients and the rows' losses from full logits in fp64."""
    wide_hidden = hidden.detach().double().requires_grad_()
    wide_weight = weight.detach().double().requires_grad_()
    rows = torch.nn.functional.cross_entropy(wide_hidden @ wide_weight.t(), targets, reduction="none")
    total = (rows * weights.double()).sum()
    grad_hidden, grad_weight = torch.autograd.grad(total, (wide_hidden, wide_weight))
    return total.detach(), grad_hidden, grad_weight, rows.detach()


def _relative(value: Tensor, reference: Tensor) -> float:
    return float((value.detach().double() - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("block_size", [1, 7, 64, 101, 4096, None])
def test_fp32_loss_and_gradients_equal_fp64_full_logits_for_any_block(block_size: int | None) -> None:
    hidden, weight, targets, weights = _inputs(33, 16, 101, torch.float32)
    loss, grad_hidden, grad_weight, rows = _reference(hidden, weight, targets, weights)
    total, row_losses = weighted_cross_entropy(hidden, weight, targets, weights, block_size)
    (total * 0.25).backward()
    assert total.dtype == row_losses.dtype == torch.float32
    assert not row_losses.requires_grad
    assert _relative(total, loss) < 1e-6
    assert _relative(row_losses, rows) < 1e-6
    assert _relative(hidden.grad, grad_hidden / 4) < 1e-5
    assert _relative(weight.grad, grad_weight / 4) < 1e-5
    assert torch.equal(cross_entropy_rows(hidden, weight, targets, block_size), row_losses)


def test_bf16_matmuls_keep_an_fp32_loss() -> None:
    hidden, weight, targets, weights = _inputs(300, 64, 3000, torch.bfloat16)
    loss, grad_hidden, grad_weight, rows = _reference(hidden, weight, targets, weights)
    total, row_losses = weighted_cross_entropy(hidden, weight, targets, weights, 512)
    total.backward()
    assert total.dtype == torch.float32
    assert _relative(total, loss) < 1e-3
    # One rounding of a logit to bf16 is 2^-9 of it; the largest logits here are about 20.
    assert float((row_losses.double() - rows).abs().max()) < 0.08
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert _relative(hidden.grad, grad_hidden) < 0.02
    assert _relative(weight.grad, grad_weight) < 0.02


def test_the_gradient_of_hidden_is_accumulated_in_fp32() -> None:
    """512 blocks of 8 ids: a bf16 accumulator would be off by far more than one final rounding."""
    hidden, weight, targets, weights = _inputs(40, 32, 4096, torch.bfloat16)
    _, grad_hidden, _, _ = _reference(hidden, weight, targets, weights)
    many, few = hidden.detach().clone().requires_grad_(), hidden.detach().clone().requires_grad_()
    weighted_cross_entropy_sum(many, weight, targets, weights, 8).backward()
    weighted_cross_entropy_sum(few, weight, targets, weights, 4096).backward()

    def rms(gradient: Tensor) -> float:
        return float((gradient.double() - grad_hidden).pow(2).mean().sqrt())

    assert rms(many.grad) < 1.3 * rms(few.grad)


def test_gradcheck_in_fp64_including_the_weights() -> None:
    hidden, weight, targets, weights = _inputs(5, 4, 11, torch.float64)
    weights = weights.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w, q: weighted_cross_entropy_sum(h, w, targets, q, 3), (hidden, weight, weights)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_rows_give_zero_loss_and_zero_gradients(dtype: torch.dtype) -> None:
    hidden, weight, targets, weights = _inputs(0, 8, 50, dtype)
    total, rows = weighted_cross_entropy(hidden, weight, targets, weights, 16)
    total.backward()
    assert total.item() == 0.0
    assert rows.shape == (0,)
    assert hidden.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_weights_scale_rows_and_a_zero_weight_removes_one() -> None:
    hidden, weight, targets, _ = _inputs(6, 8, 50, torch.float32)
    weights = torch.tensor([1.0, 0.0, 2.5, -1.0, 0.0, 1e-3])
    loss, grad_hidden, grad_weight, rows = _reference(hidden, weight, targets, weights)
    total = weighted_cross_entropy_sum(hidden, weight, targets, weights, 16)
    total.backward()
    assert total.item() == pytest.approx(float((rows * weights).sum()), rel=1e-6)
    assert torch.count_nonzero(hidden.grad[[1, 4]]) == 0
    assert _relative(hidden.grad, grad_hidden) < 1e-5
    assert _relative(weight.grad, grad_weight) < 1e-5
    assert float(loss) == pytest.approx(total.item(), rel=1e-6)


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    hidden, weight, targets, weights = _inputs(9, 8, 40, torch.float32)
    hidden = (hidden.detach() * 1e3).requires_grad_()
    loss, grad_hidden, _, _ = _reference(hidden, weight, targets, weights)
    total = weighted_cross_entropy_sum(hidden, weight, targets, weights, 6)
    total.backward()
    assert _relative(total, loss) < 1e-6
    assert _relative(hidden.grad, grad_hidden) < 1e-5


def _l2wrap_gradients(hidden: Tensor, weight: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """What L2Wrap adds to both gradients, from full logits (BlinkDL's formula, the strength per row)."""
    logits = (hidden.detach() @ weight.detach().t()).double()  # a logit rounded to bf16 may have equals
    highest, column = logits.max(dim=1)
    grad_logits = torch.zeros_like(logits).scatter_(1, column[:, None], (highest * strength)[:, None])
    return grad_logits @ weight.detach().double(), grad_logits.t() @ hidden.detach().double()


@pytest.mark.parametrize("block_size", [1, 7, 101, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2wrap_leaves_the_loss_and_adds_its_gradient_at_the_highest_logit(
    block_size: int | None, dtype: torch.dtype
) -> None:
    hidden, weight, targets, weights = _inputs(33, 16, 101, dtype)
    targets[:5] = (hidden @ weight.t()).argmax(dim=1)[:5]  # a target may be the highest logit itself
    results = []
    for l2wrap in (None, 0.25):
        total, rows = weighted_cross_entropy(hidden, weight, targets, weights, block_size, l2wrap)
        results.append((total, rows, *torch.autograd.grad(total * 0.5, (hidden, weight))))
    plain, wrapped = results
    assert torch.equal(plain[0], wrapped[0])
    assert torch.equal(plain[1], wrapped[1])
    expected = _l2wrap_gradients(hidden, weight, 0.25 * 0.5)
    for without, with_it, difference in zip(plain[2:], wrapped[2:], expected, strict=True):
        assert _relative(with_it - without, difference) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("block_size", [2, 4, 64])
def test_of_equal_highest_logits_the_lowest_id_takes_l2wrap(block_size: int) -> None:
    hidden = torch.ones(1, 2, requires_grad=True)
    weight = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 2.0], [0.5, 0.5], [3.0, 0.0]], requires_grad=True)
    gradients = []
    for l2wrap in (None, 1.0):
        total = weighted_cross_entropy(hidden, weight, torch.zeros(1).long(), torch.ones(1), block_size, l2wrap)[0]
        gradients.append(torch.autograd.grad(total, weight)[0])
    torch.testing.assert_close(gradients[1] - gradients[0], torch.tensor([[0.0], [3], [0], [0], [0]]).expand(-1, 2))


def test_l2wrap_in_bf16() -> None:
    hidden, weight, targets, weights = _inputs(300, 64, 3000, torch.bfloat16)
    # Rows of no weight leave L2Wrap alone in the gradient, so that it is not the difference of two rounded ones.
    total, _ = weighted_cross_entropy(hidden, weight, targets, torch.zeros_like(weights), None, 1e-2)
    total.backward()
    assert total == 0
    grad_hidden, grad_weight = _l2wrap_gradients(hidden, weight, 1e-2)
    assert (hidden.grad.double() - grad_hidden).norm() / grad_hidden.norm() < 0.01
    assert (weight.grad.double() - grad_weight).norm() / grad_weight.norm() < 0.01


def test_without_rows_the_gradient_of_a_loss_that_is_no_number_is_none_either() -> None:
    """So that a step whose last rows are none can still be refused."""
    hidden, weight, targets, weights = _inputs(0, 8, 11, torch.float32)
    total = weighted_cross_entropy(hidden, weight, targets, weights)[0]
    (gradient,) = torch.autograd.grad(total * math.nan, weight)
    assert gradient.isnan().all()


def test_l2wrap_without_rows_adds_nothing() -> None:
    hidden, weight, targets, weights = _inputs(0, 16, 101, torch.float32)
    total, _ = weighted_cross_entropy(hidden, weight, targets, weights, None, 1.0)
    total.backward()
    assert total == 0
    assert not weight.grad.any()


@dataclass(frozen=True)
class _Terms:
    """What is added to the cross entropy."""

    label_smoothing: float = 0.0
    confidence_weight: float = 0.0
    l2wrap: float = 0.0
    z_loss: float = 0.0

    def settings(self) -> dict[str, float]:
        return asdict(self)

    def reference(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Loss, losses of the rows and gradients (hidden, weight, weights) by autograd through full fp64 logits."""
        leaves = [value.detach().double().requires_grad_() for value in (hidden, weight, weights)]
        logits = leaves[0] @ leaves[1].t()
        log_p = logits.log_softmax(dim=1)
        nll = -log_p.gather(1, targets[:, None]).squeeze(1)
        rows = (1 - self.label_smoothing) * nll - self.label_smoothing * log_p.mean(dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        rows = rows + self.confidence_weight * torch.where(logits.argmax(dim=1) == targets, entropy, 0.0)
        total = (rows * leaves[2]).sum()
        drift = self.l2wrap / 2 * logits.amax(dim=1).square().sum()
        drift = drift + self.z_loss * logits.logsumexp(dim=1).square().sum()
        gradients = torch.autograd.grad(total + drift, leaves)
        return total.detach(), rows.detach(), gradients


_TERMS = (
    _Terms(label_smoothing=0.1),
    _Terms(confidence_weight=2.0),
    _Terms(label_smoothing=0.3, confidence_weight=0.5),
    _Terms(z_loss=0.3),
    _Terms(label_smoothing=0.1, confidence_weight=2.0, l2wrap=0.05, z_loss=0.02),
)


def _partly_right(dtype: torch.dtype, rows: int = 33) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of which two rows in three have the target that the head thinks likeliest, more or less surely."""
    hidden, weight, targets, weights = _inputs(rows, 16, 101, dtype)
    hidden.data.mul_(torch.linspace(0.1, 3.0, rows)[:, None])
    likeliest = (hidden.double() @ weight.double().t()).argmax(dim=1)
    right = torch.arange(rows) % 3 > 0
    return hidden, weight, torch.where(right, likeliest, targets), weights.requires_grad_()


@pytest.mark.parametrize("block_size", [1, 7, 64, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("terms", _TERMS, ids=str)
def test_label_smoothing_and_confidence_equal_full_logits_in_fp64(
    terms: _Terms, dtype: torch.dtype, block_size: int | None
) -> None:
    inputs = _partly_right(dtype)
    loss, rows, gradients = terms.reference(*inputs)
    total, row_losses = weighted_cross_entropy(*inputs, block_size, **terms.settings())
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    assert total.dtype == row_losses.dtype == dtype
    assert _relative(total, loss) < tolerance
    assert _relative(row_losses, rows) < tolerance
    hidden, weight, _, weights = inputs
    for ours, expected in zip(torch.autograd.grad(total * 0.5, (hidden, weight, weights)), gradients, strict=True):
        # fp32 weights of fp64 rows come back with fp32 gradients
        assert _relative(ours, expected / 2) < (1e-5 if dtype == torch.float32 else 1e-7)


def test_gradcheck_in_fp64_of_every_term() -> None:
    hidden, weight, targets, weights = _partly_right(torch.float64, rows=6)

    def total(h: Tensor, w: Tensor, q: Tensor) -> Tensor:
        return weighted_cross_entropy(h, w, targets, q, 30, label_smoothing=0.2, confidence_weight=1.5)[0]

    assert torch.autograd.gradcheck(total, (hidden, weight, weights.detach().double().requires_grad_()))


@pytest.mark.parametrize("terms", _TERMS[:3], ids=str)
def test_every_term_in_bf16(terms: _Terms) -> None:
    """Without L2Wrap, which may land on another of two logits that are nearly equal."""
    inputs = _partly_right(torch.bfloat16, rows=300)
    loss, _, gradients = terms.reference(*inputs)
    total, _ = weighted_cross_entropy(*inputs, 64, **terms.settings())
    assert total.dtype == torch.float32
    assert _relative(total, loss) < 5e-3
    for ours, expected in zip(torch.autograd.grad(total, inputs[:2]), gradients, strict=False):
        assert (ours.double() - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", [_Terms(), *_TERMS], ids=str)
def test_slabs_of_rows_change_no_bit(terms: _Terms, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, weights = _partly_right(dtype)
    found = []
    for elements in (2**18, 5 * 20, 1):  # all 33 rows, 5 of them, one by one
        monkeypatch.setattr(vocabulary_blocks, "_SLAB_ELEMENTS", elements)
        total, rows = weighted_cross_entropy(hidden, weight, targets, weights, 20, **terms.settings())
        found.append((total, rows, *torch.autograd.grad(total, (hidden, weight))))
    for other in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(other, found[0], strict=True))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_confidence_term_takes_right_rows_only(sign: float) -> None:
    """The gradient of a wrong row stays as it was, whatever the sign of the weight."""
    hidden, weight, targets, _ = _partly_right(torch.float64)
    weights = torch.full((33,), sign)
    found = []
    for confidence_weight in (0.0, 2.0):
        total, rows = weighted_cross_entropy(hidden, weight, targets, weights, 16, confidence_weight=confidence_weight)
        found.append((rows, torch.autograd.grad(total, hidden)[0]))
    changed = (found[0][1] - found[1][1]).abs().amax(dim=1) > 1e-9
    right = (hidden @ weight.t()).argmax(dim=1) == targets
    assert 15 < int(right.sum()) < 33
    assert torch.equal(changed, right)
    assert torch.equal(found[0][0][~right], found[1][0][~right])
    entropy = torch.distributions.Categorical(logits=(hidden @ weight.t()).detach()).entropy()
    torch.testing.assert_close((found[1][0] - found[0][0])[right], 2.0 * entropy[right])


def test_entropies_near_zero_and_near_their_maximum_keep_their_digits() -> None:
    """A running sum that is not centred on the highest logit would lose them at logits of 1000."""
    weight = torch.tensor([[1000.0], [990.0], [980.0], [0.0]])
    hidden = torch.tensor([[1.0], [0.01], [1e-6]])
    _, rows = weighted_cross_entropy(hidden, weight, torch.zeros(3).long(), torch.ones(3), 1, confidence_weight=1.0)
    entropy = rows - cross_entropy_rows(hidden, weight, torch.zeros(3).long(), 1)
    logits = hidden.double() @ weight.double().t()
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert float((entropy.double() / expected - 1).abs().max()) < 2e-3  # the difference of two rounded losses


@pytest.mark.parametrize("terms", _TERMS, ids=str)
def test_without_rows_no_term_adds_anything(terms: _Terms) -> None:
    hidden, weight, targets, weights = _inputs(0, 16, 101, torch.float32)
    total, rows = weighted_cross_entropy(hidden, weight, targets, weights, 16, **terms.settings())
    total.backward()
    assert total == 0
    assert rows.shape == (0,)
    assert not weight.grad.any()


class _Passes(TorchDispatchMode):
    """Counts the operations that read or write a whole block of logits."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        views = ("aten::view", "aten::slice", "aten::t", "aten::empty", "aten::new_empty", "aten::empty_like")
        if func._schema.name not in (*views, "aten::gather", "aten::scatter_add_"):
            values = [value for value in (result, *args) if isinstance(value, Tensor)]
            self.count += any(value.numel() == self.elements for value in values)
        return result


def test_a_term_that_is_off_costs_no_pass_over_the_logits() -> None:
    rows, block, blocks = 48, 32, 4
    hidden, weight, targets, weights = _inputs(rows, 7, block * blocks, torch.float32)

    def passes(**terms: float) -> float:
        with _Passes(rows * block) as counted:
            weighted_cross_entropy(hidden, weight, targets, weights, block, **terms)[0].backward()
        return counted.count / blocks

    # Scan: product, maximum, minus it, exp, sum. Gradients: product, minus lse, exp, times scale, two products.
    assert passes() == passes(label_smoothing=0.0, confidence_weight=0.0) == 11
    assert passes(label_smoothing=0.1) == 13  # a sum; minus the even part
    assert passes(confidence_weight=2.0) == 14  # times the exponent, sum; the slope of the scale


def test_terms_out_of_range_are_named() -> None:
    inputs = _inputs(4, 8, 40, torch.float32)
    for value in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="label_smoothing is"):
            weighted_cross_entropy(*inputs, label_smoothing=value)
    for value in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="confidence_weight is"):
            weighted_cross_entropy(*inputs, confidence_weight=value)


def test_the_head_hands_every_term_on() -> None:
    hidden, weight, targets, weights = _partly_right(torch.float32)
    head = LossHead(16, 101)
    head.weight.data.copy_(weight.data)
    terms = _TERMS[-1].settings()
    gradients = []
    for total, leaf in (
        (head(hidden, targets, weights, **terms), head.weight),
        (weighted_cross_entropy(hidden, weight, targets, weights, **terms)[0], weight),
    ):
        gradients.append((total, *torch.autograd.grad(total, (hidden, leaf))))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_a_nan_in_one_row_reaches_the_loss_and_the_gradient() -> None:
    hidden, weight, targets, weights = _inputs(4, 8, 40, torch.float32)
    hidden.data[2, 3] = torch.nan
    total = weighted_cross_entropy_sum(hidden, weight, targets, weights, 16)
    total.backward()
    assert torch.isnan(total)
    assert torch.isnan(weight.grad).any()


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, targets, weights = _inputs(6, 8, 50, torch.float32)
    _, grad_hidden, _, _ = _reference(hidden, weight, targets, weights)
    weight.requires_grad_(False)
    weighted_cross_entropy_sum(hidden, weight, targets, weights, 16).backward()
    assert weight.grad is None
    assert _relative(hidden.grad, grad_hidden) < 1e-5


def test_autocast_runs_the_products_in_half_precision_on_fp32_parameters() -> None:
    hidden, weight, targets, weights = _inputs(64, 32, 700, torch.float32)
    _, _, grad_weight, _ = _reference(hidden, weight, targets, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = weighted_cross_entropy_sum(hidden, weight, targets, weights, 256)
        total.backward()
    half = weighted_cross_entropy_sum(hidden.bfloat16(), weight.bfloat16(), targets, weights, 256)
    assert total.item() == half.item()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert _relative(weight.grad, grad_weight) < 0.02


class _LargestTensor(TorchDispatchMode):
    """Records the most elements any operation put into one freshly made tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_held_whole(dtype: torch.dtype) -> None:
    rows, width, vocabulary, block = 256, 8, 5000, 128
    hidden, weight, targets, weights = _inputs(rows, width, vocabulary, dtype)
    with _LargestTensor() as largest:
        weighted_cross_entropy_sum(hidden, weight, targets, weights, block).backward()
        cross_entropy_rows(hidden, weight, targets, block)
    assert largest.elements == max(rows * block, vocabulary * width)
    with _LargestTensor() as largest:
        weighted_cross_entropy_sum(hidden, weight, targets, weights, vocabulary)
    assert largest.elements == rows * vocabulary  # the instrument sees it when it is there


def test_mistakes_are_named() -> None:
    hidden, weight, targets, weights = _inputs(4, 8, 40, torch.float32)
    with pytest.raises(ValueError, match="the id 40, outside the vocabulary of 40"):
        weighted_cross_entropy_sum(hidden, weight, targets.fill_(40), weights)
    with pytest.raises(ValueError, match="the id -100, outside"):
        weighted_cross_entropy_sum(hidden, weight, targets.fill_(-100), weights)
    with pytest.raises(ValueError, match="ZeRO-3 has not gathered"):
        weighted_cross_entropy_sum(hidden, torch.empty(0), targets, weights)
    with pytest.raises(ValueError, match=r"weights must be \[4\]"):
        weighted_cross_entropy_sum(hidden, weight, targets.fill_(0), weights[:3])
    with pytest.raises(ValueError, match="block_size is 0"):
        weighted_cross_entropy_sum(hidden, weight, targets, weights, 0)


def test_the_head_gives_logits_or_the_loss() -> None:
    hidden, weight, targets, weights = _inputs(4, 8, 40, torch.float32)
    head = LossHead(8, 40)
    head.weight.data.copy_(weight.data)
    assert torch.equal(head(hidden), torch.nn.functional.linear(hidden, weight))
    total, rows = head(hidden, targets, weights, per_row=True)
    assert torch.equal(total, weighted_cross_entropy_sum(hidden, weight, targets, weights))
    assert torch.equal(rows, cross_entropy_rows(hidden, weight, targets))
    assert torch.equal(head(hidden, targets, weights), total)
    with pytest.raises(ValueError, match="both targets"):
        head(hidden, targets)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_fp64(dtype: torch.dtype) -> None:
    hidden, weight, targets, weights = _inputs(300, 64, 20000, dtype)
    loss, grad_hidden, grad_weight, _ = _reference(hidden, weight, targets, weights)
    moved = [value.detach().cuda() for value in (hidden, weight, targets, weights)]
    moved[0].requires_grad_(), moved[1].requires_grad_()
    total = weighted_cross_entropy_sum(moved[0], moved[1], moved[2], moved[3])
    total.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert _relative(total.cpu(), loss) < 1e-5  # products come back in fp32, so bf16 logits are not rounded
    assert _relative(moved[0].grad.cpu(), grad_hidden) < tolerance
    assert _relative(moved[1].grad.cpu(), grad_weight) < tolerance
