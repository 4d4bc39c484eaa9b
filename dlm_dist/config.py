"""The typed configuration of a run: one frozen tree, read from YAML and `key.sub=value` overrides.

`load_config` fills what depends on the backbone or the objective, checks everything, and reports all mistakes at
once as plain sentences. What it returns is resolved: `to_yaml` writes every value that the run uses, and loading
that text gives the same tree again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field

from dlm_dist import compatibility, settings
from dlm_dist.settings import ConfigError, Mistake, Section, about, lookup


def _whole(value: object) -> object:
    """A float without a fraction as an int, so that `max_steps: 1e4` is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _token_name(value: object) -> object:
    """An id as text, so that ids and names can stand in one list."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("empty")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
NonNegative = Annotated[Whole, Field(ge=0)]
Positive = Annotated[Whole, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Location = Annotated[Path, BeforeValidator(_not_empty)]


class RunSection(Section):
    """Where a run lives and what its random numbers hang on."""

    dir: Location = Field(
        description="folder of the run: configuration, metrics, checkpoints; relative paths start where the "
        "command is run"
    )
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = Field(
        default=0, description="seed of every random choice: initial values, sample order, masks and times"
    )


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
    ),
}


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

    def sizes(self) -> dict[str, Any]:
        """What the backbone is built from: the shared sizes and this backbone's own that are set."""
        shared = ("vocab_size", "hidden_size", "num_hidden_layers", "direction")
        own = _BACKBONE_KEYS[self.backbone] + (("tie_directions",) if self.backbone == "rwkv7" else ())
        values = {name: getattr(self, name) for name in (*shared, *own) if name not in ("wkv7_kernel", "rope_theta")}
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


_MASKED = ("mdlm", "dllm", "soft_ce")
_DRAWN = (*_MASKED, "block")
_OBJECTIVE_KEYS: dict[str, tuple[str, ...]] = {
    "schedule": _DRAWN,
    "schedule_exponent": _DRAWN,
    "schedule_steepness": _DRAWN,
    "schedule_sigma": _DRAWN,
    "schedule_points": _DRAWN,
    "masking": _DRAWN,
    "times": _MASKED,
    "t_min": _DRAWN,
    "t_max": _DRAWN,
    "min_masking_rate": _MASKED,
    "weighting": _MASKED,
    "cart_p": _MASKED,
    "soft_tail_p": (*_MASKED, "card"),
    "soft_tail_beta": (*_MASKED, "card"),
    "reweight_cap": _MASKED,
    "normalization": _MASKED,
    "noise_type": _MASKED,
    "mask_contiguous_region_prob": _MASKED,
    "two_segment_prob": _MASKED,
    "one_block_length": _MASKED,
    "protected_tokens": _MASKED,
    "draws_per_row": _MASKED,
    "complementary_prob": _MASKED,
    "token_to_token_rate": _MASKED,
    "token_to_token_weight": _MASKED,
    "shift": _MASKED,
    "label_smoothing": ("soft_ce",),
    "confidence_weight": _MASKED,
    "block_lengths": ("block",),
    "card_tail": ("card",),
}
"""The objectives that each key belongs to."""

# The keys that mean something with one value of another key only: (key, that other key, its value).
_OBJECTIVE_NEEDS = (
    ("schedule_exponent", "schedule", "power"),
    ("schedule_steepness", "schedule", "sigmoid"),
    ("schedule_sigma", "schedule", "geometric"),
    ("schedule_points", "schedule", "table"),
    ("cart_p", "weighting", "cart"),
    ("soft_tail_p", "weighting", "soft_tail"),
    ("soft_tail_beta", "weighting", "soft_tail"),
)


def _other_name(names: Mapping[str, str]) -> BeforeValidator:
    """What some values are called elsewhere; the resolved configuration holds our name."""
    return BeforeValidator(lambda value: names.get(value, value) if isinstance(value, str) else value)


class ObjectiveSection(Section):
    """What is hidden, what is predicted and how it is weighed. Keys of other objectives must stay null."""

    name: Annotated[Literal["mdlm", "dllm", "soft_ce", "block", "ar", "card"], _other_name({"guidelines": "mdlm"})] = (
        Field(
            default="mdlm",
            description="mdlm (also: guidelines): absorbing-state masked diffusion with the unbiased bound as its "
            "loss; dllm: the same with the draws of the program dllm; soft_ce: masked diffusion with smoothed labels; "
            "block: each block is denoised with the clean blocks before it in sight (BD3-LM); ar: causal language "
            "modelling with the exact negative log-likelihood as its loss; card: diffusion with a causal model that "
            "predicts every token",
        )
    )
    schedule: (
        Annotated[
            Literal["linear", "cosine", "cosine_squared", "power", "sigmoid", "geometric", "table"],
            _other_name({"uniform": "linear", "log_linear": "linear"}),
        ]
        | None
    ) = Field(
        default=None,
        description="share of hidden tokens as a function of time (docs/objectives.md has the formulas); linear is "
        "also called uniform and log_linear; null = linear",
    )
    schedule_exponent: Annotated[float, Field(ge=0.05, le=20.0)] | None = Field(
        default=None, description="power: exponent of t; null = 2"
    )
    schedule_steepness: Annotated[float, Field(gt=0.0, le=40.0)] | None = Field(
        default=None, description="sigmoid: factor of t - 1/2 in the exponential; null = 12"
    )
    schedule_sigma: tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0, le=30.0)]] | None = Field(
        default=None, description="geometric: total noise at t = 0 and at t = 1; null = [1e-4, 20]"
    )
    schedule_points: tuple[Fraction, ...] | None = Field(
        default=None,
        description="table: shares of hidden tokens at equally spaced times, rising from 0 to 1, joined by straight "
        "lines; no default",
    )
    masking: Literal["exact", "bernoulli"] | None = Field(
        default=None,
        description="exact: a drawn number of tokens is hidden; bernoulli: each token by itself (LLaDA); null = exact, "
        "dllm: bernoulli",
    )
    times: Literal["stratified", "independent"] | None = Field(
        default=None,
        description="stratified: times are spread evenly over any stretch of the data order; independent: each by "
        "itself (LLaDA, Nano-LLaDA's iid_t); null = stratified, dllm: independent",
    )
    t_min: Fraction | None = Field(default=None, description="smallest time; above 0 the loss is no bound; null = 0")
    t_max: Fraction | None = Field(default=None, description="largest time; below 1 the loss is no bound; null = 1")
    min_masking_rate: Fraction | None = Field(
        default=None, description="least share of hidden tokens; above 0 the loss is no bound; null = 0"
    )
    weighting: Literal["elbo", "inverse_rate", "none", "one_minus_t", "snr", "cart", "soft_tail"] | None = Field(
        default=None,
        description="weight of a hidden token. elbo: unbiased for the bound; inverse_rate: 1 / p; none: 1; "
        "one_minus_t: 1 - t; snr: (1 - p) / p; cart: by the visible tokens near it (Dream); soft_tail: by the hidden "
        "tokens before it (CARD); null = elbo, soft_ce: inverse_rate",
    )
    cart_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None, description="cart: how fast the influence of a visible token falls with distance; null = 0.1"
    )
    soft_tail_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None, description="soft_tail: how fast a hidden token is forgotten; null = 0.5"
    )
    soft_tail_beta: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="soft_tail: the weight is 1 / (this + hidden tokens before); null = 1"
    )
    reweight_cap: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="largest weight of a token; makes the loss no bound; null = none"
    )
    normalization: Literal["tokens", "maskable", "scored"] | None = Field(
        default=None,
        description="what the loss is a mean over. tokens: all that are there; maskable: without protected ones; "
        "scored: those that enter the loss (Dream, no bound); null = tokens, dllm: maskable",
    )
    noise_type: Literal["mask", "random_replace"] | None = Field(
        default=None,
        description="mask: hidden tokens become the mask token; random_replace: another token drawn uniformly, and the "
        "loss is no bound; null = mask",
    )
    mask_contiguous_region_prob: Fraction | None = Field(
        default=None,
        description="share of samples whose hidden tokens are one span; above 0 the loss is no bound; null = 0",
    )
    two_segment_prob: Fraction | None = Field(
        default=None,
        description="share of samples cut in two parts with a time each; above 0 the loss is no bound; null = 0",
    )
    one_block_length: Positive | None = Field(
        default=None,
        description="only one block of so many tokens, drawn for each row, is noised: what precedes it is shown, what "
        "follows is not (Nano-LLaDA's wsd); null = the whole row",
    )
    protected_tokens: tuple[Annotated[str, BeforeValidator(_token_name)], ...] | None = Field(
        default=None,
        description="tokens that are never hidden: ids, or eos, bos, pad where the tokenizer has them; makes the loss "
        "no bound; null = none",
    )
    draws_per_row: Positive | None = Field(
        default=None, description="samples made of each row, with a time and a mask each; null = 1"
    )
    complementary_prob: Fraction | None = Field(
        default=None,
        description="draws_per_row 2: share of rows whose second sample hides what the first one shows; null = 0",
    )
    token_to_token_rate: Fraction | None = Field(
        default=None,
        description="share of visible tokens that are replaced at random and scored too (LLaDA 2.1); above 0 the loss "
        "is no bound; null = 0",
    )
    token_to_token_weight: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="weight of the replaced tokens of token_to_token_rate; null = 1"
    )
    shift: bool | None = Field(
        default=None,
        description="a token is predicted at the place in front of it, as a causal model does it (Dream); null = false",
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        default=None, description="soft_ce: share of the target that is spread over the whole vocabulary; null = 0.1"
    )
    confidence_weight: Annotated[float, Field(ge=0.0)] | None = Field(
        default=None,
        description="strength of the confidence term (LLaDA 2): the entropy of each scored token that is predicted "
        "right; above 0 the loss is no bound; null = 0",
    )
    block_lengths: tuple[tuple[NonNegative, NonNegative], ...] | None = Field(
        default=None,
        description="block: how long blocks are, as phases [tokens, length]: a length holds for that many tokens of "
        "data, the last one to the end; 0 = the whole row; each divides sequence_length; null = [[0, 32]]",
    )
    card_tail: Annotated[float, Field(ge=1.0)] | None = Field(
        default=None,
        description="card: of the last card_tail * N tokens N are hidden; 1 = just the last N; null = 1.5",
    )
    l2wrap: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description="strength of the pull on each scored token's highest logit, which leaves the loss's value as it "
        "is; 0 = none; 1e-4 is RWKV's",
    )

    def settings(self) -> dict[str, Any]:
        """What the objective is made with: its own keys that are set."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _OBJECTIVE_KEYS}
        parameters = {
            "exponent": values.pop("schedule_exponent"),
            "steepness": values.pop("schedule_steepness"),
            "points": values.pop("schedule_points"),
        }
        if sigma := values.pop("schedule_sigma"):
            parameters |= {"sigma_min": sigma[0], "sigma_max": sigma[1]}
        values["schedule_parameters"] = {key: value for key, value in parameters.items() if value is not None} or None
        return {name: value for name, value in values.items() if value is not None}

    def contradictions(self) -> Iterator[Mistake]:
        for key, owners in _OBJECTIVE_KEYS.items():
            value = getattr(self, key)
            if self.name not in owners and value is not None:
                names = " and ".join([", ".join(owners[:-1]), owners[-1]] if owners[1:] else owners)
                yield about(
                    f"objective.{key}", value, f"a key of {names} only, and objective.name is {self.name}: remove it"
                )
        if self.name in _DRAWN:
            yield from self._drawn()
        if self.name in _MASKED:
            yield from self._masked()

    def _drawn(self) -> Iterator[Mistake]:
        for key, other, needed in _OBJECTIVE_NEEDS:
            value = getattr(self, key)
            if value is not None and self.name in _OBJECTIVE_KEYS[key] and getattr(self, other) != needed:
                yield about(
                    f"objective.{key}",
                    value,
                    f"a key of {needed} only, and objective.{other} is {getattr(self, other)}: remove it",
                )
        yield from self._schedule()
        low, high = self.t_min or 0.0, 1.0 if self.t_max is None else self.t_max
        if low >= high:
            yield about("objective.t_min", low, f"expected less than objective.t_max = {high}")
        if self.block_lengths is not None and not self.block_lengths:
            yield about("objective.block_lengths", [], "expected at least one phase [tokens, length]")

    def _masked(self) -> Iterator[Mistake]:
        if self.complementary_prob and self.draws_per_row != 2:
            yield about(
                "objective.complementary_prob",
                self.complementary_prob,
                f"expected objective.draws_per_row 2, which is {self.draws_per_row}: complements come in pairs",
            )
        if self.token_to_token_weight is not None and not self.token_to_token_rate:
            yield about(
                "objective.token_to_token_weight",
                self.token_to_token_weight,
                "expected null, since objective.token_to_token_rate is 0: nothing is replaced",
            )

    def _schedule(self) -> Iterator[Mistake]:
        points, sigma = self.schedule_points, self.schedule_sigma
        if self.schedule == "table" and points is None:
            yield Mistake(
                "objective.schedule_points", "objective.schedule_points is missing: the schedule table needs its shares"
            )
        if points is not None:
            rises = all(a < b for a, b in itertools.pairwise(points))
            if len(points) < 2 or points[0] != 0.0 or points[-1] != 1.0 or not rises:
                yield about(
                    "objective.schedule_points",
                    points,
                    "expected shares that start with 0, rise everywhere and end with 1, else the loss is no bound",
                )
        if sigma is not None and sigma[0] >= sigma[1]:
            yield about("objective.schedule_sigma", sigma, "expected two rising numbers, else the schedule falls")


class SourceSection(Section):
    """One data set and its share of the samples."""

    path: Location = Field(
        description="directory of a built data set (`dlm data build`); or token files, with data.tokenizer and "
        "data.sequence_length: the prefix of a Megatron .bin and .idx, or a .bin file, a directory or a pattern of "
        ".bin files of llm.c"
    )
    weight: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0, description="share of the samples, relative to the other sources"
    )


class DataSection(Section):
    """Which rows are read, in units of samples (packed rows)."""

    train: tuple[SourceSection, ...] = Field(
        default=(), description="data sets to train on, each with a path and a weight; at least one"
    )
    validation: Location | None = Field(
        default=None, description="data set of held-out rows, of the same kinds; null = no evaluation"
    )
    sequence_length: Positive | None = Field(
        default=None, description="tokens per row; null = that of the training data, which token files do not have"
    )
    tokenizer: str | None = Field(
        default=None,
        description="tokenizer that made the token files, as `dlm data build --tokenizer` takes it; null for built "
        "data sets, which have their own",
    )
    order: Literal["keyed", "cubic_prime"] = Field(
        default="keyed",
        description="keyed: a new permutation each epoch, by run.seed; cubic_prime: the order of RWKV-LM, of a single "
        "source, the same each epoch",
    )
    random_length_prob: Fraction = Field(
        description="share of samples cut to a length drawn uniformly from 1 to sequence_length; null = 0.01, for the "
        "objective ar 0"
    )
    random_length_group: Positive = Field(
        default=1,
        description="successive sample positions that are cut to the same length: 1 decides for each sample, LLaDA for "
        "a whole micro-batch",
    )
    isolate_documents: bool = Field(default=False, description="tokens see only their own document within a packed row")
    skip: tuple[tuple[NonNegative, Positive], ...] = Field(
        default=(), description="ranges of sample positions to leave out, each [first, one past the last]"
    )
    max_samples: Positive | None = Field(
        default=None, description="use only the first rows of each training source, this many (samples); null = all"
    )
    read_ahead_steps: Positive = Field(default=4, description="optimizer steps of rows held ready (steps)")
    loader_threads: Positive = Field(default=2, description="threads that read and corrupt rows, per rank")

    def contradictions(self) -> Iterator[Mistake]:
        if not self.train:
            yield Mistake("data.train", "data.train is missing: expected a list of data sets, each {path, weight}")
        if self.random_length_group > 1 and not self.random_length_prob:
            yield about(
                "data.random_length_group",
                self.random_length_group,
                "expected 1, since data.random_length_prob is 0: nothing is cut",
            )
        if self.order == "cubic_prime" and len(self.train) > 1:
            yield about("data.order", self.order, f"expected keyed, since data.train has {len(self.train)} sources")
        for i, (start, end) in enumerate(self.skip):
            if start >= end:
                yield about(f"data.skip.{i}", [start, end], "expected [start, end) with start smaller than end")


class TrainSection(Section):
    """How long, how much at once, in which arithmetic."""

    max_steps: Positive | None = Field(
        default=None, description="optimizer steps of the whole run (steps); this or max_epochs"
    )
    max_epochs: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="passes over the training data (epochs); this or max_steps"
    )
    global_batch_size: Positive = Field(description="rows per optimizer step over all ranks (samples)")
    micro_batch_size: Positive | None = Field(
        default=None,
        description="rows per forward pass of one rank (samples); null = follows from the others",
    )
    gradient_accumulation_steps: Positive | None = Field(
        default=None, description="forward passes per optimizer step; null = follows from the others"
    )
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="arithmetic of the network; masters, loss and statistics are always fp32"
    )
    gradient_clipping: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="largest global L2 norm of the gradient; 0 = no clipping"
    )
    eval_every: Positive | None = Field(
        default=None,
        description="steps between evaluations on data.validation; null = only at the end, if it is given",
    )
    eval_rows: Positive = Field(default=64, description="held-out rows per evaluation (samples)")
    eval_draws: Positive = Field(default=1, description="times and masks drawn per held-out row")
    sample_every: Positive | None = Field(
        default=None, description="steps between text samples printed during training; null = none"
    )
    sample_prompt: str = Field(default="", description="text that the samples of sample_every continue")
    max_consecutive_skips: Positive = Field(
        default=10,
        description="steps in a row with a loss or gradient that is not finite before the run stops",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="auto: CUDA where there is one, else CPU"
    )
    cpu_threads: Positive | None = Field(
        default=None, description="threads of each rank on a CPU; null = the cores it may use over the ranks on them"
    )
    deterministic: bool = Field(
        default=False, description="deterministic kernels on CUDA, slower; a CPU run is deterministic anyway"
    )

    def contradictions(self) -> Iterator[Mistake]:
        if self.max_steps is None and self.max_epochs is None:
            yield Mistake("train.max_steps", "train.max_steps is missing: give it or train.max_epochs")
        if self.max_steps is not None and self.max_epochs is not None:
            yield about(
                "train.max_epochs",
                self.max_epochs,
                f"expected null, since train.max_steps is {self.max_steps}: give exactly one of them",
            )
        micro, accumulation = self.micro_batch_size, self.gradient_accumulation_steps
        if micro is None and accumulation is None:
            yield Mistake(
                "train.micro_batch_size",
                "train.micro_batch_size is missing: give it or train.gradient_accumulation_steps",
            )
        if self.sample_prompt and self.sample_every is None:
            yield about("train.sample_prompt", self.sample_prompt, "expected to be empty, or give train.sample_every")
        if self.global_batch_size % ((micro or 1) * (accumulation or 1)):
            factors = " * ".join(
                f"train.{name} ({value})"
                for name, value in (
                    ("micro_batch_size", micro),
                    ("gradient_accumulation_steps", accumulation),
                )
                if value is not None
            )
            yield about("train.global_batch_size", self.global_batch_size, f"expected a multiple of {factors}")


class OptimizerSection(Section):
    """The update rule. `lr`, `betas` and `eps` default by backbone and rule (see `default_values`)."""

    name: Literal["adamw", "adamw8bit", "lion8bit"] = Field(
        default="adamw", description="update rule; 8bit: states of the large matrices in 8 bits"
    )
    lr: Annotated[float, Field(gt=0.0)] = Field(description="peak learning rate; null = by backbone and name")
    betas: tuple[
        Annotated[float, Field(ge=0.0, lt=1.0)],
        Annotated[float, Field(ge=0.0, lt=1.0)],
    ] = Field(
        description="decay per step of the gradient's mean and of its square (lion: of the update's mix and "
        "of the mean); null = by backbone and name"
    )
    eps: Annotated[float, Field(gt=0.0)] = Field(
        description="adamw, adamw8bit: added to the root of the second moment; null = by backbone"
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        default=0.1,
        description="decoupled decay per step, relative to the learning rate; large matrices only",
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine",
        description="course of the learning rate after the warm-up; wsd: constant, then linear over decay_steps",
    )
    warmup_steps: NonNegative = Field(default=0, description="steps of linear rise to the peak (steps)")
    decay_steps: Positive | None = Field(default=None, description="wsd: steps of the final decay (steps); no default")
    min_lr_ratio: Fraction = Field(
        default=0.1, description="learning rate at the last step over the peak; cosine, linear and wsd"
    )

    def contradictions(self) -> Iterator[Mistake]:
        if self.schedule == "wsd" and self.decay_steps is None:
            yield Mistake(
                "optimizer.decay_steps", "optimizer.decay_steps is missing: the schedule wsd needs its number of steps"
            )
        if self.schedule != "wsd" and self.decay_steps is not None:
            yield about(
                "optimizer.decay_steps",
                self.decay_steps,
                f"a key of wsd only, and optimizer.schedule is {self.schedule}: remove it",
            )


class ZeroSection(Section):
    """DeepSpeed ZeRO."""

    stage: Annotated[Whole, Field(ge=0, le=3)] = Field(
        default=2,
        description="what is split over ranks: 0 nothing, 1 optimizer states, 2 + gradients, 3 + weights",
    )


class CheckpointSection(Section):
    """When checkpoints are written and how many stay."""

    every: Positive | None = Field(
        default=1000, description="steps between checkpoints; null = only at the end of the run"
    )
    keep_last: Positive | None = Field(
        default=None, description="newest checkpoints that are kept; older ones are removed; null = all"
    )


class LoggingSection(Section):
    """Who hears of the run."""

    every: Positive = Field(default=1, description="steps between lines on the console and in wandb (steps)")
    wandb: Literal["disabled", "online", "offline"] = Field(
        default="disabled", description="Weights & Biases; offline needs no account"
    )
    wandb_project: str = Field(default="dlm", description="name of the wandb project")


_OWNED_BY_US = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
    "zero_allow_untested_optimizer": "optimizer.name",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.compute_grad_norm": "train.gradient_clipping",
}


# What other trainers call our keys; difflib cannot know.
_OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "batch_size": "train.global_batch_size",
    "steps": "train.max_steps",
    "epochs": "train.max_epochs",
    "grad_clip": "train.gradient_clipping",
    "max_grad_norm": "train.gradient_clipping",
    "seq_len": "data.sequence_length",
    "ctx_len": "data.sequence_length",
    "n_layer": "model.num_hidden_layers",
    "n_embd": "model.hidden_size",
    "output_dir": "run.dir",
    "save_every": "checkpoint.every",
}


class RunConfig(Section):
    """A whole run. Build it with `load_config`, which also fills the defaults that depend on other values."""

    run: RunSection = Field(description="where the run lives")
    model: ModelSection = Field(description="the network")
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection, description="what is learned")
    data: DataSection = Field(description="the rows")
    train: TrainSection = Field(description="the loop")
    optimizer: OptimizerSection = Field(description="the update rule")
    zero: ZeroSection = Field(default_factory=ZeroSection, description="what is split over ranks")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="raw DeepSpeed configuration, merged last; keys that this tree owns are refused",
    )
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection, description="what is kept")
    logging: LoggingSection = Field(default_factory=LoggingSection, description="who hears of it")
    strict: bool = Field(default=False, description="a fallback (a missing library or kernel) is an error")

    other_names: ClassVar[Mapping[str, str]] = _OTHER_NAMES

    def contradictions(self) -> Iterator[Mistake]:
        yield from self.contradictions_across({name: getattr(self, name) for name in type(self).model_fields})

    @classmethod
    def contradictions_across(cls, parts: Mapping[str, Any]) -> Iterator[Mistake]:
        for check in (_evaluation_has_data, _objective_fits, _warmup_ends, _deepspeed_is_free):
            yield from check(parts)


def _evaluation_has_data(parts: Mapping[str, Any]) -> Iterator[Mistake]:
    if {"data", "train"} <= parts.keys():
        every = parts["train"].eval_every
        if every is not None and parts["data"].validation is None:
            yield about("train.eval_every", every, "expected null, since data.validation is not given")


def _objective_fits(parts: Mapping[str, Any]) -> Iterator[Mistake]:
    if "objective" not in parts:
        return
    if "data" in parts and parts["objective"].shift and parts["data"].isolate_documents:
        yield about(
            "objective.shift",
            True,
            "expected false, since data.isolate_documents is true: the token in front of a document does not see it",
        )
    block, length = parts["objective"].one_block_length, parts["data"].sequence_length if "data" in parts else None
    if block is not None and length is not None and length % block:
        yield about("objective.one_block_length", block, f"expected a divisor of data.sequence_length = {length}")
    name = parts["objective"].name
    if "model" in parts:
        model = parts["model"]
        reason = compatibility.refusal(name, model.backbone, model.direction)
        if reason is not None:
            yield about("model.direction", model.direction, f"expected {reason}")
    if "train" in parts and parts["train"].sample_every is not None and name == "block":
        every = parts["train"].sample_every
        yield about("train.sample_every", every, "expected null: texts of block diffusion cannot be drawn yet")
    if "train" in parts and parts["train"].eval_draws > 1 and name in ("ar", "card"):
        yield about(
            "train.eval_draws",
            parts["train"].eval_draws,
            f"expected 1, since the likelihood of a model of the objective {name} is exact: nothing is drawn",
        )


def _warmup_ends(parts: Mapping[str, Any]) -> Iterator[Mistake]:
    if {"optimizer", "train"} <= parts.keys():
        warmup, decay, steps = parts["optimizer"].warmup_steps, parts["optimizer"].decay_steps, parts["train"].max_steps
        if steps is not None and warmup > steps:
            yield about("optimizer.warmup_steps", warmup, f"expected at most train.max_steps = {steps}")
        elif steps is not None and decay is not None and warmup + decay > steps:
            left = f"expected at most {steps - warmup}, train.max_steps - optimizer.warmup_steps"
            yield about("optimizer.decay_steps", decay, left)


def _deepspeed_is_free(parts: Mapping[str, Any]) -> Iterator[Mistake]:
    raw = parts.get("deepspeed", {})
    for key, ours in _OWNED_BY_US.items():
        present, value = lookup(raw, key)
        if present:
            yield about(f"deepspeed.{key}", value, f"set by this project itself: use {ours} and remove it")


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step is cut: global = micro * accumulation * data-parallel ranks (samples)."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int


def resolve_batch(train: TrainSection, world_size: int) -> BatchPlan:
    """The batch sizes for `world_size` data-parallel ranks. Raises ConfigError where they do not multiply."""
    total, micro, accumulation = (
        train.global_batch_size,
        train.micro_batch_size,
        train.gradient_accumulation_steps,
    )
    if micro is None:
        micro = total // (world_size * (accumulation or 1))
    if accumulation is None:
        accumulation = total // (world_size * max(1, micro))
    if micro * accumulation * world_size != total:
        given = [
            f"train.{name} = {value}"
            for name, value in (
                ("micro_batch_size", train.micro_batch_size),
                ("gradient_accumulation_steps", train.gradient_accumulation_steps),
            )
            if value is not None
        ]
        complete = len(given) == 2
        raise ConfigError(
            [
                f"train.global_batch_size is {total}: expected "
                + ("" if complete else "a multiple of ")
                + " * ".join([*given, f"{world_size} ranks"])
            ]
        )
    return BatchPlan(total, micro, accumulation)


def _qwen3_sizes(model: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"model.head_dim": 128, "model.tie_word_embeddings": False}
    values |= {"model.rope_theta": 1e6, "model.rms_norm_eps": 1e-6}
    if isinstance(heads := model.get("num_attention_heads"), int):
        values["model.num_key_value_heads"] = heads
    if isinstance(hidden := model.get("hidden_size"), int):
        values["model.intermediate_size"] = 3 * hidden
    return values


def default_values(backbone: object, optimizer: object, objective: object, model: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that hang on other values, by full key.

    ar and card cut no rows: a causal model meets every length in each of them. dllm draws as that program does
    (ZHZisZZ/dllm); soft_ce weighs as Qwen3llada does, whose smoothing is 0.1.
    rwkv7: BlinkDL's recipe for x070 (RWKV-LM). qwen3: the usual AdamW of language models. Lion: Chen et al.,
    "Symbolic Discovery of Optimization Algorithms", 2023: its second beta and a learning rate several times
    smaller than AdamW's.
    """
    values: dict[str, Any] = {"optimizer.lr": 6e-4, "optimizer.betas": [0.9, 0.99], "optimizer.eps": 1e-18}
    if objective in ("ar", "card"):
        values |= {"model.direction": "causal", "data.random_length_prob": 0.0}
    else:
        values |= {"model.direction": "bidirectional", "data.random_length_prob": 0.01}
        values |= {"objective.schedule": "linear", "objective.masking": "exact"}
    if objective == "block":
        values["objective.block_lengths"] = [[0, 32]]
    elif objective not in ("ar", "card"):
        values |= {"objective.times": "stratified"}
        values |= {"objective.weighting": "elbo", "objective.normalization": "tokens"}
    if objective == "dllm":
        values |= {"objective.masking": "bernoulli", "objective.times": "independent"}
        values |= {"objective.normalization": "maskable"}
    if objective == "soft_ce":
        values |= {"objective.weighting": "inverse_rate", "objective.label_smoothing": 0.1}
    if backbone == "rwkv7":
        values["model.wkv7_kernel"] = "auto"
        if model.get("init_from") is None:
            values["model.head_size"] = 64
    if backbone == "qwen3":
        values |= {"optimizer.lr": 3e-4, "optimizer.betas": [0.9, 0.95], "optimizer.eps": 1e-8}
        if model.get("init_from") is None:
            values |= _qwen3_sizes(model)
    if optimizer == "lion8bit":
        values |= {"optimizer.lr": 1e-4, "optimizer.betas": [0.9, 0.99]}
    return values


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (None: an empty one), apply `key.sub=value` overrides, fill, check.

    Override values are YAML; an element of a list is named by its index (`data.train.0.weight=2`), and the
    index one past the end appends. Raises ConfigError with every mistake of file and overrides.
    """
    mistakes: list[str] = []
    tree: dict[str, Any] = {}
    if path is not None:
        tree, mistakes = settings.read(path)
    for override in overrides:
        mistakes += settings.apply_override(tree, override)
    origin = "the command line" if path is None else f"{path} with overrides" if overrides else str(path)
    _fill_defaults(tree)
    return settings.validate(RunConfig, tree, mistakes, origin)


def updated(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """`config` with new values by full key, e.g. {"model.vocab_size": 65536}, checked again as a whole."""
    tree = config.model_dump(mode="json")
    mistakes = [mistake for key, value in values.items() for mistake in settings.assign(tree, key, value)]
    return settings.validate(RunConfig, tree, mistakes, "the configuration")


def to_yaml(config: RunConfig) -> str:
    """The whole resolved tree as YAML; `load_config` on it gives an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


def _fill_defaults(tree: dict[str, Any]) -> None:
    """Put in empty sections, so that their missing keys are named one by one, and `default_values`."""
    for name in RunConfig.model_fields:
        if name != "strict" and tree.get(name) is None:
            tree[name] = {}
    # A section that is no mapping is reported later; the defaults of the others do not wait for it.
    model, optimizer, objective = (
        tree[name] if isinstance(tree[name], dict) else {} for name in ("model", "optimizer", "objective")
    )
    defaults = default_values(model.get("backbone"), optimizer.get("name"), objective.get("name"), model)
    for key, value in defaults.items():
        section, name = key.split(".")
        if isinstance(tree[section], dict) and tree[section].get(name) is None:
            tree[section][name] = value
