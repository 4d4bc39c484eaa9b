"""The WKV-7 operator of RWKV-7, on the fastest backend that was proved right on this device.

On CUDA that is fla's Triton kernel, and only after a self-test: its outputs, final state, six gradients and
initial-state gradient are compared with our own PyTorch kernel on the very device and at the model's head size,
because Triton has silently produced wrong gradients for sibling kernels on some GPUs. Elsewhere, and where the test
fails, it is `wkv7_chunked`. `select_backend` says what was chosen and why, for a run to record.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version
from torch import Tensor

from dlm_dist.kernels import rwkv7_elementwise as elementwise
from dlm_dist.kernels.rwkv7_elementwise import relative_error
from dlm_dist.kernels.wkv7_chunked import check_shapes, wkv7_chunked, wkv7_reference

__all__ = [
    "KERNELS",
    "LOG_DECAY_BOUND",
    "check_kernel",
    "fla_wkv7",
    "select_backend",
    "wkv7",
    "wkv7_chunked",
    "wkv7_reference",
]

KERNELS = ("auto", "fla", "pytorch")
"""auto: fla's where it was proved right, else ours; fla: that one or an error; pytorch: ours."""

# log w = -exp(-0.5) sigmoid(d), so it never falls below this.
LOG_DECAY_BOUND = -0.6065306597126334
# fla's kernels round r, k, v, a, b products to bf16 in places; a broken one is off by tens of percent.
SELF_TEST_TOLERANCE = 0.03

_FLA_CHUNKS = (64, 16)
# Below this the token loop is faster than a chunk of mostly padding.
_TOKEN_LOOP_LENGTH = 4
_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """What computes WKV-7 on one device: `name` is "fla" or "pytorch"; `chunk_size` None follows the lengths.

    `helpers`: for each elementwise step around the kernel (see `rwkv7_elementwise`) "fla" or why it is not.
    """

    name: str
    chunk_size: int | None
    device: str
    versions: dict[str, str]
    reason: str
    helpers: dict[str, str] = field(default_factory=dict)


_selected: dict[tuple[torch.device, int], Backend] = {}


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """WKV-7 over rows or packed documents (the recurrence is written out in `wkv7_chunked`'s module).

    r, log_w, k, v, a, b: [B, T, H, N]; log_w in (-0.6066, 0). cu_seqlens: int [D + 1] bounds of the documents of
    one packed row (B = 1), or None, when each row is one document. initial_state: [D or B, H, N, N] fp32 as
    (key, value), None for zeros. Returns out [B, T, H, N] in the dtype of v and the final states, fp32, in the
    layout of initial_state. Differentiable in the six inputs and the initial state.

    `kernel` is one of KERNELS. fp32 and fp64 inputs always take the PyTorch kernel: fla's is made for 16-bit inputs.
    Raises ValueError where shapes do not fit, or `kernel` is "fla" and it cannot run.
    """
    if kernel != "auto":
        check_kernel(kernel, r.device, v.dtype, r.shape[-1])
    if kernel != "pytorch" and r.is_cuda and v.dtype in _SIXTEEN_BIT:
        backend = select_backend(r.device, r.shape[-1])
        if backend.name == "fla":
            check_shapes(r, log_w, k, v, a, b, initial_state, cu_seqlens)
            assert backend.chunk_size is not None
            return fla_wkv7(r, log_w, k, v, a, b, initial_state, cu_seqlens, backend.chunk_size)
    if r.shape[1] <= _TOKEN_LOOP_LENGTH and cu_seqlens is None and not torch.is_grad_enabled():
        return wkv7_reference(r, log_w, k, v, a, b, initial_state)
    return wkv7_chunked(r, log_w, k, v, a, b, initial_state, cu_seqlens)


def check_kernel(kernel: str, device: torch.device | str, dtype: torch.dtype, head_size: int) -> None:
    """Raises ValueError where `kernel` is none of KERNELS or, demanded by name, cannot take this dtype or head size."""
    if kernel not in KERNELS:
        raise ValueError(f"the WKV-7 kernel {kernel!r} does not exist: choose one of {', '.join(KERNELS)}.")
    if kernel != "fla":
        return
    device = torch.device(device)
    reason = None
    if device.type != "cuda":
        reason = f"it needs a CUDA device, and this is {device.type}"
    elif dtype not in _SIXTEEN_BIT:
        reason = f"it takes 16-bit numbers, and these are {str(dtype).removeprefix('torch.')}"
    else:
        backend = select_backend(device, head_size)
        if backend.name != "fla":
            reason = f"on {backend.device} with head size {head_size} it was not chosen: {backend.reason}"
    if reason is not None:
        raise ValueError(f"the WKV-7 kernel fla cannot run here: {reason}; use auto or pytorch.")


def fused_steps(x: Tensor, head_size: int, kernel: str) -> frozenset[str]:
    """Which steps of `rwkv7_elementwise` may run fused on tensors like `x` under `kernel`."""
    if kernel == "pytorch" or not x.is_cuda or x.dtype not in _SIXTEEN_BIT:
        return frozenset()
    return frozenset(name for name, state in select_backend(x.device, head_size).helpers.items() if state == "fla")


def select_backend(device: torch.device | str, head_size: int = 64, strict: bool = False) -> Backend:
    """The backend for 16-bit inputs of `head_size` on `device`, tested on the first call for them and remembered.

    A CUDA device that ends on anything but fla at chunk 64 is warned about once; with `strict` it is a
    RuntimeError. Takes seconds on CUDA (kernels are compiled): call it before the first step.
    """
    device = _with_index(device)
    chosen = _selected.get((device, head_size))
    first_time = chosen is None
    if chosen is None:
        chosen = _selected[device, head_size] = _choose(device, head_size)
    shortfall = fallback(device, head_size)
    if shortfall is not None and strict:
        raise RuntimeError(f"{shortfall} (strict is on).")
    if shortfall is not None and first_time:
        warnings.warn(shortfall, RuntimeWarning, stacklevel=2)
    return chosen


def fallback(device: torch.device | str, head_size: int = 64) -> str | None:
    """What was chosen for `device` in place of fla at chunk 64, and why; None where nothing was given up."""
    device = _with_index(device)
    chosen = _selected.get((device, head_size))
    if chosen is None or device.type != "cuda":
        return None
    missing = [f"{name} in plain PyTorch: {reason}" for name, reason in chosen.helpers.items() if reason != "fla"]
    if (chosen.name, chosen.chunk_size) != ("fla", _FLA_CHUNKS[0]):
        missing.insert(0, f"{chosen.name}, chunk {chosen.chunk_size or 'by length'}: {chosen.reason}")
    return f"WKV-7 on {device} uses {'; '.join(missing)}" if missing else None


def _with_index(device: torch.device | str) -> torch.device:
    """`device`, where "cuda" alone means the current one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _choose(device: torch.device, head_size: int) -> Backend:
    if device.type != "cuda":
        return Backend("pytorch", None, device.type, versions(), "no CUDA device")
    name = torch.cuda.get_device_name(device)
    missing = [package for package in ("triton", "fla") if importlib.util.find_spec(package) is None]
    if missing:
        return Backend("pytorch", None, name, versions(), f"{' and '.join(missing)} not installed")
    failures: list[str] = []
    for chunk_size in _FLA_CHUNKS:
        # With an older Triton fla computes with 16 whatever it is asked for; the report must not say 64 then.
        if chunk_size > 16 and Version(versions()["triton"]) < Version("3.4"):
            failures.append(f"fla at chunk {chunk_size}: needs Triton 3.4, this is {versions()['triton']}")
            continue
        failure = _self_test(device, head_size, chunk_size)
        if failure is None:
            reason = "; ".join(failures) or "self-test passed"
            return Backend("fla", chunk_size, name, versions(), reason, _helpers(device, head_size))
        failures.append(f"fla at chunk {chunk_size}: {failure}")
    return Backend("pytorch", None, name, versions(), "; ".join(failures))


def versions() -> dict[str, str]:
    """The versions that the result of a kernel may depend on."""
    found = {"torch": str(torch.__version__)}
    for package in ("triton", "flash-linear-attention", "fla-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def fla_wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = _FLA_CHUNKS[0],
    disable_recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """fla's Triton kernel on `wkv7`'s arguments, tested or not; `disable_recompute` trades memory for time."""
    # Imported here: fla needs Triton and a driver, and a machine without them must be able to import this module.
    from fla.ops.rwkv7 import chunk_rwkv7

    out, final_state = chunk_rwkv7(
        r,
        log_w,
        k,
        v,
        a,
        b,
        scale=1.0,
        initial_state=initial_state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
        lower_bound=LOG_DECAY_BOUND,
        chunk_size=chunk_size,
        disable_recompute=disable_recompute,
    )
    return out, final_state


def _self_test(device: torch.device, head_size: int, chunk_size: int) -> str | None:
    """None where fla's kernel agrees with ours on `device`, else one sentence that says how it failed."""
    return _failure(lambda: self_test_errors(device, partial(fla_wkv7, chunk_size=chunk_size), head_size))


def _helpers(device: torch.device, head_size: int) -> dict[str, str]:
    """For each elementwise step "fla" where fla's fused form passed its self-test on `device`, else why not."""
    return {
        name: _failure(partial(elementwise.self_test_errors, name, device, head_size)) or "fla"
        for name in elementwise.STEPS
    }


def _failure(errors_of: Callable[[], dict[str, float]]) -> str | None:
    """One sentence about a self-test that failed or could not run; None where every error is small."""
    try:
        with torch.inference_mode(False):
            errors = errors_of()
    except Exception as error:  # a compiler, driver or launch error: the reason is reported, the kernel not used
        return " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    wrong = {name: error for name, error in errors.items() if not error <= SELF_TEST_TOLERANCE}
    if not wrong:
        return None
    return "wrong by " + ", ".join(f"{error:.2g} in {name}" for name, error in wrong.items())


def self_test_errors(
    device: torch.device, kernel: Callable[..., tuple[Tensor, Tensor]], head_size: int = 64
) -> dict[str, float]:
    """The relative error (2-norm) of `kernel` against `wkv7_chunked` in fp32, for each result and gradient.

    `kernel(r, log_w, k, v, a, b, initial_state, cu_seqlens)` is given bf16 operands, rows and then packed
    documents of ragged lengths. The worst of the cases is returned.
    """
    worst: dict[str, float] = {}
    for batch, bounds in ((2, None), (1, [0, 70, 71, 200, 328, 400])):
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int64, device=device)
        states = batch if bounds is None else len(bounds) - 1
        operands = _probe_operands(device, batch, 400, states, head_size)
        got = _results(kernel, operands, cu_seqlens)
        want = _results(wkv7_chunked, [x.float() for x in operands], cu_seqlens)
        for name, value in got.items():
            worst[name] = max(worst.get(name, 0.0), relative_error(value, want[name]))
    return worst


def _probe_operands(device: torch.device, batch: int, length: int, states: int, size: int) -> list[Tensor]:
    """Operands shaped like a trained layer's: six inputs, the initial state, and gradients for out and state."""
    heads = 4
    generator = torch.Generator().manual_seed(20)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (batch, length, heads, size)
    key = torch.nn.functional.normalize(normal(*shape) + normal(batch, 1, heads, size), dim=-1)
    rate = torch.sigmoid(normal(*shape))
    log_w = LOG_DECAY_BOUND * torch.sigmoid(3.0 * normal(*shape) - 2.0)
    # What decides how long a chunk may be: a head whose every channel decays as fast as it can.
    log_w[:, :, 0] = LOG_DECAY_BOUND
    sixteen_bit = [normal(*shape), log_w, normal(*shape) * 0.5, normal(*shape), -key, key * rate]
    operands = [x.to(torch.bfloat16) for x in sixteen_bit]
    operands[1] = log_w
    state = normal(states, heads, size, size)
    operands += [state, normal(*shape).to(torch.bfloat16), normal(states, heads, size, size)]
    return [x.to(device) for x in operands]


def _results(
    kernel: Callable[..., tuple[Tensor, Tensor]], operands: list[Tensor], cu_seqlens: Tensor | None
) -> dict[str, Tensor]:
    # The first call may come from a forward without gradients.
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in operands[:7]]
        out, state = kernel(*leaves, cu_seqlens)
        grads = torch.autograd.grad([out, state], leaves, operands[7:])
    gradients = zip(("d_r", "d_log_w", "d_k", "d_v", "d_a", "d_b", "d_initial_state"), grads, strict=True)
    return {"out": out.detach(), "final_state": state.detach(), **dict(gradients)}
