"""Qwen3 as a diffusion backbone: transformers' own layers, with attention that may look both ways.

Parameters carry the names of transformers' `Qwen3ForCausalLM`, and with `direction: causal` the logits are its
logits. Who sees whom is a `Visibility`, which `attention` realises.
"""

from __future__ import annotations

import copy

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import DynamicCache, Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3PreTrainedModel

from dlm_dist.compatibility import layer_patterns_refusal
from dlm_dist.models import attention
from dlm_dist.models.loss_head import LossHead
from dlm_dist.models.mask_noise import add_mask_noise
from dlm_dist.models.outputs import DenoiserOutput
from dlm_dist.models.token_ids import check_mask_token_id
from dlm_dist.models.visibility import LayerPattern, Visibility, unbound
from dlm_dist.randomness import derive_seed

DIRECTIONS = ("bidirectional", "causal")


@strict
class Qwen3DiffusionConfig(Qwen3Config):
    """Qwen3's sizes plus the mask token and the direction of attention.

    `mask_token_id` is the id that stands for a hidden token; `direction` is "bidirectional" or "causal".
    `layer_patterns` says what each layer leaves of that, a list that is repeated over the layers: "bidirectional" (all
    of it), "causal" (nothing behind the token), "block_causal:N" (nothing behind its block of N tokens of its document)
    or "window:N" (nothing farther away than N tokens); None: all layers leave all. In a causal model only "causal" and
    "window:N" say something.

    Defaults that differ from `Qwen3Config`: `intermediate_size` 3 * hidden_size, `num_key_value_heads` the number of
    attention heads, and the rotary base 1e6 of all published Qwen3 models.
    """

    model_type = "dlm_qwen3"
    default_theta = 1_000_000.0

    intermediate_size: int | None = None  # type: ignore[assignment]
    num_key_value_heads: int | None = None
    use_cache: bool = False
    mask_token_id: int | None = None
    direction: str = "bidirectional"
    layer_patterns: list[str] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 3 * self.hidden_size
        super().__post_init__(**kwargs)
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction is {self.direction!r}: Qwen3 knows {' and '.join(DIRECTIONS)}.")
        check_mask_token_id(self)
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of"
                f" num_key_value_heads {self.num_key_value_heads}."
            )
        if self.use_sliding_window:
            raise ValueError("use_sliding_window is true: set it to false, and name such layers in layer_patterns.")
        mistake = layer_patterns_refusal(self.layer_patterns, self.direction, self.num_hidden_layers)
        if mistake is not None:
            raise ValueError(f"layer_patterns is {self.layer_patterns}: {mistake}.")

    def patterns(self) -> tuple[LayerPattern, ...]:
        """What each layer leaves of what a token may see."""
        named = [LayerPattern.parse(text) for text in self.layer_patterns or ["bidirectional"]]
        return tuple(named[layer % len(named)] for layer in range(self.num_hidden_layers))


class Qwen3ForDiffusion(Qwen3PreTrainedModel):
    """Qwen3 layers and a loss head (tied to the embedding with `tie_word_embeddings`)."""

    config: Qwen3DiffusionConfig
    config_class = Qwen3DiffusionConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' protocol
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: Qwen3DiffusionConfig) -> None:
        super().__init__(config)
        if config._attn_implementation not in ("sdpa", attention.INTERFACE):
            raise ValueError(
                f"attn_implementation is {config._attn_implementation!r}: leave it out, and choose by"
                " set_attention_kernel."
            )
        config._attn_implementation = attention.INTERFACE
        self.attention_kernel = "auto"
        self.attention_ran: str | None = None
        """What the last forward ran: "sdpa" without any mask, "sdpa with a mask", or "flex"."""
        self.model = Qwen3Model(config)
        self.lm_head = LossHead(config.hidden_size, config.vocab_size)
        self.post_init()

    @property
    def direction(self) -> str:
        """ "bidirectional" or "causal"."""
        return self.config.direction

    def set_attention_kernel(self, kernel: str) -> None:
        """What computes attention where a mask is needed, from now on: one of `attention.KERNELS`."""
        if kernel not in attention.KERNELS:
            raise ValueError(f"kernel is {kernel!r}: choose one of {', '.join(attention.KERNELS)}.")
        self.attention_kernel = kernel

    def attention_choice(self, device: torch.device) -> attention.Choice:
        """What computes attention on `device` where a mask is needed, and why. A caller's bias always runs on SDPA."""
        return attention.choose(
            self.attention_kernel, device, self.config.head_dim, self.config.attention_dropout if self.training else 0.0
        )

    def forward(
        self,
        input_ids: Tensor,
        *,
        document_ids: Tensor | None = None,
        block_ids: Tensor | None = None,
        clean_ids: Tensor | None = None,
        prompt_and_own_block: bool = False,
        attention_bias: Tensor | None = None,
        annealing: Tensor | None = None,
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

        `input_ids` [B, T]. `document_ids` [B, T]: tokens see each other only where ids are equal, and nobody sees -1;
        None means that each row is one document. `block_ids` [B, T], not falling inside a document: a token sees no
        later block of its document; `visibility.turn_blocks` makes them for prompts, answers and chats. With
        `prompt_and_own_block` a token sees its own block and block 0 alone. `clean_ids` [B, T], with `block_ids`: a
        token sees its own block of `input_ids` and the earlier blocks of `clean_ids` (block diffusion). `annealing`
        [B, 3] int64: the columns are `Visibility.annealing`; a causal model takes none. `attention_bias`
        [B or 1, 1, T, T] (with `clean_ids` 2 T, the clean tokens behind the others) is added to the attention scores of
        every layer and head where all of these leave a pair open (its gradient is kept).
        `mask_noise_keys`, `mask_noise_scales` [B]: see `mask_noise.add_mask_noise`.

        Without `supervised`: `DenoiserOutput(logits=[B, T, V])`. With `supervised` [M] (indices into B*T), `targets`
        [M] and `weights` [M] fp32: sum_i weights[i] * CE of row supervised[i], 0-d fp32; with `per_row` also
        the unweighted losses [M] fp32. `l2wrap`, `label_smoothing`, `confidence_weight`, `z_loss`: as
        `LossHead.forward`.
        """
        if prompt_and_own_block and (block_ids is None or clean_ids is not None):
            raise ValueError("prompt_and_own_block needs block_ids [B, T], and takes no clean_ids.")
        if clean_ids is not None and block_ids is None:
            raise ValueError("clean_ids [B, T] need block_ids [B, T] beside them.")
        if annealing is not None and self.direction == "causal":
            raise ValueError("annealing shows tokens that a model of direction causal never sees: leave it out.")
        batch, length = input_ids.shape
        visibility = Visibility(
            batch,
            length,
            input_ids.device,
            document_ids,
            block_ids,
            causal=self.direction == "causal",
            prompt_and_own_block=prompt_and_own_block,
            two_streams=clean_ids is not None,
            annealing=None if annealing is None else unbound(annealing),
        )
        masks = self._masks(visibility, attention_bias)
        self.attention_ran = masks.kernel
        mask_id, embedded = self.config.mask_token_id, self.model.embed_tokens(input_ids)
        embedded = add_mask_noise(embedded, input_ids, mask_id, mask_noise_keys, mask_noise_scales)
        if clean_ids is not None:
            embedded = torch.cat([embedded, self.model.embed_tokens(clean_ids)], 1)
        hidden = self.model(
            inputs_embeds=embedded,
            attention_mask={"full_attention": masks},
            position_ids=visibility.positions(),
            use_cache=False,
        ).last_hidden_state[:, :length]
        if supervised is None:
            return DenoiserOutput(logits=self.lm_head(hidden))
        if targets is None or weights is None:
            raise ValueError("supervised rows need targets [M] and weights [M] beside them.")
        rows = hidden.flatten(0, 1).index_select(0, supervised)
        return self.lm_head(rows, targets, weights, per_row, l2wrap, label_smoothing, confidence_weight, z_loss)

    def incremental(
        self, input_ids: Tensor, state: DynamicCache | None = None, block_length: int | None = None
    ) -> tuple[Tensor, DynamicCache]:
        """Logits [B, T, V] of tokens [B, T] that follow those of `state`, and the state behind them.

        T is any number: a prompt in one call, then token by token. The logits are those of one pass over all tokens.
        `block_length`: the tokens are whole blocks of so many, and none sees a later block; without it the direction
        must be causal, or ValueError is raised. The state, keys and values of every token, stays as it was handed in.
        """
        hidden, state = self._continued(input_ids, state, block_length)
        return self.lm_head(hidden), state

    def advance(
        self, input_ids: Tensor, state: DynamicCache | None = None, block_length: int | None = None
    ) -> DynamicCache:
        """The state of `incremental`, without the logits."""
        return self._continued(input_ids, state, block_length)[1]

    def _continued(
        self, input_ids: Tensor, state: DynamicCache | None, block_length: int | None
    ) -> tuple[Tensor, DynamicCache]:
        """What enters the head [B, T, C] of tokens that follow `state`, and the state behind them."""
        causal = self.direction == "causal"
        if not causal and block_length is None:
            raise ValueError(
                f"a model of direction {self.direction} sees later tokens: it can only be run block by block."
            )
        grown = _grown_apart(state)
        past, length = grown.get_seq_length(), input_ids.shape[1]
        hidden = self.model(
            input_ids,
            attention_mask={"full_attention": self._continued_masks(past, length, block_length, input_ids.device)},
            position_ids=torch.arange(past, past + length, device=input_ids.device)[None],
            past_key_values=grown,
            use_cache=True,
        ).last_hidden_state
        return hidden, grown

    def _masks(self, visibility: Visibility, attention_bias: Tensor | None) -> attention.LayerMasks:
        """What the layers run with. Raises ValueError for a bias of another shape."""
        if attention_bias is not None:
            batch, width = visibility.batch, visibility.width
            if attention_bias.shape not in ((batch, 1, width, width), (1, 1, width, width)):
                raise ValueError(
                    f"attention_bias must be [{batch}, 1, {width}, {width}], got {tuple(attention_bias.shape)}."
                )
            attention_bias = attention_bias.to(self.model.embed_tokens.weight.dtype)
        kernel = self.attention_choice(visibility.device).kernel
        return attention.layer_masks(visibility, self.config.patterns(), kernel, attention_bias)

    def _continued_masks(
        self, past: int, length: int, block_length: int | None, device: torch.device
    ) -> attention.LayerMasks:
        """Those of `length` tokens behind `past` ones."""
        causal, places = self.direction == "causal", torch.arange(past + length, device=device)
        blocks = None if block_length is None else places[None] // block_length
        whole = Visibility(1, past + length, device, block_ids=blocks, causal=causal)
        # SDPA's own causal mask would count the queries from the first key; one block sees all.
        plain = past == 0 or length == 1 if causal else length == block_length
        masks: list[Tensor | None] = []
        for pattern in self.config.patterns():
            if plain and pattern in (LayerPattern(), LayerPattern(causal=causal)):
                masks.append(None)
            else:
                rule = whole.in_layer(pattern)
                masks.append(rule.sees(places[:1], places[past:, None], places[None])[None, None])
        return attention.LayerMasks("sdpa", tuple(masks), (causal,) * len(masks))

    @torch.no_grad()
    def initialize_(self, seed: int) -> None:
        """Draws every parameter anew as transformers does: normal(0, `initializer_range`), norms 1, biases 0.

        Each parameter has a generator of its own, seeded by (seed, its name), and is drawn in fp32 on the CPU: the
        values depend neither on the order of the parameters nor on device and dtype.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                generator = torch.Generator().manual_seed(derive_seed(seed, "init", name))
                drawn = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(drawn.normal_(0.0, self.config.initializer_range, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
        if self.config.pad_token_id is not None:
            self.model.embed_tokens.weight[self.config.pad_token_id] = 0.0

    def parameter_roles(self) -> dict[str, str]:
        """The role of each name in `named_parameters()`: matrix, embedding, head (if untied) or vector.

        By name alone: in a model that ZeRO-3 has cut into parts no parameter has its shape.
        """
        special = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
        return {
            name: special.get(name, "vector" if name.endswith(("norm.weight", ".bias")) else "matrix")
            for name, _ in self.named_parameters()
        }

    def flops_per_token(self, sequence_length: int, block_length: int | None = None) -> float:
        """Forward FLOPs of the layers per token (2 per multiply-add), without embedding and head.

        Scores and weighted values count each key once that direction and layer pattern let a token of a whole row see.
        `block_length`: of block diffusion, for the tokens of both streams.
        """
        config = self.config
        attention_width = config.num_attention_heads * config.head_dim
        assert config.num_key_value_heads is not None
        assert config.intermediate_size is not None
        key_value_width = config.num_key_value_heads * config.head_dim
        projections = config.hidden_size * 2 * (attention_width + key_value_width)
        mlp = 3 * config.hidden_size * config.intermediate_size
        causal = self.direction == "causal"
        keys = sum(pattern.mean_keys(sequence_length, causal, block_length) for pattern in config.patterns())
        return 2.0 * (config.num_hidden_layers * (projections + mlp) + 2 * attention_width * keys)

    def head_flops_per_row(self) -> float:
        """Forward FLOPs of the head for one row (2 per multiply-add)."""
        return 2.0 * self.config.hidden_size * self.config.vocab_size


def _grown_apart(state: DynamicCache | None) -> DynamicCache:
    """A cache with the same tokens, whose growth leaves `state` as it is: layers grow by making new tensors."""
    if state is None:
        return DynamicCache()
    apart = copy.copy(state)
    apart.layers = [copy.copy(layer) for layer in state.layers]
    return apart
