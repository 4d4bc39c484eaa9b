"""The configuration's section `model`: the backbone and its sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from dlm_dist import compatibility
from dlm_dist.config_types import Positive
from dlm_dist.settings import Mistake, Section, about

_BACKBONE_KEYS: dict[str, tuple[str, ...]] = {
    "rwkv7": (
        "head_size",
        "low_rank_rule",
        "decay_low_rank_dim",
        "a_low_rank_dim",
        "v_low_rank_dim",
        "gate_low_rank_dim",
        "direction_gate_init",
        "dw_jrt_variant",
        "dw_jrt_scale",
        "dw_jrt_gate",
        "dw_jrt_gate_init",
        "wkv7_kernel",
    ),
    "qwen3": (
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "rope_theta",
        "rms_norm_eps",
        "layer_patterns",
        "attention_kernel",
    ),
}
# What is no size of the network, and so no field of its configuration.
_NOT_SIZES = ("wkv7_kernel", "attention_kernel", "rope_theta")


class ModelSection(Section):
    """The backbone and its sizes. Keys of the other backbone must stay null."""

    backbone: Literal["rwkv7", "qwen3"] = Field(description="kind of network")
    init_from: str | None = Field(
        default=None,
        description="directory of weights to start from, or hub id with init_revision, with a report of matched, "
        "skipped and resized keys; null = fresh initial values from run.seed",
    )
    init_revision: str | None = Field(
        default=None, description="commit or tag of the hub id in init_from; null = init_from is a directory"
    )
    vocab_size: Positive | None = Field(
        default=None, description="rows of the embedding (token ids); null = that of the training data"
    )
    hidden_size: Positive = Field(description="width of the residual stream (channels)")
    num_hidden_layers: Positive = Field(description="number of blocks (layers)")
    direction: Literal["causal", "bidirectional", "alternate", "dw_jrt"] = Field(
        description="what a token sees. causal: what precedes it; bidirectional: both sides; rwkv7 alone: alternate "
        "(every second layer scans backwards), dw_jrt (each layer starts from the final state of the one below); null: "
        "causal for the objective ar, else bidirectional",
    )
    tie_directions: bool = Field(
        default=False, description="rwkv7, bidirectional: one set of weights for both scan directions"
    )
    direction_gate_init: float | None = Field(
        default=None,
        description="rwkv7, bidirectional: initial bias of the gate between the scans: 0 weighs both alike, 4 is "
        "98 % forward; null = 4 with init_from of causal weights, else 0",
    )
    dw_jrt_variant: Literal["seed", "inject"] | None = Field(
        default=None,
        description="rwkv7, dw_jrt: seed: the state below is the initial state; inject: it also leaks in at every "
        "token; null = seed",
    )
    dw_jrt_scale: float | None = Field(
        default=None, description="rwkv7, dw_jrt: factor of the state below as initial state; null = 1"
    )
    dw_jrt_gate: bool | None = Field(
        default=None,
        description="rwkv7, dw_jrt, seed: a learned gate per head on the initial state (inject always has one); "
        "null = false",
    )
    dw_jrt_gate_init: float | None = Field(
        default=None, description="rwkv7, dw_jrt: initial logit of that gate; null = -2 (12 % open)"
    )
    wkv7_kernel: Literal["auto", "fla", "pytorch"] | None = Field(
        default=None,
        description="rwkv7: what computes the recurrence. auto: fla's Triton kernel where its self-test passes, else "
        "ours; fla: that one or an error; pytorch: ours; null = auto",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute each block in the backward pass: less memory, about a third more time",
    )
    head_size: Positive | None = Field(
        default=None, description="rwkv7: channels per head; divides hidden_size; null = 64, or those of init_from"
    )
    low_rank_rule: Literal["current", "released"] | None = Field(
        default=None,
        description="rwkv7: how ranks follow from hidden_size: as in BlinkDL's trainer, or as in his released 0.1B to "
        "2.9B checkpoints; null = current, or with init_from the ranks found there",
    )
    decay_low_rank_dim: Positive | None = Field(
        default=None, description="rwkv7: rank of the decay's low-rank map; null = by low_rank_rule"
    )
    a_low_rank_dim: Positive | None = Field(
        default=None, description="rwkv7: rank of the in-context learning rate's map; null = by low_rank_rule"
    )
    v_low_rank_dim: Positive | None = Field(
        default=None, description="rwkv7: rank of the value residual's map; null = by low_rank_rule"
    )
    gate_low_rank_dim: Positive | None = Field(
        default=None, description="rwkv7: rank of the output gate's map; null = by low_rank_rule"
    )
    intermediate_size: Positive | None = Field(
        default=None,
        description="qwen3: width of the MLP (channels); null = 3 * hidden_size, or with init_from that found there",
    )
    num_attention_heads: Positive | None = Field(
        default=None, description="qwen3: query heads per layer (heads); no default"
    )
    num_key_value_heads: Positive | None = Field(
        default=None,
        description="qwen3: key and value heads (heads); divides num_attention_heads; null = as many, or with "
        "init_from those found there",
    )
    head_dim: Positive | None = Field(
        default=None,
        description="qwen3: channels per attention head, an even number; null = 128, or with init_from that found "
        "there",
    )
    tie_word_embeddings: bool | None = Field(
        default=None,
        description="qwen3: the head shares the embedding's weight; null = false, or with init_from as found there",
    )
    rope_theta: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="qwen3: base of the rotary positions; null = 1e6, or with init_from that found there"
    )
    rms_norm_eps: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="qwen3: added to the mean square in each norm; null = 1e-6, or with init_from that found there",
    )
    layer_patterns: tuple[str, ...] | None = Field(
        default=None,
        description="qwen3: what each layer leaves of what a token may see, repeated over the layers: bidirectional "
        "(all), causal (nothing behind it), block_causal:N (nothing behind its block of N tokens of its document), "
        "window:N (nothing farther away than N tokens); null = all in all layers, or with init_from of the same "
        "direction those found there",
    )
    attention_kernel: Literal["auto", "sdpa", "flex"] | None = Field(
        default=None,
        description="qwen3: what computes attention where a mask is needed. auto: FlexAttention on CUDA, else SDPA; "
        "null = auto",
    )

    def sizes(self) -> dict[str, Any]:
        """What the backbone is built from: the shared sizes and this backbone's own that are set."""
        shared = ("vocab_size", "hidden_size", "num_hidden_layers", "direction")
        own = _BACKBONE_KEYS[self.backbone] + (("tie_directions",) if self.backbone == "rwkv7" else ())
        values = {name: getattr(self, name) for name in (*shared, *own) if name not in _NOT_SIZES}
        if self.layer_patterns is not None:
            values["layer_patterns"] = list(self.layer_patterns)
        if self.rope_theta is not None:
            values["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {name: value for name, value in values.items() if value is not None}

    def contradictions(self) -> Iterator[Mistake]:
        for backbone, names in _BACKBONE_KEYS.items():
            for name in names:
                value = getattr(self, name)
                if backbone != self.backbone and value is not None:
                    yield about(
                        f"model.{name}",
                        value,
                        f"a key of {backbone} only, and model.backbone is {self.backbone}: remove it",
                    )
        if self.init_revision is not None and self.init_from is None:
            yield about("model.init_revision", self.init_revision, "expected null, since model.init_from is not given")
        yield from self._rwkv7() if self.backbone == "rwkv7" else self._qwen3()

    def _rwkv7(self) -> Iterator[Mistake]:
        if self.head_size is not None and self.hidden_size % self.head_size:
            yield about(
                "model.hidden_size",
                self.hidden_size,
                f"expected a multiple of model.head_size = {self.head_size}",
            )
        for direction, names in (
            ("bidirectional", ("tie_directions", "direction_gate_init")),
            ("dw_jrt", ("dw_jrt_variant", "dw_jrt_scale", "dw_jrt_gate", "dw_jrt_gate_init")),
        ):
            for name in names:
                value = getattr(self, name)
                if direction != self.direction and value not in (None, False):
                    yield about(
                        f"model.{name}",
                        value,
                        f"a key of direction {direction} only, and model.direction is {self.direction}: remove it",
                    )
        if self.dw_jrt_gate and self.dw_jrt_variant == "inject":
            yield about("model.dw_jrt_gate", True, "expected null, since the variant inject always has a gate")
        gated = self.dw_jrt_gate or self.dw_jrt_variant == "inject"
        if self.direction == "dw_jrt" and self.dw_jrt_gate_init is not None and not gated:
            yield about(
                "model.dw_jrt_gate_init", self.dw_jrt_gate_init, "expected null, or model.dw_jrt_gate true: no gate"
            )

    def _qwen3(self) -> Iterator[Mistake]:
        if self.tie_directions:
            yield about("model.tie_directions", True, "expected false, since only rwkv7 has scan directions")
        if self.num_attention_heads is None:
            yield Mistake(
                "model.num_attention_heads",
                "model.num_attention_heads is missing: qwen3 needs the number of query heads",
            )
        elif self.num_key_value_heads is not None and self.num_attention_heads % self.num_key_value_heads:
            yield about(
                "model.num_key_value_heads",
                self.num_key_value_heads,
                f"expected a divisor of model.num_attention_heads = {self.num_attention_heads}",
            )
        if self.head_dim is not None and self.head_dim % 2:
            yield about(
                "model.head_dim",
                self.head_dim,
                "expected an even number, since rotary positions pair channels",
            )
        mistake = compatibility.layer_patterns_refusal(self.layer_patterns, self.direction, self.num_hidden_layers)
        if mistake is not None:
            yield about("model.layer_patterns", list(self.layer_patterns or ()), mistake)
