"""The WKV-7 recurrence in plain PyTorch: chunked, in fp32, on any device.

One step of a head with state S [key, value] is

    u_t = S_{t-1}^T a_t        S_t = diag(exp(log_w_t)) S_{t-1} + b_t u_t^T + k_t v_t^T        o_t = S_t^T r_t

(RWKV-7, arXiv 2503.14456; there a = -kk and b = kk * a). With G the inclusive and E the exclusive running sum
of log_w inside a chunk of L tokens, S_0 the state before the chunk and, masked to the causal triangle,

    A_ab[i, j] = <a_i e^{E_i}, b_j e^{-G_j}>  (j < i), A_ak likewise;  A_rb[i, j], A_rk with r_i e^{G_i}  (j <= i)

the whole chunk is matrix products (the delta rule's WY form):

    T = (I - A_ab)^{-1}    U = T (A_ak V + Ahat S_0)    O = Rhat S_0 + A_rk V + A_rb U    Ahat = a e^E, Rhat = r e^G
    S_L = diag(e^{G_L}) S_0 + (k e^{G_L - G})^T V + (b e^{G_L - G})^T U  =  P S_0 + Q

so that only S_0 -> S_L is sequential; everything else is batched over all chunks. The backward is written out:
it keeps two tensors beside the inputs (T and the states before each chunk) and recomputes the rest.

Exponents are taken from the chunk's start, not its middle: with log_w >= -0.6066 no factor passes e^{39} at L = 64,
which costs fp32 nothing, and a token's output then depends on no later token, not even in its last bit. The upper
triangles of the products are large and meaningless: they are overwritten, not multiplied away.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SIZES = (16, 32, 64)
"""What `wkv7_chunked` chooses from."""
MAX_CHUNK_SIZE = 128
"""e^{0.6066 L} still fits into fp32, but gradients below about 1e-5 fall to zero on their way through e^{-0.6066 L}."""


def wkv7_chunked(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """WKV-7 over rows or packed documents, differentiable in the six inputs and the initial state.

    r, log_w, k, v, a, b: [B, T, H, N], log_w in (-0.6066, 0]. cu_seqlens: int [D + 1], the document bounds of a
    single packed row (B = 1), or None, when each of the B rows is one document. initial_state: [D or B, H, N, N]
    as (key, value), or None for zeros. chunk_size: up to 128; by default 16, 32 or 64 by the documents' length.

    Returns out [B, T, H, N] in the dtype of v and the final states [D or B, H, N, N] in fp32. The arithmetic is
    fp32 whatever the inputs' dtype, except that float64 inputs are computed (and their states kept) in float64.
    """
    check_shapes(r, log_w, k, v, a, b, initial_state, cu_seqlens)
    if chunk_size is not None and not 1 <= chunk_size <= MAX_CHUNK_SIZE:
        raise ValueError(
            f"wkv7: chunk_size is {chunk_size}, but fp32 can hold the decay of 1 to {MAX_CHUNK_SIZE} tokens."
        )
    layout = _Layout.build(r, cu_seqlens, chunk_size)
    if initial_state is None:
        states = layout.documents if cu_seqlens is not None else r.shape[0]
        initial_state = r.new_zeros(states, r.shape[2], r.shape[3], r.shape[3], dtype=_compute_dtype(v))
    out, final_state = _ChunkedWKV7.apply(r, log_w, k, v, a, b, initial_state, layout)
    return out, final_state


def wkv7_reference(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, as the module's docstring writes it: the measure of the others, and the faster
    way through a few tokens.

    Shapes and dtypes as in `wkv7_chunked` (give float64 for a reference). Returns out [B, T, H, N] and the final
    states [D or B, H, N, N]; autograd runs through it.
    """
    check_shapes(r, log_w, k, v, a, b, initial_state, cu_seqlens)
    if cu_seqlens is not None:
        outs, states = [], []
        for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            at = slice(start, end)
            begin = None if initial_state is None else initial_state[i : i + 1]
            out, state = wkv7_reference(r[:, at], log_w[:, at], k[:, at], v[:, at], a[:, at], b[:, at], begin)
            outs.append(out)
            states.append(state)
        return torch.cat(outs, 1), torch.cat(states, 0)
    batch, length, heads, size = r.shape
    dtype, out_dtype = _compute_dtype(v), v.dtype
    r, log_w, k, v, a, b = (x.to(dtype) for x in (r, log_w, k, v, a, b))
    state = v.new_zeros(batch, heads, size, size) if initial_state is None else initial_state.to(dtype)
    outs = []
    for t in range(length):
        u = torch.einsum("bhkv,bhk->bhv", state, a[:, t])
        state = log_w[:, t].exp().unsqueeze(-1) * state
        state = state + b[:, t].unsqueeze(-1) * u.unsqueeze(-2) + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outs.append(torch.einsum("bhkv,bhk->bhv", state, r[:, t]))
    out = torch.stack(outs, 1) if outs else torch.zeros_like(v)
    return out.to(out_dtype), state


def check_shapes(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises ValueError where the operands of a WKV-7 call do not fit together. Reads no tensor's values."""
    if r.dim() != 4:
        raise ValueError(f"wkv7 takes [B, T, H, N] tensors, but r has shape {list(r.shape)}.")
    for name, tensor in (("log_w", log_w), ("k", k), ("v", v), ("a", a), ("b", b)):
        if tensor.shape != r.shape:
            raise ValueError(f"wkv7: {name} has shape {list(tensor.shape)}, but r has {list(r.shape)}.")
    batch, _, heads, size = r.shape
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"wkv7 with cu_seqlens takes one packed row (B = 1), but B is {batch}; flatten the rows.")
    documents = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is not None and initial_state.shape != (documents, heads, size, size):
        raise ValueError(
            f"wkv7: initial_state has shape {list(initial_state.shape)}, but {documents} documents of {heads} heads "
            f"need {[documents, heads, size, size]} (key, value)."
        )


def _compute_dtype(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Layout:
    """Where the tokens of each document lie among the chunks, and which chunks follow each other.

    Documents are padded to whole chunks and sorted by length, longest first; chunks are ordered by their number
    inside their document and then by document. So step j of the chain works on one run of `active[j]`
    neighbouring chunks, and the documents that go on after it are the first `active[j + 1]` of them.
    """

    batch: int
    length: int
    chunk: int
    documents: int
    active: list[int]
    order: Tensor | None  # [D] document of each sorted place; None where the order is the given one
    token_of_slot: Tensor | None  # [chunks * L] packed position of each slot, `length` for padding; None for rows
    slot_of_token: Tensor | None  # [T] its inverse

    @staticmethod
    def build(r: Tensor, cu_seqlens: Tensor | None, chunk_size: int | None) -> _Layout:
        batch, length = r.shape[:2]
        if cu_seqlens is None:
            chunk = chunk_size or _chunk_for([length])
            return _Layout(batch, length, chunk, batch, [batch] * -(-length // chunk), None, None, None)
        bounds = cu_seqlens.to(device="cpu", dtype=torch.int64)
        lengths = bounds.diff()
        if int(bounds[0]) != 0 or int(bounds[-1]) != length or bool((lengths < 0).any()):
            raise ValueError(f"wkv7: cu_seqlens must rise from 0 to T = {length}, but it is {bounds.tolist()}.")
        chunk = chunk_size or _chunk_for(lengths.tolist())
        order = torch.argsort(lengths, descending=True, stable=True)
        chunks = (lengths[order] + chunk - 1) // chunk  # [D], falling
        steps = int(chunks[0])
        active = (chunks.unsqueeze(0) > torch.arange(steps).unsqueeze(1)).sum(1)  # [steps]
        first_chunk = torch.cumsum(active, 0) - active  # chunk row at which each step begins
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # [T]
        inside = torch.arange(length) - bounds[:-1][document]
        slot = (first_chunk[inside // chunk] + place[document]) * chunk + inside % chunk
        token = torch.full((int(active.sum()) * chunk,), length, dtype=torch.int64)
        token[slot] = torch.arange(length)
        device = r.device
        return _Layout(
            batch, length, chunk, len(lengths), active.tolist(), order.to(device), token.to(device), slot.to(device)
        )

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H, N] tokens to [chunks, H, L, N], zeros in the padding; a view where that is possible."""
        if self.token_of_slot is not None:
            padded = torch.cat([x[0], x.new_zeros(1, *x.shape[2:])])
            return padded[self.token_of_slot].unflatten(0, (-1, self.chunk)).transpose(1, 2)
        missing = -self.length % self.chunk
        if missing:
            x = torch.cat([x, x.new_zeros(self.batch, missing, *x.shape[2:])], 1)
        return x.unflatten(1, (-1, self.chunk)).transpose(0, 1).flatten(0, 1).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """[chunks, H, L, N] back to [B, T, H, N], dropping the padding."""
        x = x.transpose(1, 2)
        if self.slot_of_token is not None:
            return x.flatten(0, 1)[self.slot_of_token].unsqueeze(0)
        x = x.unflatten(0, (-1, self.batch)).transpose(0, 1).flatten(1, 2)
        return x[:, : self.length].contiguous()

    def sort(self, states: Tensor) -> Tensor:
        """States by document to states by sorted place."""
        return states if self.order is None else states[self.order]

    def unsort(self, states: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return states if self.order is None else torch.empty_like(states).index_copy_(0, self.order, states)


def _chunk_for(lengths: list[int]) -> int:
    """64 for documents that fill it on average, less for shorter ones, whose chunks would be mostly padding."""
    mean = sum(lengths) / max(1, len(lengths))
    return next((size for size in CHUNK_SIZES if mean <= size), CHUNK_SIZES[-1])


class _Operands:
    """The chunk-local quantities that forward and backward share, all [chunks, H, ., .] in the compute dtype."""

    def __init__(self, layout: _Layout, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        r, log_w, k, v, a, b = (layout.split(x).to(dtype) for x in inputs)
        # In fp64, because an fp32 sum near -39 is only good to 2e-6, and that would be the relative error of e^G.
        # (Apple's MPS has no fp64.)
        inclusive = _cumsum(log_w.to(dtype if log_w.device.type == "mps" else torch.float64))
        self.grow = inclusive.exp().to(dtype)  # e^G
        self.shrink = inclusive.neg_().exp_().to(dtype)  # e^{-G}
        self.grow_before = F.pad(self.grow[..., :-1, :], (0, 0, 1, 0), value=1.0)  # e^E
        self.end = self.grow[..., -1:, :]
        self.ra = torch.cat([r * self.grow, a * self.grow_before], -2)  # [Rhat; Ahat], [2L, N]
        self.kb = torch.cat([k * self.shrink, b * self.shrink], -2)  # [2L, N]; times e^{G_L}: as of the chunk's end
        self.v = v.contiguous()

    def products(self) -> Tensor:
        """[[A_rk, A_rb], [A_ak, A_ab]], masked: [chunks, H, 2L, 2L]."""
        return _mask(self.ra @ self.kb.mT)

    def chain(self, attention: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """P [chunks, H, N, N] with S_L = P S_0 + Q, and Rhat + A_rb W [chunks, H, L, N], O's factor of S_0."""
        length = self.v.shape[-2]
        w = inverse @ self.ra[..., length:, :]
        read = torch.matmul(attention[..., :length, length:], w).add_(self.ra[..., :length, :])
        transfer = self.kb[..., length:, :].mT @ w
        transfer.diagonal(dim1=-2, dim2=-1).add_(1.0)
        return transfer.mul_(self.end.mT), read


def _mask(products: Tensor) -> Tensor:
    """In place: keep j <= i in the r-rows (the upper half) and j < i in the a-rows of [..., 2L, 2L]."""
    length = products.shape[-1] // 2
    i = torch.arange(2 * length, device=products.device).unsqueeze(1)
    j = torch.arange(2 * length, device=products.device) % length
    hidden = torch.where(i < length, j > i, j >= i - length)
    return products.masked_fill_(hidden, 0.0)


class _ChunkedWKV7(torch.autograd.Function):
    """The chunked form as one differentiable operation, a few heads at a time."""

    @staticmethod
    def forward(ctx, r, log_w, k, v, a, b, initial_state, layout):  # type: ignore[no-untyped-def]
        dtype = _compute_dtype(v)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        final_state = torch.empty_like(initial_state, dtype=dtype)
        kept = []
        with torch.autocast(r.device.type, enabled=False):
            for heads in _head_slices(layout, r):
                inputs = tuple(x[:, :, heads] for x in (r, log_w, k, v, a, b))
                out[:, :, heads], final_state[:, heads], inverse, states = _forward(
                    layout, inputs, initial_state[:, heads].to(dtype)
                )
                kept += [inverse, states]
        ctx.set_materialize_grads(False)
        ctx.layout = layout
        ctx.state_dtype = initial_state.dtype
        ctx.save_for_backward(r, log_w, k, v, a, b, *kept)
        return out, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_final):  # type: ignore[no-untyped-def]
        r, log_w, k, v, a, b, *kept = ctx.saved_tensors
        operands = (r, log_w, k, v, a, b)
        d_out = torch.zeros_like(v) if d_out is None else d_out
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in operands]
        shape = (ctx.layout.documents, r.shape[2], r.shape[3], r.shape[3])
        d_final = kept[1].new_zeros(shape) if d_final is None else d_final
        d_initial = torch.empty(shape, dtype=ctx.state_dtype, device=r.device)
        with torch.autocast(r.device.type, enabled=False):
            for i, heads in enumerate(_head_slices(ctx.layout, r)):
                inputs = tuple(x[:, :, heads] for x in operands)
                inverse, states = kept[2 * i : 2 * i + 2]
                *found, d_initial[:, heads] = _backward(
                    ctx.layout, inputs, inverse, states, d_out[:, :, heads], d_final[:, heads]
                )
                for grad, slots in zip(grads, found, strict=True):
                    grad[:, :, heads] = ctx.layout.merge(slots)
        return *grads, d_initial, None


def _head_slices(layout: _Layout, r: Tensor) -> list[slice]:
    """Groups of heads to work on at a time.

    On a CPU few enough that a tensor of one group stays near half a megabyte: what a group's products leave in the
    cache is then still there for the next operation, which measured 1.4 times faster than all heads at once.
    """
    heads, size = r.shape[2:]
    if r.device.type != "cpu":
        return [slice(0, heads)]
    elements_per_head = max(1, sum(layout.active) * layout.chunk * size)
    group = max(1, min(heads, 2**17 // elements_per_head))
    return [slice(start, min(start + group, heads)) for start in range(0, heads, group)]


def _forward(layout: _Layout, inputs: tuple[Tensor, ...], initial: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out [B, T, H, N], final states [D, H, N, N], T [chunks, H, L, L] and the states before each chunk."""
    ops = _Operands(layout, inputs, initial.dtype)
    length = layout.chunk
    attention = ops.products()
    identity = torch.eye(length, dtype=initial.dtype, device=initial.device)
    inverse = torch.linalg.solve_triangular(
        identity - attention[..., length:, length:], identity, upper=False, unitriangular=True
    )
    y = inverse @ (attention[..., length:, :length] @ ops.v)
    vy = torch.cat([ops.v, y], -2)
    transfer, read = ops.chain(attention, inverse)
    states, final = _chain(layout, transfer, (ops.kb.mT @ vy).mul_(ops.end.mT), initial)
    out = attention[..., :length, :] @ vy
    out += read @ states
    return layout.merge(out), final, inverse, states


def _backward(
    layout: _Layout, inputs: tuple[Tensor, ...], inverse: Tensor, states: Tensor, d_out: Tensor, d_final: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of r, log_w, k, v, a, b [chunks, H, L, N] and of the initial states [D, H, N, N]."""
    dtype, length = states.dtype, layout.chunk
    ops = _Operands(layout, inputs, dtype)
    attention = ops.products()
    d_o = layout.split(d_out).to(dtype).contiguous()
    transfer, read = ops.chain(attention, inverse)
    d_ends, d_initial = _chain_backward(layout, transfer, read.mT @ d_o, d_final.to(dtype))
    d_ends *= ops.end.mT  # from here on as seen from the chunk's start

    # U once more, then the gradients of U and of X = A_ak V + Ahat S_0.
    x = attention[..., length:, :length] @ ops.v
    x += ops.ra[..., length:, :] @ states
    vu = torch.cat([ops.v, inverse @ x], -2)
    d_vu = attention[..., :length, :].mT @ d_o
    d_vu += ops.kb @ d_ends
    d_x = inverse.mT @ d_vu[..., length:, :]
    d_v = d_vu[..., :length, :] + attention[..., length:, :length].mT @ d_x
    del attention, x

    d_ox = torch.cat([d_o, d_x], -2)
    d_products = _mask(d_ox @ vu.mT)
    d_ra = d_products @ ops.kb
    d_ra += d_ox @ states.mT
    d_kb = vu @ d_ends.mT
    # How G_L enters: through the state's own decay and through k and b carried to the chunk's end.
    d_total = (d_ends * states).sum(-1).unsqueeze(-2)
    d_total += (d_kb * ops.kb).sum(-2, keepdim=True)
    d_kb += d_products.mT @ ops.ra

    d_ra_exponent = d_ra * ops.ra
    d_kb_exponent = d_kb * ops.kb
    d_exclusive = d_ra_exponent[..., length:, :]
    d_inclusive = d_ra_exponent[..., :length, :] + d_exclusive
    d_inclusive -= d_kb_exponent[..., :length, :]
    d_inclusive -= d_kb_exponent[..., length:, :]
    d_log_w = _reverse_cumsum(d_inclusive).sub_(d_exclusive).add_(d_total)
    return (
        d_ra[..., :length, :] * ops.grow,
        d_log_w,
        d_kb[..., :length, :] * ops.shrink,
        d_v,
        d_ra[..., length:, :] * ops.grow_before,
        d_kb[..., length:, :] * ops.shrink,
        d_initial,
    )


def _cumsum(x: Tensor) -> Tensor:
    """y_j = sum over i <= j of x_i, along dimension -2; on CUDA as a product, since its cumsum is not deterministic."""
    return (
        torch.ones(x.shape[-2], x.shape[-2], dtype=x.dtype, device=x.device).tril() @ x if x.is_cuda else x.cumsum(-2)
    )


def _reverse_cumsum(x: Tensor) -> Tensor:
    """y_j = sum over i >= j of x_i, along dimension -2."""
    return _cumsum(x.flip(-2)).flip(-2)


def _chain(layout: _Layout, transfer: Tensor, added: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The states before every chunk [chunks, H, N, N] and each document's last [D, H, N, N]."""
    states = torch.empty_like(transfer)
    state = layout.sort(initial)
    final = state.clone()
    row = 0
    for count in layout.active:
        states[row : row + count] = state[:count]
        state = torch.matmul(transfer[row : row + count], state[:count]).add_(added[row : row + count])
        final[:count] = state
        row += count
    return states, layout.unsort(final)


def _chain_backward(layout: _Layout, transfer: Tensor, d_states: Tensor, d_final: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the state after every chunk [chunks, H, N, N] and of the initial states [D, H, N, N].

    `d_states` [chunks, H, N, N] is the outputs' direct share of the gradient of the state before each chunk.
    """
    d_ends = torch.empty_like(transfer)
    d_state = layout.sort(d_final).clone()
    row = transfer.shape[0]
    for count in reversed(layout.active):
        row -= count
        d_ends[row : row + count] = d_state[:count]
        step = torch.matmul(transfer[row : row + count].mT, d_state[:count])
        d_state[:count] = step.add_(d_states[row : row + count])
    return d_ends, layout.unsort(d_state)
