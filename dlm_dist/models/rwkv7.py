"""RWKV-7 (x070) as a diffusion backbone: BlinkDL's equations and parameter names, scanned one way or both ways.

A state dict of his `.pth` files loads as it is. What is added to his model is isolation of packed documents,
an optional second scan over every document reversed, and a head that computes the loss of chosen rows only.

16-bit models keep in fp32: the decay's pre-activation and log w, the in-context rate a, the normalised key, the
statistics of all norms, and (in the kernel) the WKV state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as hf_init
from transformers.modeling_layers import GradientCheckpointingLayer

from dlm_dist.kernels.wkv7 import LOG_DECAY_BOUND, wkv7
from dlm_dist.models.loss_head import LossHead
from dlm_dist.models.outputs import DenoiserOutput
from dlm_dist.models.rwkv7_init import InitSizes, initial_value

DIRECTIONS = ("causal", "bidirectional")

_LORA_NAMES = frozenset(f"{kind}{i}" for kind in "wavg" for i in (1, 2))
_MATRIX_MODULES = frozenset({"receptance", "key", "value", "output", "direction_gate"})


class LoraRanks(NamedTuple):
    """Ranks of the four low-rank maps: decay w, in-context rate a, value residual v, gate g."""

    w: int
    a: int
    v: int
    g: int


def default_lora_ranks(hidden_size: int) -> LoraRanks:
    """BlinkDL's current rule. Released 0.1-2.9B checkpoints follow an older one: read theirs from the shapes."""

    def rank(factor: float) -> int:
        return max(32, 32 * round(factor * math.sqrt(hidden_size) / 32))

    return LoraRanks(w=rank(2.5), a=rank(2.5), v=rank(1.7), g=rank(5.0))


@strict
class RWKV7Config(PreTrainedConfig):
    """Sizes of an RWKV-7 backbone.

    `head_size` channels per head; `*_low_rank_dim` the ranks of `LoraRanks` (w, a, v, g), None = by
    `default_lora_ranks`, resolved on construction; `mask_token_id` the id that stands for a hidden token.
    `direction` "causal" or "bidirectional"; with the latter `tie_directions` says whether both scans share their
    weights, and `direction_gate_init` is the initial bias of the gate between them: 0 weighs both alike, 4 starts
    at 98 % forward, for a warm start from causal weights.
    """

    model_type = "dlm_rwkv7"

    vocab_size: int = 65536
    hidden_size: int = 768
    num_hidden_layers: int = 12
    head_size: int = 64
    decay_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None
    mask_token_id: int | None = None
    direction: str = "causal"
    tie_directions: bool = True
    direction_gate_init: float | int = 0.0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction is {self.direction!r}: RWKV-7 knows {' and '.join(DIRECTIONS)}.")
        if self.hidden_size % self.head_size:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of head_size {self.head_size}.")
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id {self.mask_token_id} lies outside the vocabulary of {self.vocab_size}.")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is true: RWKV-7's head has weights of its own, set it to false.")
        ranks = default_lora_ranks(self.hidden_size)
        self.decay_low_rank_dim = self.decay_low_rank_dim or ranks.w
        self.a_low_rank_dim = self.a_low_rank_dim or ranks.a
        self.v_low_rank_dim = self.v_low_rank_dim or ranks.v
        self.gate_low_rank_dim = self.gate_low_rank_dim or ranks.g

    @property
    def lora_ranks(self) -> LoraRanks:
        """The ranks in use."""
        ranks = (self.decay_low_rank_dim, self.a_low_rank_dim, self.v_low_rank_dim, self.gate_low_rank_dim)
        return LoraRanks(*(rank for rank in ranks if rank is not None))


class Documents(NamedTuple):
    """The documents of one packed row of T tokens."""

    bounds: Tensor
    """[D + 1] int64, where each starts and the last ends: cu_seqlens."""
    first: Tensor
    """[1, T, 1] bool, True at the first token of each."""
    reversal: Tensor
    """[T] int64, the position that each position swaps with when every document is reversed in its own span."""

    @staticmethod
    def from_ids(document_ids: Tensor) -> Documents:
        """From ids [B, T], the rows laid end to end. A new id begins a document, and so does a new row.

        Positions with id -1 (a truncated tail) form spans of their own, so nothing else can see them. Waits for the
        device once, since the number of documents decides a shape.
        """
        first = torch.ones_like(document_ids, dtype=torch.bool)
        first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        first = first.flatten()
        total = first.numel()
        starts = first.nonzero().squeeze(1)
        bounds = torch.cat([starts, starts.new_tensor([total])])
        document = first.cumsum(0) - 1
        mirrored = bounds[document] + bounds[document + 1] - 1
        reversal = mirrored - torch.arange(total, device=first.device)
        return Documents(bounds, first.view(1, total, 1), reversal)

    def twice(self) -> Documents:
        """The documents of the row followed by its copy."""
        total = self.first.shape[1]
        return Documents(
            torch.cat([self.bounds, self.bounds[1:] + total]),
            self.first.repeat(1, 2, 1),
            torch.cat([self.reversal, self.reversal + total]),
        )


class _Permute(torch.autograd.Function):
    """x[:, index] for an index that is its own inverse; the gradient is a gather too, hence deterministic."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad.index_select(1, ctx.saved_tensors[0]), None


def reverse(x: Tensor, documents: Documents | None) -> Tensor:
    """x [B, T, C] with the order of tokens reversed inside each document (each row, without documents)."""
    return x.flip(1) if documents is None else _Permute.apply(x, documents.reversal)


def shift_difference(x: Tensor, documents: Documents | None) -> Tensor:
    """The previous token minus the current one [B, T, C]; zeros precede the first token of a document."""
    previous = F.pad(x[:, :-1], (0, 0, 1, 0))
    if documents is not None:
        previous = previous.masked_fill(documents.first, 0.0)
    return previous - x


def _fp32(x: Tensor) -> Tensor:
    """At least fp32: 16-bit tensors are widened."""
    return x if x.dtype == torch.float64 else x.float()


class HeadNorm(nn.GroupNorm):
    """GroupNorm with one group per head over [..., C]; as a layer norm it needs no transposed layout."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (self.num_groups, -1))
        normed = F.layer_norm(heads, heads.shape[-1:], eps=self.eps).flatten(-2)
        return torch.addcmul(self.bias, normed, self.weight)


class TimeMix(nn.Module):
    """RWKV-7's time mixing: token shift, low-rank gates, the WKV-7 recurrence, normalised and gated.

    Usable by itself. `hidden_size` C is a multiple of `head_size` N; `layer` is the place in a stack of
    `num_layers`, which decides the initial values; layer 0 makes `v_first`, the others mix it into their values.
    `ranks` default to `default_lora_ranks(C)`. `seed` draws initial values (see `rwkv7_init`); None leaves the
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
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        if hidden_size % head_size:
            raise ValueError(f"hidden_size {hidden_size} is no multiple of head_size {head_size}.")
        ranks = ranks or default_lora_ranks(hidden_size)
        self.head_size = head_size
        self.num_heads = hidden_size // head_size
        self.layer = layer

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
        if seed is not None:
            sizes = InitSizes(num_layers, hidden_size, head_size)
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    parameter.copy_(initial_value(f"blocks.{layer}.att.{name}", parameter.shape, sizes, seed))

    def forward(
        self, x: Tensor, v_first: Tensor | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, C] -> (out [B, T, C], v_first [B, T, C]). `v_first` is None in layer 0 and only there.

        With `documents` x is one packed row (B = 1) and every document is on its own.
        """
        if (v_first is None) != (self.layer == 0):
            raise ValueError(f"v_first comes from layer 0 and goes to all others; this is layer {self.layer}.")
        difference = shift_difference(x, documents)
        r = self.receptance(torch.addcmul(x, difference, self.x_r))
        k = self.key(torch.addcmul(x, difference, self.x_k))
        log_w = self._log_decay(torch.addcmul(x, difference, self.x_w))
        v, v_first = self._value(torch.addcmul(x, difference, self.x_v), v_first)
        mixed_a = torch.addcmul(x, difference, self.x_a)
        rate = torch.sigmoid(_fp32(self.a0) + _fp32((mixed_a @ self.a1) @ self.a2))
        gate = torch.sigmoid(torch.addcmul(x, difference, self.x_g) @ self.g1) @ self.g2

        removed = F.normalize(self._heads(_fp32(k) * _fp32(self.k_k)), dim=-1, eps=1e-12)
        replaced = removed * self._heads(rate)
        k = (_fp32(k) * (1.0 + (rate - 1.0) * _fp32(self.k_a))).to(x.dtype)
        r, log_w, k, v_heads = (self._heads(t) for t in (r, log_w, k, v))
        bounds = None if documents is None else documents.bounds
        out, _ = wkv7(r, log_w, k, v_heads, -removed.to(x.dtype), replaced.to(x.dtype), cu_seqlens=bounds)

        strength = (_fp32(r) * _fp32(k) * _fp32(self.r_k)).sum(-1, keepdim=True).to(x.dtype)
        out = self.ln_x(out.flatten(-2)) + (strength * v_heads).flatten(-2)
        return self.output(out * gate), v_first

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, H, N]."""
        return x.unflatten(-1, (self.num_heads, self.head_size))

    def _log_decay(self, mixed: Tensor) -> Tensor:
        """log w = -exp(-0.5) sigmoid(d) [B, T, C] in fp32: w itself would lose its digits in 16 bits."""
        return LOG_DECAY_BOUND * torch.sigmoid(_fp32(self.w0) + _fp32(torch.tanh(mixed @ self.w1) @ self.w2))

    def _value(self, mixed: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values [B, T, C], mixed with those of layer 0, and layer 0's values."""
        v = self.value(mixed)
        if v_first is None:
            unused = self.v0.sum() + self.v1.sum() + self.v2.sum()
            v = v + 0.0 * unused
            return v, v
        return torch.lerp(v, v_first, torch.sigmoid(self.v0 + (mixed @ self.v1) @ self.v2)), v_first


class ChannelMix(nn.Module):
    """RWKV-7's feed-forward: token shift, then relu(x W_key)^2 W_value with 4 C hidden channels."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.key = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.value = nn.Linear(4 * hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        mixed = torch.addcmul(x, shift_difference(x, documents), self.x_k)
        return self.value(F.relu(self.key(mixed)).square())


class Block(GradientCheckpointingLayer):
    """One layer: x += time mix(ln1(x)); x += channel mix(ln2(x)). Block 0 first normalises the embedding (ln0).

    Bidirectional: the time mix also runs over each document reversed, token shift and v_first included, with its
    own weights `att_b` or those of `att`, and out = alpha forward + (1 - alpha) backward, with alpha =
    sigmoid(direction_gate(ln1(x))) per channel. v_first then holds both directions, the backward one in reversed
    order. The channel mix keeps its forward token shift.
    """

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        if layer == 0:
            self.ln0 = nn.LayerNorm(width, eps=1e-5)
        self.ln1 = nn.LayerNorm(width, eps=1e-5)
        self.ln2 = nn.LayerNorm(width, eps=1e-5)
        mix = (width, config.head_size, layer, config.num_hidden_layers, config.lora_ranks, None)
        self.att = TimeMix(*mix)
        self.bidirectional = config.direction == "bidirectional"
        self.tied = config.tie_directions
        if self.bidirectional:
            self.direction_gate = nn.Linear(width, width)
            if not self.tied:
                self.att_b = TimeMix(*mix)
        self.ffn = ChannelMix(width)
        self.layer = layer

    def forward(
        self, x: Tensor, v_first: Tensor | None, documents: Documents | None, twice: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, C], v_first (None in block 0) -> both anew. `twice` is `documents.twice()`, where it is used."""
        if self.layer == 0:
            x = self.ln0(x)
        if self.bidirectional:
            mixed, v_first = self._mix_both_ways(self.ln1(x), v_first, documents, twice)
        else:
            mixed, v_first = self.att(self.ln1(x), v_first, documents)
        x = x + mixed
        return x + self.ffn(self.ln2(x), documents), v_first

    def _mix_both_ways(
        self, x: Tensor, v_first: Tensor | None, documents: Documents | None, twice: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """Both scans and their gated sum [B, T, C]; v_first [2 B, T, C], or [1, 2 T, C] with documents."""
        side = 0 if documents is None else 1
        backwards = reverse(x, documents)
        if self.tied:
            out, v_first = self.att(torch.cat([x, backwards], side), v_first, twice)
            forward, backward = out.chunk(2, side)
        else:
            firsts = (None, None) if v_first is None else v_first.chunk(2, side)
            forward, forward_first = self.att(x, firsts[0], documents)
            backward, backward_first = self.att_b(backwards, firsts[1], documents)
            if v_first is None:
                v_first = torch.cat([forward_first, backward_first], side)
        alpha = torch.sigmoid(self.direction_gate(x))
        return torch.lerp(reverse(backward, documents), forward, alpha), v_first


class RWKV7ForDiffusion(PreTrainedModel):
    """Embedding, blocks, final norm and a loss head of its own weights."""

    config: RWKV7Config
    config_class = RWKV7Config
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers' protocol

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_out = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.head = LossHead(config.hidden_size, config.vocab_size)
        self.post_init()

    @property
    def direction(self) -> str:
        """ "causal" or "bidirectional"."""
        return self.config.direction

    def forward(
        self,
        input_ids: Tensor,
        *,
        document_ids: Tensor | None = None,
        supervised: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        per_row: bool = False,
    ) -> DenoiserOutput | Tensor | tuple[Tensor, Tensor]:
        """Logits of every position, or the loss of the supervised ones.

        `input_ids` [B, T]. `document_ids` [B, T]: a document is a run of equal ids and sees itself only; nobody sees
        -1; None means that each row is one document.

        Without `supervised`: `DenoiserOutput(logits=[B, T, V])`. With `supervised` [M] (indices into B*T), `targets`
        [M] and `weights` [M] fp32: sum_i weights[i] * CE of row supervised[i], 0-d fp32; with `per_row` also
        the unweighted losses [M] fp32.
        """
        x = self.body(input_ids, document_ids)
        if supervised is None:
            return DenoiserOutput(logits=self.head(self.ln_out(x)))
        if targets is None or weights is None:
            raise ValueError("supervised rows need targets [M] and weights [M] beside them.")
        # The norm works row by row, so only the rows that the head will see go through it.
        rows = self.ln_out(x.flatten(0, 1).index_select(0, supervised))
        return self.head(rows, targets, weights, per_row=per_row)

    def body(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """The residual stream after the last block [B, T, C], before the final norm."""
        x = self.emb(input_ids)
        documents = None if document_ids is None else Documents.from_ids(document_ids)
        twice = None
        if documents is not None:
            x = x.flatten(0, 1).unsqueeze(0)
            if self.direction == "bidirectional" and self.config.tie_directions:
                twice = documents.twice()
        v_first = None
        for block in self.blocks:
            x, v_first = block(x, v_first, documents, twice)
        return x.view(*input_ids.shape, -1)

    @torch.no_grad()
    def initialize_(self, seed: int) -> None:
        """Sets every parameter to its initial value under `seed` (see `rwkv7_init`), drawn in fp32 on the CPU."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, self._init_sizes(), seed))

    def _init_sizes(self) -> InitSizes:
        config = self.config
        return InitSizes(
            config.num_hidden_layers, config.hidden_size, config.head_size, float(config.direction_gate_init)
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """transformers' hook, for a model just constructed and for what a checkpoint lacks: values of seed 0.

        A causal checkpoint loaded as bidirectional gets its direction gates here.
        """
        prefix = next(name for name, candidate in self.named_modules() if candidate is module)
        for name, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                full_name = f"{prefix}.{name}" if prefix else name
                hf_init.copy_(parameter, initial_value(full_name, parameter.shape, self._init_sizes(), 0))

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding [V, C]."""
        return self.emb

    def get_output_embeddings(self) -> LossHead:
        """The head [V, C]."""
        return self.head

    def parameter_roles(self) -> dict[str, str]:
        """The role of each name in `named_parameters()`.

        matrix, embedding and head are what BlinkDL's recipe lets decay; decay_base is w0, which learns twice as
        fast; lora the low-rank maps; vector the rest.
        """
        return {name: _role(name) for name, _ in self.named_parameters()}

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward FLOPs of the blocks per token (2 per multiply-add), without embedding, norms and head.

        The recurrence counts as the token-by-token algorithm does: 9 N per channel (a^T S, the decay, two
        rank-one updates, the read-out), whatever chunks cost a kernel. Independent of `sequence_length`.
        """
        config = self.config
        width, layers, ranks = config.hidden_size, config.num_hidden_layers, config.lora_ranks
        low_rank = 4.0 * width * (ranks.w + ranks.a + ranks.g)
        mix = layers * (8.0 * width**2 + low_rank + 9.0 * width * config.head_size)
        mix += (layers - 1) * 4.0 * width * ranks.v
        if config.direction == "bidirectional":
            mix = 2.0 * mix + layers * 2.0 * width**2
        return mix + layers * 16.0 * width**2

    def head_flops_per_row(self) -> float:
        """Forward FLOPs of the head for one row (2 per multiply-add)."""
        return 2.0 * self.config.hidden_size * self.config.vocab_size


def _role(name: str) -> str:
    """A parameter's role by its place in the tree."""
    parts = name.split(".")
    if name in ("emb.weight", "head.weight"):
        return "embedding" if parts[0] == "emb" else "head"
    if parts[-1] == "w0":
        return "decay_base"
    if parts[-1] in _LORA_NAMES:
        return "lora"
    return "matrix" if parts[-1] == "weight" and parts[-2] in _MATRIX_MODULES else "vector"
