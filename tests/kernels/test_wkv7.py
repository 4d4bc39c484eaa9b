"""WKV-7: every kernel against the token loop in fp64, and the choice of backend."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from dlm_dist.kernels import rwkv7_elementwise as elementwise
from dlm_dist.kernels import wkv7 as backends
from dlm_dist.kernels.wkv7 import LOG_DECAY_BOUND, wkv7, wkv7_chunked, wkv7_reference

NAMES = ("out", "final_state", "d_r", "d_log_w", "d_k", "d_v", "d_a", "d_b", "d_initial_state")
TOLERANCE = 5e-6


def operands(kind: str, batch: int, length: int, documents: int, heads: int = 2, size: int = 32) -> list[Tensor]:
    """Six inputs, initial state, and the gradients of output and final state: fp64, representable in fp32."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (batch, length, heads, size)
    key = torch.nn.functional.normalize(normal(*shape), dim=-1)
    rate = torch.rand(*shape, generator=generator, dtype=torch.float64)
    log_w = LOG_DECAY_BOUND * torch.sigmoid(2.0 * normal(*shape))
    k = normal(*shape)
    if kind == "maximum decay":
        log_w = torch.full_like(log_w, LOG_DECAY_BOUND)
    elif kind == "identical keys":
        key = key[:, :1].expand(shape)
        rate, log_w, k = torch.ones_like(rate), 1e-4 * log_w, key
    elif kind == "correlated keys":
        key = torch.nn.functional.normalize(key[:, :1] + 0.3 * key, dim=-1)
    state = (documents, heads, size, size)
    drawn = [normal(*shape), log_w, k, normal(*shape), -key, key * rate, normal(*state), normal(*shape), normal(*state)]
    return [x.float().double() for x in drawn]


def results(kernel, drawn: list[Tensor], cu_seqlens: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in drawn[:7]]
    out, state = kernel(*leaves, cu_seqlens)
    grads = torch.autograd.grad([out, state], leaves, [drawn[7].to(out.dtype), drawn[8].to(state.dtype)])
    return dict(zip(NAMES, (out.detach(), state.detach(), *grads), strict=True))


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {n: ((got[n].double() - want[n]).abs().max() / want[n].abs().max()).item() for n in NAMES}


@pytest.mark.parametrize("kind", ["random", "maximum decay", "identical keys", "correlated keys"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_rows_agree_with_the_token_loop(kind: str, length: int) -> None:
    drawn = operands(kind, 2, length, 2)
    want = results(wkv7_reference, drawn, None, torch.float64)
    found = errors(results(wkv7, drawn, None, torch.float32), want)
    assert max(found.values()) <= TOLERANCE, found
    exact = errors(results(wkv7_chunked, drawn, None, torch.float64), want)
    assert max(exact.values()) <= 1e-13, exact


@pytest.mark.parametrize("kind", ["random", "maximum decay", "identical keys", "correlated keys"])
@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
def test_packed_documents_agree_with_the_token_loop(kind: str, chunk_size: int) -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 70, 71, 199, 200])
    drawn = operands(kind, 1, 200, 6)
    want = results(wkv7_reference, drawn, cu_seqlens, torch.float64)

    def kernel(*args):
        return wkv7_chunked(*args, chunk_size=chunk_size)

    found = errors(results(kernel, drawn, cu_seqlens, torch.float32), want)
    assert max(found.values()) <= TOLERANCE, found
    empty = results(kernel, drawn, cu_seqlens, torch.float32)
    assert torch.equal(empty["final_state"][1].double(), drawn[6][1]), "a document without tokens keeps its state"
    assert torch.equal(empty["d_initial_state"][1].double(), drawn[8][1])


def test_a_chunk_that_fp32_cannot_hold_is_refused() -> None:
    drawn = [x.float() for x in operands("random", 1, 300, 1)]
    with pytest.raises(ValueError, match="chunk_size is 256"):
        wkv7_chunked(*drawn[:7], chunk_size=256)


def test_padding_is_an_exact_no_op() -> None:
    drawn = operands("random", 2, 70, 2)
    padded = [torch.cat([x, torch.zeros(2, 58, 2, 32, dtype=x.dtype)], 1) for x in drawn[:6]]
    padded += [drawn[6], torch.cat([drawn[7], torch.zeros(2, 58, 2, 32, dtype=torch.float64)], 1), drawn[8]]
    short = results(wkv7_chunked, drawn, None, torch.float32)
    long = results(wkv7_chunked, padded, None, torch.float32)
    for name in NAMES:
        kept = long[name] if "state" in name else long[name][:, :70]
        assert torch.equal(short[name], kept), name


def test_the_reference_is_the_recurrence() -> None:
    """Two tokens by hand: N = 1, so every symbol is a number."""
    r, log_w, k, v, a, b = (
        torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1)
        for x in ([2.0, 3.0], [-0.1, -0.2], [0.5, 0.7], [1.5, -2.0], [-0.4, 0.9], [0.3, 0.8])
    )
    s0 = torch.full((1, 1, 1, 1), 10.0, dtype=torch.float64)
    s1 = torch.exp(torch.tensor(-0.1, dtype=torch.float64)) * 10.0 + 0.3 * (-0.4 * 10.0) + 0.5 * 1.5
    s2 = torch.exp(torch.tensor(-0.2, dtype=torch.float64)) * s1 + 0.8 * (0.9 * s1) + 0.7 * -2.0
    out, state = wkv7_reference(r, log_w, k, v, a, b, s0)
    torch.testing.assert_close(out.flatten(), torch.stack([2.0 * s1, 3.0 * s2]))
    torch.testing.assert_close(state.flatten(), s2.view(1))


def test_states_are_key_by_value_and_chain_rows() -> None:
    drawn = [x.float() for x in operands("random", 1, 150, 1)]
    whole, last = wkv7(*drawn[:7])
    first, middle = wkv7(*(x[:, :90] for x in drawn[:6]), drawn[6])
    second, end = wkv7(*(x[:, 90:] for x in drawn[:6]), middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(end, last, atol=1e-4, rtol=1e-4)
    no_read = [torch.zeros_like(x) for x in drawn[:6]]
    no_read[2][0, 0, 0, 3] = 1.0
    no_read[3][0, 0, 0, 5] = 1.0
    assert wkv7(*no_read)[1][0, 0].nonzero().tolist() == [[3, 5]]


def test_documents_do_not_touch_each_other() -> None:
    cu_seqlens = torch.tensor([0, 40, 110, 160])
    drawn = [x.float() for x in operands("random", 1, 160, 3)]
    out, states = wkv7(*drawn[:7], cu_seqlens)
    for x in drawn[:6]:
        x[:, 40:110] = -0.3
    other, other_states = wkv7(*drawn[:7], cu_seqlens)
    for kept in (slice(0, 40), slice(110, 160)):
        assert torch.equal(out[:, kept], other[:, kept])
    assert torch.equal(states[[0, 2]], other_states[[0, 2]])
    assert not torch.equal(out[:, 40:110], other[:, 40:110])


def test_sixteen_bit_inputs_are_computed_in_fp32_even_under_autocast() -> None:
    drawn = [x.to(torch.bfloat16) for x in operands("random", 2, 65, 2)]
    drawn[1], drawn[6] = drawn[1].float(), drawn[6].float()
    want, want_state = wkv7_chunked(*(x.float() for x in drawn[:7]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaves = [x.detach().clone().requires_grad_() for x in drawn[:7]]
        out, state = wkv7(*leaves)
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert torch.equal(out, want.to(torch.bfloat16))
    assert torch.equal(state, want_state)
    assert [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]


def test_results_that_go_unused_need_no_gradient() -> None:
    drawn = [x.float().requires_grad_() for x in operands("random", 1, 30, 1)[:7]]
    _, state = wkv7(*drawn)
    grads = torch.autograd.grad(state.sum(), drawn)
    assert not grads[0].any(), "the final state does not read r"
    assert grads[6].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 5, 2, 16)}, "k has shape"),
        ({"initial_state": torch.zeros(2, 2, 8, 8)}, "initial_state has shape"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "must rise from 0 to T"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 5])}, "must rise from 0 to T"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    good = {name: torch.zeros(1, 5, 2, 8) for name in ("r", "log_w", "k", "v", "a", "b")}
    with pytest.raises(ValueError, match=message):
        wkv7(**(good | change))


def test_the_self_test_passes_a_right_kernel_and_finds_a_wrong_gradient() -> None:
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, grad):
            return 0.9 * grad

    def wrong(r, log_w, k, v, a, b, initial_state, cu_seqlens):
        return wkv7_chunked(r, log_w, k, v, a, WrongGradient.apply(b), initial_state, cu_seqlens)

    cpu = torch.device("cpu")
    with torch.no_grad():
        right = backends.self_test_errors(cpu, wkv7_chunked)
    assert set(right) == set(NAMES)
    assert max(right.values()) < backends.SELF_TEST_TOLERANCE / 3
    found = backends.self_test_errors(cpu, wrong)
    assert [name for name in NAMES if found[name] > backends.SELF_TEST_TOLERANCE] == ["d_b"]

    def overflows(r, log_w, k, v, a, b, initial_state, cu_seqlens):
        """Right unless 64 tokens decay by more than e^-36: what a chunk's exponents may not reach."""
        out, state = wkv7_chunked(r, log_w, k, v, a, b, initial_state, cu_seqlens)
        steep = log_w[:, :64].sum(1).amin() < -36
        return torch.where(steep, out * float("nan"), out), state

    assert backends.self_test_errors(cpu, overflows)["out"] == float("inf")
    broken = backends.self_test_errors(cpu, lambda *x: tuple(t * float("nan") for t in wkv7_chunked(*x)))
    assert broken["out"] == float("inf")


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[int, str | None]:
    """CUDA as the selection sees it: `outcome` of the self-test by chunk size, None = passed."""
    outcome: dict[int, str | None] = {64: None, 16: None}
    monkeypatch.setattr(backends, "_selected", {})
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backends, "versions", lambda: {"torch": "2.13.0", "triton": "3.5.0"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended GPU")
    monkeypatch.setattr(backends, "_self_test", lambda device, size, chunk: outcome[chunk])
    monkeypatch.setattr(backends, "_helpers", lambda device, size: dict.fromkeys(elementwise.STEPS, "fla"))
    return outcome


def test_backend_is_fla_where_it_is_right(pretended_gpu: dict[int, str | None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = backends.select_backend("cuda:0", strict=True)
    assert (chosen.name, chosen.chunk_size) == ("fla", 64)
    assert backends.fallback(torch.device("cuda:0")) is None
    assert "torch" in chosen.versions
    assert set(chosen.helpers.values()) == {"fla"}


def test_each_head_size_is_tested_by_itself(pretended_gpu: dict[int, str | None]) -> None:
    first = backends.select_backend("cuda:0", 64)
    pretended_gpu[64] = "wrong by 0.5 in d_b"
    with pytest.warns(RuntimeWarning, match="chunk 16"):
        assert backends.select_backend("cuda:0", 128).chunk_size == 16
    assert backends.select_backend("cuda:0", 64) is first


def test_a_helper_that_fails_is_told_and_not_used(
    pretended_gpu: dict[int, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = dict.fromkeys(elementwise.STEPS, "fla") | {"mixes": "wrong by 1 in gradient 0"}
    monkeypatch.setattr(backends, "_helpers", lambda device, size: broken)
    with pytest.warns(RuntimeWarning, match="mixes in plain PyTorch: wrong by 1 in gradient 0"):
        assert backends.select_backend("cuda:0").name == "fla"
    with pytest.raises(RuntimeError, match="mixes"):
        backends.select_backend("cuda:0", strict=True)


def test_backend_falls_back_with_one_warning_or_fails_when_strict(pretended_gpu: dict[int, str | None]) -> None:
    pretended_gpu[64] = "wrong by 0.5 in d_b"
    with pytest.warns(RuntimeWarning, match=r"fla at chunk 64: wrong by 0\.5 in d_b"):
        chosen = backends.select_backend("cuda:0")
    assert (chosen.name, chosen.chunk_size) == ("fla", 16)
    assert "wrong by 0.5 in d_b" in (backends.fallback(torch.device("cuda:0")) or "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select_backend("cuda:0") is chosen
    with pytest.raises(RuntimeError, match=r"wrong by 0\.5 in d_b"):
        backends.select_backend("cuda:0", strict=True)
    pretended_gpu[16] = "CompilationError"
    with pytest.warns(RuntimeWarning, match="pytorch"):
        assert backends.select_backend("cuda:1").name == "pytorch"


def test_an_old_triton_is_never_reported_as_chunk_64(
    pretended_gpu: dict[int, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "versions", lambda: {"torch": "2.7.0", "triton": "3.3.1"})
    with pytest.warns(RuntimeWarning, match=r"needs Triton 3\.4"):
        assert backends.select_backend("cuda:0").chunk_size == 16


def test_cpu_backend_is_reported() -> None:
    assert backends.select_backend("cpu", strict=True).name == "pytorch"
    assert backends.fallback(torch.device("cpu")) is None
    assert not backends.fused_steps(torch.zeros(1, dtype=torch.bfloat16), 64, "auto")


def test_a_kernel_that_cannot_run_is_refused_by_name(pretended_gpu: dict[int, str | None]) -> None:
    backends.check_kernel("auto", "cpu", torch.float32, 64)
    backends.check_kernel("fla", "cuda:0", torch.bfloat16, 64)
    with pytest.raises(ValueError, match="'flash' does not exist: choose one of auto, fla, pytorch"):
        backends.check_kernel("flash", "cpu", torch.float32, 64)
    with pytest.raises(ValueError, match="needs a CUDA device, and this is cpu"):
        backends.check_kernel("fla", "cpu", torch.bfloat16, 64)
    with pytest.raises(ValueError, match="takes 16-bit numbers, and these are float32"):
        backends.check_kernel("fla", "cuda:0", torch.float32, 64)
    pretended_gpu.update({64: "CompilationError: no", 16: "CompilationError: no"})
    message = "head size 48 it was not chosen: .*CompilationError"
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=message):
        backends.check_kernel("fla", "cuda:0", torch.bfloat16, 48)


def test_a_few_tokens_go_through_the_token_loop_and_agree() -> None:
    drawn = operands("random", 2, 3, 2)
    want, want_state = wkv7_chunked(*drawn[:7])
    with torch.no_grad():
        out, state = wkv7(*drawn[:7])
    torch.testing.assert_close(out, want.to(out.dtype))
    torch.testing.assert_close(state, want_state)


def test_the_errors_of_a_step_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test of the elementwise steps, with a fused form that overwrites what others kept."""

    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, difference, *weights):
            ctx.kept = (x, difference, weights)
            return tuple(torch.addcmul(x, difference, mu) for mu in weights)

        @staticmethod
        def backward(ctx, *grads):
            x, difference, weights = ctx.kept
            d_difference = sum(g * mu for g, mu in zip(grads, weights, strict=True))
            d_weights = [(g * difference).sum((0, 1), keepdim=True) for g in grads]
            x.data.copy_(sum(grads))
            return x.clone(), d_difference, *d_weights

    monkeypatch.setattr(elementwise, "_FusedMixes", Overwriting)
    found = elementwise.self_test_errors("mixes", torch.device("cpu"), 16)
    assert found["gradient 0"] > 0.1, "x * x saw the overwritten x"
    assert found["result 3"] < 1e-6


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
def test_gpu_fla_passes_its_self_test() -> None:
    chosen = backends.select_backend("cuda")
    assert chosen.name == "fla", chosen.reason
    assert set(chosen.helpers.values()) == {"fla"}, chosen.helpers


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", ["random", "maximum decay", "identical keys", "correlated keys"])
@pytest.mark.parametrize("bounds", [None, [0, 3, 70, 71, 199, 200]])
def test_gpu_bf16_agrees_with_the_token_loop(kind: str, bounds: list[int] | None) -> None:
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device="cuda")
    batch, documents = (2, 2) if bounds is None else (1, 5)
    drawn = operands(kind, batch, 200, documents, size=64)
    exact = {1, 6, 8}  # log_w, the state and its gradient stay fp32
    drawn = [x if i in exact else x.to(torch.bfloat16).double() for i, x in enumerate(drawn)]
    want = results(wkv7_reference, drawn, None if bounds is None else cu_seqlens.cpu(), torch.float64)
    leaves = [x.to("cuda", torch.float32 if i in exact else torch.bfloat16) for i, x in enumerate(drawn)]
    inputs = [x.requires_grad_() for x in leaves[:7]]
    out, state = wkv7(*inputs, cu_seqlens)
    assert state.dtype == torch.float32
    grads = torch.autograd.grad([out, state], inputs, leaves[7:])
    got = dict(zip(NAMES, (out, state, *grads), strict=True))
    found = {n: ((got[n].cpu().double() - want[n]).norm() / want[n].norm()).item() for n in NAMES}
    # With identical keys and a = 1 the terms that cancel are larger than what is left, and they are bf16.
    assert max(found.values()) <= (0.1 if kind == "identical keys" else 0.03), found


@pytest.mark.gpu
@needs_cuda
def test_gpu_fp32_takes_the_pytorch_kernel_and_agrees() -> None:
    drawn = operands("random", 2, 130, 2)
    want = results(wkv7_reference, drawn, None, torch.float64)
    got = results(wkv7, [x.cuda() for x in drawn], None, torch.float32)
    found = errors({n: t.cpu() for n, t in got.items()}, want)
    assert max(found.values()) <= 2e-5, found
