"""RWKV-7's two layers, usable by themselves: the time mix (in any direction) and the channel mix.

The parameters of `TimeMix` and `ChannelMix` carry BlinkDL's names and shapes. What is added to his equations:
documents of a packed row are isolated, a scan can run backwards or both ways, start from the final state of the
layer below (DW-JRT), or go on from where an earlier call ended.

16-bit models keep in fp32: the decay's pre-activation and log w, the in-context rate a, the normalised key, the
statistics of all norms, and (in the kernel) the WKV state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm_dist.kernels.rwkv7_elementwise import corrected_output, mixes, scaled_key, shift_difference, wide
from dlm_dist.kernels.wkv7 import KERNELS, LOG_DECAY_BOUND, fused_steps, wkv7
from dlm_dist.models.documents import Documents, chain_blocks, reverse
from dlm_dist.models.rwkv7_init import InitSizes, initial_value

SCANS = ("causal", "reverse", "bidirectional")
SEED_VARIANTS = ("seed", "inject")


class LoraRanks(NamedTuple):
    """Ranks of the four low-rank maps: decay w, in-context rate a, value residual v, gate g."""

    w: int
    a: int
    v: int
    g: int


def lora_ranks(hidden_size: int, rule: str = "current") -> LoraRanks:
    """The ranks of a model of width C by one of BlinkDL's rules, each rounded to a multiple of 32, at least 32.

    "current": his trainer's since 2025 (2.5 sqrt C for w and a, 1.7 sqrt C for v, 5 sqrt C for g). "released":
    that of the published 0.1B to 2.9B checkpoints (1.8 sqrt C, 1.3 sqrt C, 0.6 C^0.8).
    """
    root = math.sqrt(hidden_size)
    raw = {
        "current": (2.5 * root, 2.5 * root, 1.7 * root, 5.0 * root),
        "released": (1.8 * root, 1.8 * root, 1.3 * root, 0.6 * hidden_size**0.8),
    }
    if rule not in raw:
        raise ValueError(f"the rank rule {rule!r} does not exist: choose one of {', '.join(raw)}.")
    return LoraRanks(*(max(32, 32 * round(rank / 32)) for rank in raw[rule]))


class HeadNorm(nn.GroupNorm):
    """GroupNorm with one group per head over [..., C]; as a layer norm it needs no transposed layout."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (self.num_groups, -1))
        normed = F.layer_norm(heads, heads.shape[-1:], eps=self.eps).flatten(-2)
        return torch.addcmul(self.bias, normed, self.weight)


@dataclass(frozen=True)
class DepthSeed:
    """How a scan uses the final state S_T of the layer below (DW-JRT, yanghu819/future-seed).

    It starts from `scale` S_T. `variant` "seed": nothing more. "inject": S_T also leaks in at every token, as
    diag(1 - w_t) g S_T, so that the state decays towards g S_T instead of 0; g = sigmoid(seed_gate) per head.
    With `gate` the seed variant's start is g `scale` S_T. `gate_init` is the initial logit of g.
    """

    variant: str = "seed"
    scale: float = 1.0
    gate: bool = False
    gate_init: float = -2.0

    def __post_init__(self) -> None:
        if self.variant not in SEED_VARIANTS:
            raise ValueError(f"dw_jrt_variant is {self.variant!r}: choose {' or '.join(SEED_VARIANTS)}.")
        if self.variant == "inject" and self.gate:
            raise ValueError("dw_jrt_gate is true: the variant inject always has a gate, leave the key out.")


class ScanState(NamedTuple):
    """Where a scan of one direction has ended."""

    previous: Tensor
    """[B or D, C] the last token that entered the time mix, of each row or document."""
    wkv: Tensor
    """[B or D, H, N, N] fp32 as (key, value), one state for each row or document."""


class MixOutput(NamedTuple):
    """What a time mix returns."""

    out: Tensor
    """[B, T, C]."""
    v_first: Tensor
    """The values of layer 0, for the layers above: [B, T, C], twice as much for a bidirectional mix."""
    state: ScanState | None
    """Where the scan from left to right ended; None for a mix from right to left."""


class TimeMix(nn.Module):
    """RWKV-7's time mixing: token shift, low-rank gates, the WKV-7 recurrence, normalised and gated.

    Usable by itself, in place of attention:

        first, second = TimeMix(512, layer=0, num_layers=2), TimeMix(512, layer=1, num_layers=2)
        out, v_first, _ = first(x)  # x [B, T, 512]
        out, _, _ = second(x + out, v_first)

    hidden_size: C, a multiple of head_size N. layer, num_layers: the place in a stack, which decides the initial
    values; layer 0 makes `v_first`, the others mix it into their values. ranks: default to `lora_ranks(C)`.
    direction: "causal"; "reverse" (from a document's last token to its first); "bidirectional": both, as
    alpha forward + (1 - alpha) backward with alpha = sigmoid(direction_gate(x)) per channel, whose bias starts at
    `gate_init`; the backward scan has weights of its own, `backward_mix`, or with `tied` the same. depth_seed: whether
    and how the scan uses the final state of the layer below (causal only, not in layer 0). kernel: "auto", "fla" or
    "pytorch" (see `dlm_dist.kernels.wkv7`). seed: draws the initial values (see `rwkv7_init`); None leaves the
    parameters unset for a caller that fills them.

    Layer 0 owns `v0`, `v1`, `v2` without using them, as BlinkDL's checkpoints have them. They enter its graph
    with weight zero: their gradient is exactly 0 and never missing, which data-parallel wrappers and ZeRO
    need, and no optimizer of ours moves them.
    """

    def __init__(
        self,
        hidden_size: int,
        head_size: int = 64,
        layer: int = 0,
        num_layers: int = 1,
        ranks: LoraRanks | None = None,
        *,
        direction: str = "causal",
        tied: bool = False,
        gate_init: float = 0.0,
        depth_seed: DepthSeed | None = None,
        kernel: str = "auto",
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        if head_size < 1 or hidden_size < 1 or hidden_size % head_size:
            raise ValueError(f"hidden_size {hidden_size} is no multiple of head_size {head_size}.")
        if direction not in SCANS:
            raise ValueError(f"direction is {direction!r}: a time mix knows {', '.join(SCANS)}.")
        if kernel not in KERNELS:
            raise ValueError(f"kernel is {kernel!r}: choose one of {', '.join(KERNELS)}.")
        if depth_seed is not None and direction != "causal":
            raise ValueError(f"depth_seed needs direction 'causal', not {direction!r}: a seed belongs to one scan.")
        ranks = ranks or lora_ranks(hidden_size)
        self.head_size = head_size
        self.num_heads = hidden_size // head_size
        self.layer = layer
        self.direction = direction
        self.tied = tied
        self.depth_seed = depth_seed if layer > 0 else None
        self.kernel = kernel

        def vector() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, hidden_size))

        def low_rank(rank: int) -> tuple[nn.Parameter, nn.Parameter]:
            return nn.Parameter(torch.empty(hidden_size, rank)), nn.Parameter(torch.empty(rank, hidden_size))

        self.x_r, self.x_w, self.x_k = vector(), vector(), vector()
        self.x_v, self.x_a, self.x_g = vector(), vector(), vector()
        self.w0, self.a0, self.v0 = vector(), vector(), vector()
        self.w1, self.w2 = low_rank(ranks.w)
        self.a1, self.a2 = low_rank(ranks.a)
        self.v1, self.v2 = low_rank(ranks.v)
        self.g1, self.g2 = low_rank(ranks.g)
        self.k_k, self.k_a = vector(), vector()
        self.r_k = nn.Parameter(torch.empty(self.num_heads, head_size))
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.ln_x = HeadNorm(self.num_heads, hidden_size, eps=64e-5)
        if direction == "bidirectional":
            self.direction_gate = nn.Linear(hidden_size, hidden_size)
            if not tied:
                self.backward_mix = TimeMix(hidden_size, head_size, layer, num_layers, ranks, kernel=kernel, seed=None)
        if self.depth_seed is not None and (self.depth_seed.gate or self.depth_seed.variant == "inject"):
            self.seed_gate = nn.Parameter(torch.empty(self.num_heads))
        if seed is not None:
            seed_init = 0.0 if depth_seed is None else depth_seed.gate_init
            sizes = InitSizes(num_layers, hidden_size, head_size, gate_init, seed_init)
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    parameter.copy_(initial_value(f"blocks.{layer}.att.{name}", parameter.shape, sizes, seed))

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None = None,
        documents: Documents | None = None,
        below: Tensor | None = None,
        resume: ScanState | None = None,
    ) -> MixOutput:
        """x [B, T, C] through the mix. `v_first` is None in layer 0 and only there.

        documents: x is then one packed row (B = 1) and every document is on its own; with blocks a token sees no later
        one, and where the clean tokens follow, the noisy ones see those of the blocks before their own. below: the
        final WKV states of the layer below, for a layer with a depth seed. resume: where the scan from left to right
        of the tokens before x ended, by row or document; the scan from right to left never leaves x, or its blocks.
        """
        if (v_first is None) != (self.layer == 0):
            raise ValueError(f"v_first comes from layer 0 and goes to all others; this is layer {self.layer}.")
        if (below is None) != (self.depth_seed is None):
            raise ValueError(
                "the state of the layer below goes to layers above 0 that have a depth_seed, and only there."
            )
        if below is not None and documents is not None and documents.blocks is not None:
            raise ValueError("a depth seed has seen the later blocks: it takes no documents with blocks.")
        if resume is not None and (self.direction == "reverse" or (documents is not None and documents.clean_follows)):
            raise ValueError(
                "only a scan from left to right, over one stream, can go on from where another call ended."
            )
        if self.direction == "causal":
            return self._scan(x, v_first, documents, below, resume)
        if self.direction == "bidirectional":
            return self._both_ways(x, v_first, documents, resume)
        flipped = None if v_first is None else reverse(v_first, documents)
        mixed = self._scan(reverse(x, documents), flipped, None if documents is None else documents.backward)
        v_first = reverse(mixed.v_first, documents) if v_first is None else v_first
        return MixOutput(reverse(mixed.out, documents), v_first, None)

    def _both_ways(
        self, x: Tensor, v_first: Tensor | None, documents: Documents | None, resume: ScanState | None
    ) -> MixOutput:
        """Both scans and their gated sum; v_first holds both directions, the backward one in reversed order."""
        side = 0 if documents is None else 1
        backwards = reverse(x, documents)
        if self.tied and resume is None and not (documents is not None and documents.clean_follows):
            both = None if documents is None else documents.both_ways
            out, v_first, ends = self._scan(torch.cat([x, backwards], side), v_first, both)
            forward, backward = out.chunk(2, side)
            assert ends is not None
            rows = len(x) if documents is None else len(documents.lengths)
            end: ScanState | None = ScanState(ends.previous[:rows], ends.wkv[:rows])
        else:
            firsts = (None, None) if v_first is None else v_first.chunk(2, side)
            forward, forward_first, end = self._scan(x, firsts[0], documents, resume=resume)
            backward_mix = self if self.tied else self.backward_mix
            spans = None if documents is None else documents.backward
            backward, backward_first, _ = backward_mix._scan(backwards, firsts[1], spans)
            v_first = torch.cat([forward_first, backward_first], side) if v_first is None else v_first
        alpha = torch.sigmoid(self.direction_gate(x))
        return MixOutput(torch.lerp(reverse(backward, documents), forward, alpha), v_first, end)

    def _scan(
        self,
        x: Tensor,
        v_first: Tensor | None,
        documents: Documents | None,
        below: Tensor | None = None,
        resume: ScanState | None = None,
    ) -> MixOutput:
        """One direction, from left to right."""
        fused = fused_steps(x, self.head_size, self.kernel)
        difference = _shift(x, documents, None if resume is None else resume.previous, "token_shift" in fused)
        shifts = [self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g]
        mixed_r, mixed_w, mixed_k, mixed_v, mixed_a, mixed_g = mixes(x, difference, shifts, fused="mixes" in fused)
        r, k = self.receptance(mixed_r), self.key(mixed_k)
        log_w = self._log_decay(mixed_w)
        v, v_first = self._value(mixed_v, v_first)
        rate = torch.sigmoid(wide(self.a0) + wide((mixed_a @ self.a1) @ self.a2))
        gate = torch.sigmoid(mixed_g @ self.g1) @ self.g2

        removed = F.normalize(self._heads(wide(k) * wide(self.k_k)), dim=-1, eps=1e-12)
        replaced = removed * self._heads(rate)
        k = scaled_key(k, rate, self.k_a, fused="key" in fused)
        r, log_w, k, v_heads = (self._heads(t) for t in (r, log_w, k, v))
        operands = (r, log_w, k, v_heads, -removed.to(x.dtype), replaced.to(x.dtype))
        out, wkv = self._recurrence(operands, documents, below, None if resume is None else resume.wkv)

        out = corrected_output(self.ln_x(out.flatten(-2)), r, k, self.r_k, v_heads, gate, fused="correction" in fused)
        return MixOutput(self.output(out), v_first, ScanState(last_rows(x, documents), wkv))

    def _recurrence(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
        documents: Documents | None,
        below: Tensor | None,
        start: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """WKV-7 over [B, T, H, N] operands from `start`, or from the seed that `below` gives: out, final states."""
        if documents is not None and documents.clean_follows:
            return self._block_recurrence(operands, documents)
        bounds = None if documents is None else documents.bounds
        if below is None:
            return wkv7(*operands, start, bounds, self.kernel)
        assert self.depth_seed is not None
        start = self.depth_seed.scale * below
        if self.depth_seed.variant == "seed":
            start = self._gate() * start if self.depth_seed.gate else start
            return wkv7(*operands, start, bounds, self.kernel)
        # With M = g S_T the recurrence S_t = diag(w) S_{t-1} + b (a^T S_{t-1}) + k v^T + diag(1 - w) M is, for
        # D = S - M, that of WKV-7 with one more source, b (a^T M). It is linear in its sources: one scan for each.
        target = self._gate() * below
        r, log_w, k, v, a, b = operands
        sources = (torch.cat([k, b], 2), torch.cat([v, read(a, target, documents).to(v.dtype)], 2))
        r2, log_w2, a2, b2 = (torch.cat([x, x], 2) for x in (r, log_w, a, b))
        starts = torch.cat([start - target, torch.zeros_like(start)], 1)
        out, states = wkv7(r2, log_w2, *sources, a2, b2, starts, bounds, self.kernel)
        out = sum(out.chunk(2, 2), read(r, target, documents).to(v.dtype))
        return out, sum(states.chunk(2, 1), target)

    def _block_recurrence(
        self, operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], documents: Documents
    ) -> tuple[Tensor, Tensor]:
        """Both streams, every block from the state that the clean blocks before it leave.

        A block makes P S + Q of the state S before it. One scan over the clean blocks from zero gives Q, one without
        values from the identity P; the chain of all states follows, and each block of either stream starts from its
        own. This asks nothing of the kernel but initial and final states, and keeps four states of N x N per head and
        block for the backward pass: 16 N C / (block length) bytes per clean token and layer.
        """
        blocks = documents.blocks
        assert blocks is not None
        half = documents.first.shape[1]
        r, log_w, k, v, a, b = (x[:, half:] for x in operands)
        _, added = wkv7(r, log_w, k, v, a, b, None, blocks.bounds, self.kernel)
        identity = torch.eye(self.head_size, dtype=added.dtype, device=added.device).expand_as(added)
        _, transfer = wkv7(r, log_w, k, torch.zeros_like(v), a, b, identity, blocks.bounds, self.kernel)
        starts = chain_blocks(transfer, added, documents)
        both = blocks.followed_by(blocks)
        return wkv7(*operands, torch.cat([starts, starts]), both.bounds, self.kernel)

    def _gate(self) -> Tensor:
        """g [H, 1, 1], fp32."""
        return torch.sigmoid(wide(self.seed_gate)).view(-1, 1, 1)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, H, N]."""
        return x.unflatten(-1, (self.num_heads, self.head_size))

    def _log_decay(self, mixed: Tensor) -> Tensor:
        """log w = -exp(-0.5) sigmoid(d) [B, T, C] in fp32: w itself would lose its digits in 16 bits."""
        return LOG_DECAY_BOUND * torch.sigmoid(wide(self.w0) + wide(torch.tanh(mixed @ self.w1) @ self.w2))

    def _value(self, mixed: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values [B, T, C], mixed with those of layer 0, and layer 0's values."""
        v = self.value(mixed)
        if v_first is None:
            unused = self.v0.sum() + self.v1.sum() + self.v2.sum()
            v = v + 0.0 * unused
            return v, v
        return torch.lerp(v, v_first, torch.sigmoid(self.v0 + (mixed @ self.v1) @ self.v2)), v_first


def last_rows(x: Tensor, documents: Documents | None) -> Tensor:
    """The last token of each row, or of each document of a packed row: [B, T, C] -> [B or D, C]."""
    return x[:, -1] if documents is None else x[0].index_select(0, documents.bounds[1:] - 1)


def _shift(x: Tensor, documents: Documents | None, previous: Tensor | None, fused: bool = False) -> Tensor:
    """The previous token minus the current one. Where clean tokens follow, a noisy block follows on the clean ones."""
    if documents is None:
        return shift_difference(x, previous=previous, fused=fused)
    if not documents.clean_follows:
        difference = shift_difference(x, documents.first, None, documents.bounds, fused)
        if previous is None:
            return difference
        return difference.index_add(1, documents.bounds[:-1], previous.unsqueeze(0))
    assert documents.blocks is not None
    noisy, clean = x.chunk(2, 1)
    difference = shift_difference(clean, documents.first, None, documents.bounds, fused)
    inside = shift_difference(noisy, documents.blocks.first, None, documents.blocks.bounds, fused)
    return torch.cat([torch.where(documents.blocks.first, difference + clean - noisy, inside), difference], 1)


def read(queries: Tensor, states: Tensor, documents: Documents | None) -> Tensor:
    """Each token's query against the state of its row or document: [B, T, H, N] and [D, H, N, N] -> [B, T, H, N]."""
    queries = queries.to(states.dtype)
    if documents is None:
        return torch.einsum("bthk,bhkv->bthv", queries, states)
    parts = zip(queries[0].split(documents.lengths), states, strict=True)
    return torch.cat([torch.einsum("thk,hkv->thv", part, state) for part, state in parts]).unsqueeze(0)


class ChannelMix(nn.Module):
    """RWKV-7's feed-forward: token shift, then relu(x W_key)^2 W_value with 4 C hidden channels.

    `backwards`: the shift brings in the next token instead of the previous one.
    """

    def __init__(self, hidden_size: int, backwards: bool = False) -> None:
        super().__init__()
        self.backwards = backwards
        self.x_k = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.key = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.value = nn.Linear(4 * hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, documents: Documents | None = None, previous: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]. `previous` [B or D, C] precedes the rows or documents, from an earlier call."""
        if self.backwards:
            first = None if documents is None else documents.backward.last.flip(1)
            difference = shift_difference(x.flip(1), first).flip(1)
        else:
            difference = _shift(x, documents, previous)
        return self.value(F.relu(self.key(torch.addcmul(x, difference, self.x_k))).square())
