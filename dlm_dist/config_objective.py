"""The configuration's section `objective`: what is hidden, what is predicted and how it is weighed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dlm_dist.compatibility import MASKED as _MASKED
from dlm_dist.config_types import Fraction, NonNegative, Positive
from dlm_dist.settings import Mistake, Section, about


def _token_name(value: object) -> object:
    """An id as text, so that ids and names can stand in one list."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


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
    "one_block_length": tuple(name for name in _MASKED if name != "wsd"),
    "protected_tokens": _MASKED,
    "draws_per_row": _MASKED,
    "complementary_prob": _MASKED,
    "token_to_token_rate": _MASKED,
    "token_to_token_weight": _MASKED,
    "shift": _MASKED,
    "attention_annealing": _MASKED,
    "label_smoothing": ("soft_ce",),
    "confidence_weight": _DRAWN,
    "block_lengths": ("wsd", "block"),
    "clip_search": ("block",),
    "card_tail": ("card",),
    "mask_noise_std": (*_DRAWN, "card"),
    "mask_noise_samples": (*_DRAWN, "card"),
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

    name: Annotated[
        Literal["mdlm", "dllm", "soft_ce", "iid_t", "wsd", "block", "ar", "card"],
        _other_name({"guidelines": "mdlm"}),
    ] = Field(
        default="mdlm",
        description="mdlm (also: guidelines): absorbing-state masked diffusion with the unbiased bound as its "
        "loss; dllm: the same with the draws of the program dllm; soft_ce: masked diffusion with smoothed labels; "
        "iid_t, wsd: masked diffusion with the draws that Nano-LLaDA calls so, wsd in one block of each row; "
        "block: each block is denoised with the clean blocks before it in sight (BD3-LM); ar: causal language "
        "modelling with the exact negative log-likelihood as its loss; card: diffusion with a causal model that "
        "predicts every token",
    )
    schedule: (
        Annotated[
            Literal["linear", "cosine", "cosine_squared", "power", "sigmoid", "geometric", "table"],
            _other_name(dict.fromkeys(("uniform", "log_linear", "loglinear", "log-linear"), "linear")),
        ]
        | None
    ) = Field(
        default=None,
        description="share of hidden tokens as a function of time (docs/objectives.md has the formulas); linear is "
        "also called uniform and log_linear; null = linear",
    )
    schedule_exponent: Annotated[float, Field(ge=0.5, le=20.0)] | None = Field(
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
        description="mask: hidden tokens become the mask token; random_replace: a token drawn uniformly, and the "
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
        "follows is not (for lengths that grow: the objective wsd); null = the whole row",
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
    attention_annealing: Positive | None = Field(
        default=None,
        description="qwen3, bidirectional: samples over which attention goes from causal to bidirectional, each later "
        "token being seen with a probability that grows from 0 to 1 (DiffuLLaMA), to start from causal weights; "
        "evaluation and texts always see all; null = none",
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
        description="block, wsd: how long blocks are, as phases [tokens, length]: a length holds for that many tokens "
        "of data, the last one to the end; 0 = the whole row; each divides sequence_length; null = [[0, 32]]",
    )
    clip_search: bool | None = Field(
        default=None,
        description="block: at every train.eval_every steps choose the range of times, in place of t_min and t_max, in "
        "which the loss of a held-out block varies least (BD3-LM); the loss is no bound; null = false",
    )
    card_tail: Annotated[float, Field(ge=1.0)] | None = Field(
        default=None,
        description="card: of the last card_tail * N tokens N are hidden; 1 = just the last N; null = 1.5",
    )
    mask_noise_std: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="standard deviation of the noise that is added to the embedding of each masked token in the "
        "first mask_noise_samples samples, falling to 0 in a line (LLaDA 2, from causal weights); null = none",
    )
    mask_noise_samples: Positive | None = Field(
        default=None, description="sample positions over which mask_noise_std falls to 0; no default"
    )
    l2wrap: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description="strength of the pull on each scored token's highest logit, which leaves the loss's value as it "
        "is; 0 = none; 1e-4 is RWKV's",
    )
    z_loss: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description="strength of the pull of each scored token's log-partition function towards 0, which leaves the "
        "loss's value as it is; 0 = none; 1e-4 is PaLM's",
    )

    def settings(self) -> dict[str, Any]:
        """What the objective is made with: its own keys that are set."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _OBJECTIVE_KEYS if "mask_noise" not in name}
        parameters = {
            "exponent": values.pop("schedule_exponent"),
            "steepness": values.pop("schedule_steepness"),
            "points": values.pop("schedule_points"),
        }
        if sigma := values.pop("schedule_sigma"):
            parameters |= {"sigma_min": sigma[0], "sigma_max": sigma[1]}
        values["schedule_parameters"] = {key: value for key, value in parameters.items() if value is not None} or None
        return {name: value for name, value in values.items() if value is not None}

    @property
    def mask_noise(self) -> tuple[float, int] | None:
        """mask_noise_std and mask_noise_samples where they are set."""
        if self.mask_noise_std is None or self.mask_noise_samples is None:
            return None
        return self.mask_noise_std, self.mask_noise_samples

    def contradictions(self) -> Iterator[Mistake]:
        for key, owners in _OBJECTIVE_KEYS.items():
            value = getattr(self, key)
            if self.name not in owners and value is not None:
                names = " and ".join([", ".join(owners[:-1]), owners[-1]] if owners[1:] else owners)
                yield about(
                    f"objective.{key}", value, f"a key of {names} only, and objective.name is {self.name}: remove it"
                )
        if (self.mask_noise_std is None) != (self.mask_noise_samples is None):
            there, missing = ("std", "samples") if self.mask_noise_samples is None else ("samples", "std")
            yield Mistake(
                f"objective.mask_noise_{missing}",
                f"objective.mask_noise_{missing} is missing: objective.mask_noise_{there} needs it beside it",
            )
        if self.mask_noise_std is not None and self.noise_type == "random_replace":
            yield about(
                "objective.mask_noise_std",
                self.mask_noise_std,
                "expected null, since objective.noise_type is random_replace: nothing is masked",
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
