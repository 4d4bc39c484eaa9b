"""RWKV-7 (x070) as a language-model backbone: BlinkDL's equations and parameter names, scanned in any direction.

A state dict of his `.pth` files loads as it is. The layers are in `rwkv7_layers`, their initial values in
`rwkv7_init`; what is here is the stack: embedding, blocks, the final norm and a head that computes the loss of chosen
rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as hf_init
from transformers.modeling_layers import GradientCheckpointingLayer

from dlm_dist.kernels.wkv7 import KERNELS
from dlm_dist.models.documents import Documents
from dlm_dist.models.loss_head import LossHead
from dlm_dist.models.mask_noise import add_mask_noise
from dlm_dist.models.outputs import DenoiserOutput
from dlm_dist.models.rwkv7_init import InitSizes, initial_value, initialize_
from dlm_dist.models.rwkv7_layers import ChannelMix, DepthSeed, LoraRanks, ScanState, TimeMix, last_rows, lora_ranks
from dlm_dist.models.token_ids import check_mask_token_id

__all__ = [
    "DIRECTIONS",
    "RANK_FIELDS",
    "LayerState",
    "LoraRanks",
    "RWKV7Config",
    "RWKV7ForDiffusion",
    "TimeMix",
    "lora_ranks",
]

DIRECTIONS = ("causal", "bidirectional", "alternate", "dw_jrt")

RANK_FIELDS = ("decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim")
"""The fields of `LoraRanks` as the configuration names them."""

_LORA_NAMES = frozenset(f"{kind}{i}" for kind in "wavg" for i in (1, 2))
_MATRIX_MODULES = frozenset({"receptance", "key", "value", "output", "direction_gate"})


@strict
class RWKV7Config(PreTrainedConfig):
    """Sizes of an RWKV-7 backbone.

    `head_size` channels per head; `*_low_rank_dim` the ranks of `LoraRanks` (w, a, v, g), None = by
    `lora_ranks(hidden_size, low_rank_rule)`, resolved on construction; `mask_token_id` the id that stands for a hidden
    token. `direction`:

    - "causal": every layer scans from left to right.
    - "bidirectional": every layer scans both ways. `tie_directions` says whether both scans share their weights, and
      `direction_gate_init` is the initial bias of the gate between them: 0 weighs both alike, 4 starts at 98 %
      forward, for a warm start from causal weights.
    - "alternate": every second layer scans, and shifts tokens, from right to left.
    - "dw_jrt": every layer scans from left to right, above the first from the final state of the layer below; for
      `dw_jrt_variant`, `dw_jrt_scale`, `dw_jrt_gate` and `dw_jrt_gate_init` see `rwkv7_layers.DepthSeed`.
    """

    model_type = "dlm_rwkv7"

    vocab_size: int = 65536
    hidden_size: int = 768
    num_hidden_layers: int = 12
    head_size: int = 64
    low_rank_rule: str = "current"
    decay_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None
    mask_token_id: int | None = None
    direction: str = "causal"
    tie_directions: bool = False
    direction_gate_init: float | int = 0.0
    dw_jrt_variant: str = "seed"
    dw_jrt_scale: float | int = 1.0
    dw_jrt_gate: bool = False
    dw_jrt_gate_init: float | int = -2.0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction is {self.direction!r}: RWKV-7 knows {', '.join(DIRECTIONS)}.")
        if min(self.head_size, self.hidden_size) < 1 or self.hidden_size % self.head_size:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of head_size {self.head_size}.")
        check_mask_token_id(self)
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is true: RWKV-7's head has weights of its own, set it to false.")
        self.depth_seed()
        ranks = lora_ranks(self.hidden_size, self.low_rank_rule)
        for name, rank in zip(RANK_FIELDS, ranks, strict=True):
            if getattr(self, name) is None:
                setattr(self, name, rank)
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1, or None for the rule's.")

    @property
    def lora_ranks(self) -> LoraRanks:
        """The ranks in use."""
        return LoraRanks(*(getattr(self, name) for name in RANK_FIELDS))

    def depth_seed(self) -> DepthSeed | None:
        """What direction "dw_jrt" hands from layer to layer; None for the others. ValueError if that cannot be."""
        if self.direction != "dw_jrt":
            return None
        scale, gate_init = float(self.dw_jrt_scale), float(self.dw_jrt_gate_init)
        return DepthSeed(self.dw_jrt_variant, scale, self.dw_jrt_gate, gate_init)


class LayerState(NamedTuple):
    """Where one layer has ended on a prefix, for the tokens that follow it."""

    att: ScanState
    ffn_previous: Tensor
    """[B, C] the last token that entered the channel mix."""


State = Sequence[LayerState | None]
"""What a model knows of a prefix: an entry for each layer, None for those that scan from right to left."""


class BlockOutput(NamedTuple):
    """What a block returns: the residual stream, the values of layer 0, and where a scan from left to right ended."""

    x: Tensor
    v_first: Tensor
    state: LayerState | None


class Block(GradientCheckpointingLayer):
    """One layer: x += time mix(ln1(x)); x += channel mix(ln2(x)). Block 0 first normalises the embedding (ln0)."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        backwards = config.direction == "alternate" and layer % 2 == 1
        if layer == 0:
            self.ln0 = nn.LayerNorm(width, eps=1e-5)
        self.ln1 = nn.LayerNorm(width, eps=1e-5)
        self.ln2 = nn.LayerNorm(width, eps=1e-5)
        self.att = TimeMix(
            width,
            config.head_size,
            layer,
            config.num_hidden_layers,
            config.lora_ranks,
            direction="bidirectional" if config.direction == "bidirectional" else "reverse" if backwards else "causal",
            tied=config.tie_directions,
            depth_seed=config.depth_seed(),
            seed=None,
        )
        self.ffn = ChannelMix(width, backwards)
        self.layer = layer

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        documents: Documents | None,
        below: Tensor | None = None,
        resume: LayerState | None = None,
        keep_state: bool = True,
    ) -> BlockOutput:
        """x [B, T, C] and v_first (None in block 0) -> both anew. For `below` and `resume` see `TimeMix`.

        `keep_state` False gives no state: with an output that no loss depends on, the backward pass of ZeRO-3 under
        gradient checkpointing meets weights that are not gathered.
        """
        if self.layer == 0:
            x = self.ln0(x)
        mixed, v_first, scan = self.att(self.ln1(x), v_first, documents, below, None if resume is None else resume.att)
        x = x + mixed
        normed = self.ln2(x)
        x = x + self.ffn(normed, documents, None if resume is None else resume.ffn_previous)
        if scan is None or not keep_state:
            return BlockOutput(x, v_first, None)
        return BlockOutput(x, v_first, LayerState(scan, last_rows(normed, documents)))


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
        """One of DIRECTIONS."""
        return self.config.direction

    def set_kernel(self, kernel: str) -> None:
        """What computes the recurrences from now on: one of `dlm_dist.kernels.wkv7.KERNELS`."""
        if kernel not in KERNELS:
            raise ValueError(f"kernel is {kernel!r}: choose one of {', '.join(KERNELS)}.")
        for module in self.modules():
            if isinstance(module, TimeMix):
                module.kernel = kernel

    def forward(
        self,
        input_ids: Tensor,
        *,
        document_ids: Tensor | None = None,
        block_ids: Tensor | None = None,
        clean_ids: Tensor | None = None,
        mask_noise_keys: Tensor | None = None,
        mask_noise_scales: Tensor | None = None,
        supervised: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        per_row: bool = False,
        l2wrap: float | None = None,
        label_smoothing: float = 0.0,
        confidence_weight: float = 0.0,
        z_loss: float = 0.0,
    ) -> DenoiserOutput | Tensor | tuple[Tensor, Tensor]:
        """Logits of every position, or the loss of the supervised ones.

        `input_ids` [B, T]. `document_ids` [B, T]: a document is a run of equal ids and sees itself only; nobody sees
        -1; None means that each row is one document. `block_ids` [B, T]: runs of equal ids inside a document; a token
        sees no later block. `clean_ids` [B, T], with `block_ids`: a token sees its own block of `input_ids` and the
        earlier blocks of `clean_ids` (block diffusion). Direction "dw_jrt" takes no blocks: a seed has seen them all.
        `mask_noise_keys`, `mask_noise_scales` [B]: see `mask_noise.add_mask_noise`.

        Without `supervised`: `DenoiserOutput(logits=[B, T, V])`. With `supervised` [M] (indices into B*T), `targets`
        [M] and `weights` [M] fp32: sum_i weights[i] * CE of row supervised[i], 0-d fp32; with `per_row` also
        the unweighted losses [M] fp32. `l2wrap`, `label_smoothing`, `confidence_weight`, `z_loss`: as
        `LossHead.forward`.
        """
        x = self.body(input_ids, document_ids, block_ids, clean_ids, mask_noise_keys, mask_noise_scales)
        if supervised is None:
            return DenoiserOutput(logits=self.head(self.ln_out(x)))
        if targets is None or weights is None:
            raise ValueError("supervised rows need targets [M] and weights [M] beside them.")
        # The norm works row by row, so only the rows that the head will see go through it.
        rows = self.ln_out(x.flatten(0, 1).index_select(0, supervised))
        return self.head(rows, targets, weights, per_row, l2wrap, label_smoothing, confidence_weight, z_loss)

    def body(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        block_ids: Tensor | None = None,
        clean_ids: Tensor | None = None,
        mask_noise_keys: Tensor | None = None,
        mask_noise_scales: Tensor | None = None,
    ) -> Tensor:
        """The residual stream of `input_ids` after the last block [B, T, C], before the final norm."""
        documents = self._documents(input_ids, document_ids, block_ids, clean_ids)
        mask_id = self.config.mask_token_id
        x = add_mask_noise(self.emb(input_ids), input_ids, mask_id, mask_noise_keys, mask_noise_scales)
        if clean_ids is not None:
            x = torch.cat([x, self.emb(clean_ids)])
        if documents is not None:
            x = x.flatten(0, 1).unsqueeze(0)
        v_first = below = None
        for block in self.blocks:
            x, v_first, state = block(x, v_first, documents, below, None, self.direction == "dw_jrt")
            below = None if state is None else state.att.wkv
        if clean_ids is not None:
            x = x[:, : input_ids.numel()]
        return x.view(*input_ids.shape, -1)

    def _documents(
        self, input_ids: Tensor, document_ids: Tensor | None, block_ids: Tensor | None, clean_ids: Tensor | None
    ) -> Documents | None:
        """What the layers must know of documents and blocks; None for whole rows. ValueError for what cannot be."""
        for name, ids in (("document_ids", document_ids), ("block_ids", block_ids), ("clean_ids", clean_ids)):
            if ids is not None and ids.shape != input_ids.shape:
                raise ValueError(f"{name} are {list(ids.shape)}, but input_ids {list(input_ids.shape)}.")
        if block_ids is None:
            if clean_ids is not None:
                raise ValueError("clean_ids [B, T] need block_ids [B, T] beside them.")
            return None if document_ids is None else Documents.from_ids(document_ids)
        if self.direction == "dw_jrt":
            raise ValueError("direction dw_jrt takes no block_ids: its seeds have seen the later blocks.")
        documents = torch.zeros_like(block_ids) if document_ids is None else document_ids
        return Documents.with_blocks(documents, block_ids, clean_follows=clean_ids is not None)

    def incremental(
        self, input_ids: Tensor, state: State | None = None, block_length: int | None = None
    ) -> tuple[Tensor, State]:
        """Logits [B, T, V] of tokens [B, T] that follow those of `state`, and the state behind them.

        T is any number: a prompt in one call, then token by token, in constant time and memory. The logits are those
        of one pass over all tokens. `block_length`: the tokens are whole blocks of so many, none sees a later block,
        and any direction but "dw_jrt" will do; without it the direction must be causal, or ValueError is raised. The
        state that was handed in stays as it is.
        """
        x, state = self._continued(input_ids, state, block_length)
        return self.head(self.ln_out(x)), state

    def advance(self, input_ids: Tensor, state: State | None = None, block_length: int | None = None) -> State:
        """The state of `incremental`, without the logits."""
        return self._continued(input_ids, state, block_length)[1]

    def _continued(self, input_ids: Tensor, state: State | None, block_length: int | None) -> tuple[Tensor, State]:
        """The residual stream [B, T, C] of tokens that follow `state`, and the state behind them."""
        batch, length = input_ids.shape
        documents = None
        if self.direction != "causal":
            if block_length is None:
                raise ValueError(
                    f"a model of direction {self.direction} sees later tokens: it can only be run block by block."
                )
            assert length % block_length == 0
            block_ids = torch.arange(length, device=input_ids.device) // block_length
            documents = self._documents(input_ids, None, block_ids.expand(batch, -1), None)
        x, v_first, ends = self.emb(input_ids), None, []
        if documents is not None:
            x = x.flatten(0, 1).unsqueeze(0)
        for block, resume in zip(self.blocks, [None] * len(self.blocks) if state is None else state, strict=True):
            x, v_first, end = block(x, v_first, documents, None, resume)
            ends.append(end)
        return x.view(batch, length, -1), ends

    @torch.no_grad()
    def initialize_(self, seed: int) -> None:
        """Sets every parameter to its initial value under `seed` (see `rwkv7_init`), drawn in fp32 on the CPU."""
        initialize_(dict(self.named_parameters()), self._init_sizes(), seed)

    def _init_sizes(self) -> InitSizes:
        config = self.config
        gates = float(config.direction_gate_init), float(config.dw_jrt_gate_init)
        return InitSizes(config.num_hidden_layers, config.hidden_size, config.head_size, *gates)

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

    def flops_per_token(self, sequence_length: int, block_length: int | None = None) -> float:
        """Forward FLOPs of the blocks per token (2 per multiply-add), without embedding, norms and head.

        The recurrence counts as the token-by-token algorithm does: 9 N per channel (a^T S, the decay, two
        rank-one updates, the read-out), whatever chunks and the states before blocks cost a kernel. Independent of
        `sequence_length`, and in block diffusion of `block_length`.
        """
        config = self.config
        width, layers, ranks = config.hidden_size, config.num_hidden_layers, config.lora_ranks
        recurrence = 9.0 * width * config.head_size
        low_rank = 4.0 * width * (ranks.w + ranks.a + ranks.g)
        mix = layers * (8.0 * width**2 + low_rank + recurrence)
        mix += (layers - 1) * 4.0 * width * ranks.v
        if config.direction == "bidirectional":
            mix = 2.0 * mix + layers * 2.0 * width**2
        if config.direction == "dw_jrt" and config.dw_jrt_variant == "inject":
            # A second scan, and two reads of the injected state.
            mix += (layers - 1) * (recurrence + 4.0 * width * config.head_size)
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
