"""The typed configuration of a run: one frozen tree, read from YAML and `key.sub=value` overrides.

`load_config` fills what depends on the backbone or the objective, checks everything, and reports all mistakes at
once as plain sentences. What it returns is resolved: `to_yaml` writes every value that the run uses, and loading
that text gives the same tree again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field

from dlm_dist import compatibility, settings
from dlm_dist.config_model import ModelSection
from dlm_dist.config_objective import ObjectiveSection
from dlm_dist.config_types import Fraction, Location, NonNegative, Positive, Whole
from dlm_dist.settings import ConfigError, Mistake, Section, about, lookup


class RunSection(Section):
    """Where a run lives and what its random numbers hang on."""

    dir: Location = Field(
        description="folder of the run: configuration, metrics, checkpoints; relative paths start where the "
        "command is run"
    )
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = Field(
        default=0, description="seed of every random choice: initial values, sample order, masks and times"
    )


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
    batch_size_ramp: tuple[tuple[Positive, Positive], ...] = Field(
        default=(),
        description="other sizes at the start, as [data position, rows per step], the position rising: a step that "
        "begins before it has that many rows; those behind the last one have global_batch_size",
    )
    change_batch_size: bool = Field(
        default=False,
        description="a resume may change global_batch_size and batch_size_ramp: it goes on at the same sample and "
        "step, and the learning rate stays the function of the step that it was",
    )
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
    ema_half_life: Positive | None = Field(
        default=None,
        description="keep an exponential moving average of the weights, in which those of so many samples ago count "
        "half (samples); `dlm checkpoint export --weights ema` writes it; null = none",
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
    max_hours: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="hours after which this start saves and ends; --resume auto goes on; null = no limit"
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
        yield from self._ramp_mistakes()

    def _ramp_mistakes(self) -> Iterator[Mistake]:
        ramp, micro = self.batch_size_ramp, self.micro_batch_size
        if ramp and self.gradient_accumulation_steps is not None:
            yield about(
                "train.gradient_accumulation_steps",
                self.gradient_accumulation_steps,
                "expected null, since train.batch_size_ramp changes it on the way: give train.micro_batch_size",
            )
        for number, (position, size) in enumerate(ramp):
            key, phase = f"train.batch_size_ramp.{number}", [position, size]
            if number and position <= ramp[number - 1][0]:
                yield about(key, phase, f"expected a position above {ramp[number - 1][0]}")
            if size % (micro or 1):
                yield about(key, phase, f"expected rows that are a multiple of train.micro_batch_size ({micro})")


class OptimizerSection(Section):
    """The update rule. `lr`, `betas` and `eps` default by backbone and rule (see `default_values`)."""

    name: Literal["adamw", "adamw8bit", "lion", "lion8bit"] = Field(
        default="adamw",
        description="update rule; 8bit: states of the large matrices in 8 bits, or 32 where bitsandbytes cannot run",
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
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "rwkv"] = Field(
        default="cosine",
        description="course of the learning rate after the warm-up; wsd: constant, then linear over decay_steps; "
        "inverse_sqrt: by 1 / sqrt(step); rwkv: RWKV-LM's cosine and warm-up",
    )
    warmup_steps: NonNegative = Field(default=0, description="steps of linear rise to the peak (steps)")
    decay_steps: Positive | None = Field(
        default=None, description="steps of the final, linear decay (steps); wsd needs it, inverse_sqrt may have it"
    )
    min_lr_ratio: Fraction = Field(
        default=0.1, description="learning rate at the last step over the peak; for all but constant"
    )

    def contradictions(self) -> Iterator[Mistake]:
        if self.schedule == "wsd" and self.decay_steps is None:
            yield Mistake(
                "optimizer.decay_steps", "optimizer.decay_steps is missing: the schedule wsd needs its number of steps"
            )
        if self.schedule not in ("wsd", "inverse_sqrt") and self.decay_steps is not None:
            yield about(
                "optimizer.decay_steps",
                self.decay_steps,
                f"a key of wsd and inverse_sqrt, and optimizer.schedule is {self.schedule}: remove it",
            )


class ZeroSection(Section):
    """DeepSpeed ZeRO."""

    stage: Annotated[Whole, Field(ge=0, le=3)] = Field(
        default=2,
        description="what is split over ranks: 0 nothing, 1 optimizer states, 2 + gradients, 3 + weights",
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        default="none",
        description="cpu: masters and optimizer states live in host memory and the CPU makes the update "
        "(ZeRO-Offload, stages 1 to 3)",
    )

    def contradictions(self) -> Iterator[Mistake]:
        if self.offload_optimizer != "none" and self.stage == 0:
            expected = "expected none, since zero.stage is 0: DeepSpeed offloads from stage 1 on"
            yield about("zero.offload_optimizer", self.offload_optimizer, expected)


class CheckpointSection(Section):
    """When checkpoints are written and how many stay."""

    every: Positive | None = Field(
        default=1000, description="steps between checkpoints; null = only at the end of the run"
    )
    keep_last: Positive | None = Field(
        default=None, description="newest checkpoints that are kept; older ones are removed; null = all"
    )
    keep_every: Positive | None = Field(
        default=None,
        description="checkpoints of steps that this divides are kept besides the newest (steps); null = none",
    )
    asynchronous: bool = Field(
        default=False,
        description="train on while a checkpoint is written: a step waits only for a copy of the state, which needs "
        "as much host memory as the checkpoint is large; a failed save then ends the run a few steps later",
    )

    def contradictions(self) -> Iterator[Mistake]:
        if self.keep_every is not None and self.keep_last is None:
            yield about("checkpoint.keep_every", self.keep_every, "expected null, since checkpoint.keep_last keeps all")
        if self.keep_every is not None and self.every is not None and self.keep_every % self.every:
            expected = f"expected a multiple of checkpoint.every, {self.every}"
            yield about("checkpoint.keep_every", self.keep_every, expected)


class GuardsSection(Section):
    """When a step is not believed, and when a run gives up."""

    max_consecutive_skips: Positive = Field(
        default=10, description="steps skipped in a row (not finite, or a spike) before the run stops"
    )
    loss_spike: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="skip a step whose loss lies this many robust standard deviations above the median of the window; "
        "null = never",
    )
    grad_norm_spike: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="go back to the last checkpoint and leave out the step whose gradient norm lies this many robust "
        "standard deviations above the median of the window; null = never",
    )
    window: Annotated[Whole, Field(ge=16)] = Field(
        default=128, description="accepted steps that a spike is measured against (steps)"
    )
    max_rollbacks: Positive = Field(default=3, description="rollbacks to the same checkpoint before the run stops")
    hang_minutes: Annotated[float, Field(gt=0.0)] | None = Field(
        default=60.0,
        description="minutes that a rank may spend in one phase (forward, backward, save, evaluation ...) before its "
        "watchdog says who holds it up and ends it; null = for ever",
    )


class ProfileSection(Section):
    """A window of steps in which ranks are profiled, into RUN/profile."""

    start_step: Positive = Field(description="first step that is profiled; the one before warms the profiler up")
    steps: Positive = Field(default=3, description="how many steps are profiled (steps)")
    ranks: tuple[NonNegative, ...] = Field(default=(0,), description="ranks that are profiled")
    memory: bool = Field(
        default=False, description="allocations too: in the trace, and on CUDA as a memory snapshot beside it"
    )


class LoggingSection(Section):
    """Who hears of the run."""

    every: Positive = Field(
        default=10,
        description="steps between lines on the console, in TensorBoard and in wandb, and between the figures by role, "
        "by time and by source (steps)",
    )
    tensorboard: bool = Field(default=False, description="figures for TensorBoard in RUN/tensorboard")
    wandb: Literal["disabled", "online", "offline"] = Field(
        default="disabled", description="Weights & Biases; offline needs no account"
    )
    wandb_project: str = Field(default="dlm", description="name of the wandb project")
    profile: ProfileSection | None = Field(
        default=None, description="steps of which some ranks write a trace; null = none"
    )


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
    "zero_optimization.offload_optimizer": "zero.offload_optimizer",
    "zero_force_ds_cpu_optimizer": "zero.offload_optimizer",
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
    "ema_decay": "train.ema_half_life",
    "ema": "train.ema_half_life",
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
    guards: GuardsSection = Field(default_factory=GuardsSection, description="what is not believed")
    logging: LoggingSection = Field(default_factory=LoggingSection, description="who hears of it")
    strict: bool = Field(default=False, description="a fallback (a missing library or kernel) is an error")

    other_names: ClassVar[Mapping[str, str]] = _OTHER_NAMES

    def contradictions(self) -> Iterator[Mistake]:
        yield from self.contradictions_across({name: getattr(self, name) for name in type(self).model_fields})

    @classmethod
    def contradictions_across(cls, parts: Mapping[str, Any]) -> Iterator[Mistake]:
        for check in (_evaluation_has_data, _search_has_evaluations, _objective_fits, _warmup_ends, _deepspeed_is_free):
            yield from check(parts)


def _evaluation_has_data(parts: Mapping[str, Any]) -> Iterator[Mistake]:
    if {"data", "train"} <= parts.keys():
        every = parts["train"].eval_every
        if every is not None and parts["data"].validation is None:
            yield about("train.eval_every", every, "expected null, since data.validation is not given")


def _search_has_evaluations(parts: Mapping[str, Any]) -> Iterator[Mistake]:
    if {"objective", "train"} <= parts.keys() and parts["objective"].clip_search and parts["train"].eval_every is None:
        yield about("objective.clip_search", True, "expected train.eval_every too: the search is part of evaluations")


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
    phases = parts["objective"].block_lengths
    if phases is not None and length is not None and any(size and length % size for _, size in phases):
        shown = [list(phase) for phase in phases]
        yield about("objective.block_lengths", shown, f"expected divisors of data.sequence_length = {length}")
    name = parts["objective"].name
    if "model" in parts:
        model = parts["model"]
        reason = compatibility.refusal(name, model.backbone, model.direction)
        if reason is not None:
            yield about("model.direction", model.direction, f"expected {reason}")
        annealing = parts["objective"].attention_annealing
        reason = compatibility.annealing_refusal(model.backbone, model.direction, model.layer_patterns)
        if annealing is not None and name in compatibility.MASKED and reason is not None:
            yield about("objective.attention_annealing", annealing, f"expected null, {reason}")
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
    """How one optimizer step is cut: global = micro * accumulation * data-parallel ranks (samples).

    `ramp`: (data position, size) pairs: steps of that size begin before that position; behind the last one, and where
    there is none, they have the global batch size. What a step holds is thus a function of its first sample alone: one
    that passes a border keeps its size, the next one begins where it ends.
    """

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    ramp: tuple[tuple[int, int], ...] = ()

    def size_at(self, data_pos: int) -> int:
        """Samples of the step whose first one is number `data_pos`."""
        return next((size for end, size in self.ramp if data_pos < end), self.global_batch_size)

    def steps_between(self, data_pos: int, end: int) -> int:
        """Whole steps from sample `data_pos` on that take none from `end` on."""
        count = 0
        for border, size in (*self.ramp, (end, self.global_batch_size)):
            begun = max(0, -(-(min(border, end) - data_pos) // size))
            whole = min(begun, max(0, end - data_pos) // size)
            count += whole
            data_pos += whole * size
            if whole < begun:
                break
        return count


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
    for number, (position, size) in enumerate(train.batch_size_ramp):
        if size % (micro * world_size):
            raise ConfigError(
                [
                    f"train.batch_size_ramp.{number} is [{position}, {size}]: expected rows that are a multiple of "
                    f"train.micro_batch_size = {micro} * {world_size} ranks"
                ]
            )
    return BatchPlan(total, micro, accumulation, train.batch_size_ramp)


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
    (ZHZisZZ/dllm), iid_t and wsd as Nano-LLaDA does (JayCheng113/Nano-LLaDA, scripts/train/diffusion.py); soft_ce
    weighs as Qwen3llada does, whose smoothing is 0.1.
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
    if objective in ("block", "wsd"):
        values["objective.block_lengths"] = [[0, 32]]
    if objective not in ("ar", "card", "block"):
        values |= {"objective.times": "stratified"}
        values |= {"objective.weighting": "elbo", "objective.normalization": "tokens"}
    if objective in ("dllm", "iid_t", "wsd"):
        values |= {"objective.masking": "bernoulli", "objective.times": "independent"}
        values |= {"objective.normalization": "maskable"}
    if objective in ("iid_t", "wsd"):
        values |= {"objective.t_min": 1e-3, "objective.t_max": 0.999, "objective.protected_tokens": ["eos"]}
    if objective == "wsd":
        values["objective.schedule"] = "cosine_squared"
    if objective == "soft_ce":
        values |= {"objective.weighting": "inverse_rate", "objective.label_smoothing": 0.1}
    if backbone == "rwkv7":
        values["model.wkv7_kernel"] = "auto"
        if model.get("init_from") is None:
            values["model.head_size"] = 64
    if backbone == "qwen3":
        values |= {"optimizer.lr": 3e-4, "optimizer.betas": [0.9, 0.95], "optimizer.eps": 1e-8}
        values["model.attention_kernel"] = "auto"
        if model.get("init_from") is None:
            values |= _qwen3_sizes(model)
    if optimizer in ("lion", "lion8bit"):
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
