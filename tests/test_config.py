"""The run configuration: what is accepted, what is resolved, and how mistakes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dlm_dist.config import BatchPlan, ConfigError, RunConfig, load_config, resolve_batch, to_yaml, updated
from dlm_dist.diffusion.objectives import OBJECTIVES, Vocabulary
from dlm_dist.settings import Section

RWKV7 = """
run: {dir: runs/small}
model: {backbone: rwkv7, hidden_size: 128, num_hidden_layers: 2}
data: {train: [{path: shards}]}
train: {max_steps: 10, global_batch_size: 8, micro_batch_size: 2}
"""
QWEN3 = RWKV7.replace("rwkv7,", "qwen3, num_attention_heads: 4,")
ANNEALED = "objective.attention_annealing=100"
AR = ["objective.name=ar"]


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return _write


def mistakes_of(path: Path | None, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.mistakes


def test_defaults_by_backbone(write):
    rwkv7, qwen3 = load_config(write(RWKV7)), load_config(write(QWEN3))
    assert (rwkv7.optimizer.betas, rwkv7.optimizer.eps, rwkv7.optimizer.lr) == ((0.9, 0.99), 1e-18, 6e-4)
    assert (qwen3.optimizer.betas, qwen3.optimizer.eps, qwen3.optimizer.lr) == ((0.9, 0.95), 1e-8, 3e-4)
    assert rwkv7.model.head_size == 64
    assert qwen3.model.sizes() == {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "direction": "bidirectional",
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    assert "head_dim" not in rwkv7.model.sizes()


def test_given_values_and_null_beat_and_take_defaults(write):
    config = load_config(write(QWEN3), ["optimizer.eps=1e-6", "optimizer.betas=null", "optimizer.name=lion8bit"])
    assert config.optimizer.eps == 1e-6
    assert config.optimizer.betas == (0.9, 0.99)


@pytest.mark.parametrize("backbone", [RWKV7, QWEN3])
def test_defaults_by_objective(write, backbone):
    mdlm, ar = load_config(write(backbone)), load_config(write(backbone), ["objective.name=ar"])
    assert (mdlm.objective.name, mdlm.model.direction, mdlm.data.random_length_prob) == ("mdlm", "bidirectional", 0.01)
    assert mdlm.objective.settings() == {
        "schedule": "linear",
        "masking": "exact",
        "times": "stratified",
        "weighting": "elbo",
        "normalization": "tokens",
    }
    assert (ar.model.direction, ar.data.random_length_prob, ar.objective.settings()) == ("causal", 0.0, {})
    for config in (mdlm, ar):
        assert load_config(write(to_yaml(config))) == config
    assert load_config(write(backbone), ["objective.name=ar", "data.random_length_prob=0.5"]).data.random_length_prob


def test_objectives_have_the_defaults_of_their_makers(write):
    """What the configuration fills in is what the makers in diffusion do by themselves."""
    vocabulary = Vocabulary(mask_id=3, eos_id=0)
    for name in ("mdlm", "dllm", "soft_ce", "iid_t", "wsd", "block"):
        config = load_config(write(RWKV7), [f"objective.name={name}"])
        assert load_config(write(to_yaml(config))) == config
        assert OBJECTIVES[name](seed=1, vocabulary=vocabulary, **config.objective.settings()) == OBJECTIVES[name](
            seed=1, vocabulary=vocabulary
        )


def test_other_names_are_resolved(write):
    config = load_config(write(RWKV7), ["objective.name=guidelines", "objective.schedule=log_linear"])
    assert (config.objective.name, config.objective.schedule) == ("mdlm", "linear")
    assert load_config(write(RWKV7), ["objective.schedule=uniform"]).objective.schedule == "linear"
    assert load_config(write(to_yaml(config))) == config


def test_every_key_of_the_objective_survives_a_round_trip(write):
    overrides = [
        "objective.schedule=geometric",
        "objective.schedule_sigma=[1e-3, 10]",
        "objective.masking=bernoulli",
        "objective.times=independent",
        "objective.t_min=0.1",
        "objective.t_max=0.9",
        "objective.min_masking_rate=0.05",
        "objective.weighting=cart",
        "objective.cart_p=0.3",
        "objective.reweight_cap=10",
        "objective.normalization=scored",
        "objective.noise_type=random_replace",
        "objective.mask_contiguous_region_prob=0.1",
        "objective.two_segment_prob=0.2",
        "objective.one_block_length=4",
        "objective.protected_tokens=[eos, 7]",
        "objective.draws_per_row=2",
        "objective.complementary_prob=0.5",
        "objective.token_to_token_rate=0.1",
        "objective.token_to_token_weight=0.5",
        "objective.shift=true",
        "objective.confidence_weight=0.3",
    ]
    overrides.append(ANNEALED)
    config = load_config(write(QWEN3), overrides)
    assert load_config(write(to_yaml(config))) == config
    made = OBJECTIVES["mdlm"](
        seed=1, vocabulary=Vocabulary(mask_id=9, eos_id=0, size=10), **config.objective.settings()
    )
    assert made.schedule_parameters == {"sigma_min": 1e-3, "sigma_max": 10.0}
    assert made.protected_tokens == ("eos", "7")
    assert made.head_settings() == {"confidence_weight": 0.3}
    # All but the settings that leave the bound as it is.
    assert len(made.not_a_bound()) == 12


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1E+2", 100.0), ("3", 3.0), (".5e-1", 0.05)])
def test_numbers_of_yaml_1_2(write, text, value):
    assert load_config(write(RWKV7 + f"optimizer: {{lr: {text}}}")).optimizer.lr == value
    assert load_config(write(RWKV7), [f"optimizer.lr={text}"]).optimizer.lr == value


def test_whole_numbers_may_be_written_as_floats(write):
    config = load_config(write(RWKV7), ["train.max_steps=1e4"])
    assert config.train.max_steps == 10_000
    assert isinstance(config.train.max_steps, int)
    assert mistakes_of(write(RWKV7), "train.max_steps=1.5") == (
        "train.max_steps is 1.5: expected a whole number at least 1 or null",
    )


def test_overrides_reach_lists_sections_and_raw_keys(write):
    config = load_config(
        write(RWKV7),
        [
            "data.train.0.weight=2",
            "data.train.1.path=more",
            "data.skip=[[3, 5]]",
            "deepspeed.zero_optimization.reduce_bucket_size=5e5",
            "strict=true",
        ],
    )
    assert [(str(source.path), source.weight) for source in config.data.train] == [("shards", 2.0), ("more", 1.0)]
    assert config.data.skip == ((3, 5),)
    assert config.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5e5}}
    assert config.strict is True


def test_no_file_is_an_empty_one():
    found = mistakes_of(None)
    assert "run.dir is missing: expected a path" in found
    assert "model.backbone is missing: expected rwkv7 or qwen3" in found
    assert "train.global_batch_size is missing: expected a whole number at least 1" in found


def test_all_mistakes_at_once_each_one_sentence(write):
    text = """
run: {seed: -3, seed: -4}
model: {backbone: rwkv7, hidden_size: 100, num_hiden_layers: 2, num_hidden_layers: 2, head_dim: 128}
data: {train: [{pth: x, weight: 0}, {path: y}], skip: [[5, 3]], random_length_prob: 1.5}
train: {max_steps: 10, max_epochs: 2, global_batch_size: 8.5, micro_batch_size: two, gradient_clipping: .inf}
optimizer: {learning_rate: 1e-3, name: adam, betas: [0.9], lr: "1e-3"}
zero: {stage: true}
checkpoint: 7
deepspeed: {bf16: {enabled: true}, zero_optimization: {stage: 1}}
traim: {max_steps: 1}
"""
    path = write(text)
    found = set(mistakes_of(path, "logging.wandb=maybe", "seed", "train.max_steps.x=1", "data.train.7.path=z"))
    assert found == {
        "run.seed stands twice, on lines 2 and 2: keep one",
        "run.dir is missing: expected a path",
        "run.seed is -4: expected a whole number at least 0 and below 9223372036854775808",
        "model.num_hiden_layers (2) is not a key: the nearest valid one is model.num_hidden_layers",
        "model.head_dim is 128: a key of qwen3 only, and model.backbone is rwkv7: remove it",
        "model.hidden_size is 100: expected a multiple of model.head_size = 64",
        "data.train.0.path is missing: expected a path",
        'data.train.0.pth ("x") is not a key: the nearest valid one is data.train.0.path',
        "data.train.0.weight is 0: expected a number above 0",
        "data.skip.0 is [5, 3]: expected [start, end) with start smaller than end",
        "data.random_length_prob is 1.5: expected a number at least 0 and at most 1",
        "train.max_epochs is 2.0: expected null, since train.max_steps is 10: give exactly one of them",
        "train.global_batch_size is 8.5: expected a whole number at least 1",
        'train.micro_batch_size is "two": expected a whole number at least 1 or null',
        "train.gradient_clipping is Infinity: expected a number at least 0",
        "optimizer.learning_rate (0.001) is not a key: the nearest valid one is optimizer.lr",
        'optimizer.name is "adam": expected one of adamw, adamw8bit, lion, lion8bit',
        "optimizer.betas.1 is missing: expected a number at least 0 and below 1",
        'optimizer.lr is "1e-3": expected a number above 0',
        "zero.stage is true: expected a whole number at least 0 and at most 3",
        "checkpoint is 7: expected {every, keep_last, keep_every, asynchronous}",
        'deepspeed.bf16 is {"enabled": true}: set by this project itself: use train.precision and remove it',
        "deepspeed.zero_optimization.stage is 1: set by this project itself: use zero.stage and remove it",
        'traim ({"max_steps": 1}) is not a key: the nearest valid one is train',
        'logging.wandb is "maybe": expected one of disabled, online, offline',
        "'seed' is no override: expected key.sub=value",
        "train.max_steps.x does not exist: train.max_steps is 10, which has no keys",
        "data.train.7.path does not exist: data.train has 2 elements, counted from 0",
    }
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n  - " in text
    assert "pydantic" not in text
    assert "http" not in text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optimiser.lr", "optimizer"),
        ("lr", "optimizer.lr"),
        ("model.betas", "optimizer.betas"),
        ("train.batch_size", "train.global_batch_size"),
        ("data.seq_len", "data.sequence_length"),
        ("checkpoint.keep", "checkpoint.keep_last"),
    ],
)
def test_the_nearest_key(write, key, nearest):
    (sentence,) = mistakes_of(write(RWKV7), f"{key}=1")
    assert sentence.endswith(f"the nearest valid one is {nearest}")


@pytest.mark.parametrize(
    ("base", "overrides", "sentence"),
    [
        (RWKV7, ["model.num_attention_heads=4"], "model.num_attention_heads is 4: a key of qwen3 only"),
        (QWEN3, ["model.head_size=32"], "model.head_size is 32: a key of rwkv7 only"),
        (RWKV7, [*AR, "model.direction=bidirectional"], 'model.direction is "bidirectional": expected causal, since'),
        (QWEN3, [*AR, "model.direction=bidirectional"], 'model.direction is "bidirectional": expected causal, since'),
        (
            RWKV7,
            [*AR, "objective.schedule=linear"],
            'objective.schedule is "linear": a key of mdlm, dllm, soft_ce, iid_t, wsd and block only',
        ),
        (RWKV7, [*AR, "objective.masking=exact"], 'objective.masking is "exact": a key of mdlm, dllm, soft_ce, '),
        (RWKV7, ["objective.label_smoothing=0.2"], "objective.label_smoothing is 0.2: a key of soft_ce only, and obj"),
        (RWKV7, ["objective.schedule_exponent=3"], "a key of power only, and objective.schedule is linear: remove it"),
        (RWKV7, ["objective.schedule_steepness=3"], "a key of sigmoid only, and objective.schedule is linear"),
        (
            RWKV7,
            ["objective.cart_p=0.3"],
            "objective.cart_p is 0.3: a key of cart only, and objective.weighting is elbo",
        ),
        (RWKV7, ["objective.soft_tail_p=0.3"], "objective.soft_tail_p is 0.3: a key of soft_tail only"),
        (RWKV7, ["objective.schedule=table"], "objective.schedule_points is missing: the schedule table needs its sh"),
        (
            RWKV7,
            ["objective.schedule=table", "objective.schedule_points=[0, 0.5, 0.4, 1]"],
            "objective.schedule_points is [0.0, 0.5, 0.4, 1.0]: expected shares that start with 0, rise everywhere",
        ),
        (
            RWKV7,
            ["objective.schedule=table", "objective.schedule_points=[0.1, 1]"],
            "expected shares that start with 0, rise everywhere and end with 1, else the loss is no bound",
        ),
        (
            RWKV7,
            ["objective.schedule=geometric", "objective.schedule_sigma=[20, 1e-4]"],
            "objective.schedule_sigma is [20.0, 0.0001]: expected two rising numbers, else the schedule falls",
        ),
        (RWKV7, ["objective.t_min=0.8", "objective.t_max=0.3"], "objective.t_min is 0.8: expected less than obje"),
        (
            RWKV7,
            ["objective.complementary_prob=0.5"],
            "objective.complementary_prob is 0.5: expected objective.draws_per_row 2, which is None",
        ),
        (
            RWKV7,
            ["objective.one_block_length=3", "data.sequence_length=16"],
            "objective.one_block_length is 3: expected a divisor of data.sequence_length = 16",
        ),
        (
            RWKV7,
            ["objective.name=block", "objective.block_lengths=[[9, 4], [0, 3]]", "data.sequence_length=16"],
            "objective.block_lengths is [[9, 4], [0, 3]]: expected divisors of data.sequence_length = 16",
        ),
        (
            RWKV7,
            ["objective.name=wsd", "objective.one_block_length=4"],
            "objective.one_block_length is 4: a key of mdlm, dllm, soft_ce and iid_t only, and objective.name is wsd",
        ),
        (RWKV7, ["objective.token_to_token_weight=2"], "expected null, since objective.token_to_token_rate is 0"),
        (
            RWKV7,
            ["objective.shift=true", "data.isolate_documents=true"],
            "objective.shift is true: expected false, since data.isolate_documents is true",
        ),
        (
            RWKV7,
            ["data.random_length_group=4", "data.random_length_prob=0"],
            "data.random_length_group is 4: expected 1, since data.random_length_prob is 0: nothing is cut",
        ),
        (RWKV7, [*AR, "train.eval_draws=4"], "train.eval_draws is 4: expected 1, since the likelihood of a model"),
        (RWKV7, ["objective.name=block", "model.direction=dw_jrt"], "a seed has seen the blocks that are to come"),
        (RWKV7, ["objective.name=block", "objective.block_lengths=[]"], "expected at least one phase"),
        (
            RWKV7,
            ["objective.name=card", "model.direction=bidirectional"],
            "expected causal, since",
        ),
        (RWKV7, ["objective.mask_noise_std=0.1"], "objective.mask_noise_samples is missing: objective.mask_noise_std"),
        (RWKV7, ["objective.mask_noise_samples=9"], "objective.mask_noise_std is missing: objective.mask_noise_sampl"),
        (
            RWKV7,
            [
                "objective.mask_noise_std=0.1",
                "objective.mask_noise_samples=9",
                "objective.noise_type=random_replace",
            ],
            "objective.mask_noise_std is 0.1: expected null, since objective.noise_type is random_replace",
        ),
        (RWKV7, ["objective.card_tail=2"], "objective.card_tail is 2.0: a key of card only"),
        (
            RWKV7,
            ["objective.name=arr"],
            'objective.name is "arr": expected one of mdlm, dllm, soft_ce, iid_t, wsd, block, ar',
        ),
        (QWEN3, ["model.tie_directions=true"], "model.tie_directions is true: expected false, since only rwkv7"),
        (
            RWKV7,
            ["model.tie_directions=true", "model.direction=causal"],
            "a key of direction bidirectional only, and model.direction is causal: remove it",
        ),
        (RWKV7, ["model.dw_jrt_scale=20"], "model.dw_jrt_scale is 20.0: a key of direction dw_jrt only"),
        (
            RWKV7,
            ["model.direction=dw_jrt", "model.dw_jrt_variant=inject", "model.dw_jrt_gate=true"],
            "model.dw_jrt_gate is true: expected null, since the variant inject always has a gate",
        ),
        (
            RWKV7,
            ["model.direction=dw_jrt", "model.dw_jrt_gate_init=1"],
            "model.dw_jrt_gate_init is 1.0: expected null, or model.dw_jrt_gate true",
        ),
        (
            QWEN3,
            ["model.direction=alternate"],
            'model.direction is "alternate": expected one of causal, bidirectional, the directions of qwen3',
        ),
        (QWEN3, ["model.wkv7_kernel=fla"], 'model.wkv7_kernel is "fla": a key of rwkv7 only'),
        (RWKV7, ["model.attention_kernel=flex"], 'model.attention_kernel is "flex": a key of qwen3 only'),
        (QWEN3, ["model.layer_patterns=[]"], "model.layer_patterns is []: expected from 1 to 2 entries, the number of"),
        (QWEN3, ["model.layer_patterns=[window:0]"], "expected bidirectional, causal, block_causal:N or window:N, whi"),
        (
            QWEN3,
            [*AR, "model.layer_patterns=[causal, block_causal:4]"],
            'is ["causal", "block_causal:4"]: expected causal and window:N alone, since the direction is causal: a lay',
        ),
        (RWKV7, [ANNEALED], "objective.attention_annealing is 100: expected null, since model.backbone is rwkv7"),
        (QWEN3, [ANNEALED, "model.direction=causal"], "is 100: expected null, since model.direction is causal"),
        (QWEN3, [ANNEALED, "model.layer_patterns=[causal]"], "since model.layer_patterns is causal in all layers"),
        *((QWEN3, [ANNEALED, f"objective.name={name}"], "a key of mdlm, dllm") for name in ("ar", "card", "block")),
        (QWEN3, ["model.num_key_value_heads=3"], "expected a divisor of model.num_attention_heads = 4"),
        (QWEN3, ["model.num_attention_heads=null"], "model.num_attention_heads is missing"),
        (QWEN3, ["model.head_dim=33"], "model.head_dim is 33: expected an even number"),
        (RWKV7, ["train.max_steps=null"], "train.max_steps is missing: give it or train.max_epochs"),
        (RWKV7, ["train.micro_batch_size=null"], "train.micro_batch_size is missing: give it or"),
        (RWKV7, ["train.micro_batch_size=3"], "is 8: expected a multiple of train.micro_batch_size (3)"),
        (
            RWKV7,
            ["train.gradient_accumulation_steps=3"],
            "is 8: expected a multiple of train.micro_batch_size (2) * train.gradient_accumulation_steps (3)",
        ),
        (RWKV7, ["train.eval_every=5"], "train.eval_every is 5: expected null, since data.validation is not given"),
        (
            RWKV7,
            ["checkpoint.keep_every=2000"],
            "checkpoint.keep_every is 2000: expected null, since checkpoint.keep_last keeps all",
        ),
        (
            RWKV7,
            ["checkpoint.keep_every=1500", "checkpoint.keep_last=2"],
            "checkpoint.keep_every is 1500: expected a multiple of checkpoint.every, 1000",
        ),
        (
            RWKV7,
            ["objective.name=block", "objective.clip_search=true"],
            "objective.clip_search is true: expected train.eval_every too",
        ),
        (
            RWKV7,
            ["objective.clip_search=true", "data.validation=d", "train.eval_every=5"],
            "objective.clip_search is true: a key of block only, and objective.name is mdlm: remove it",
        ),
        (RWKV7, ["optimizer.warmup_steps=11"], "optimizer.warmup_steps is 11: expected at most train.max_steps = 10"),
        (RWKV7, ["optimizer.schedule=wsd"], "optimizer.decay_steps is missing: the schedule wsd needs"),
        (RWKV7, ["optimizer.decay_steps=3"], "optimizer.decay_steps is 3: a key of wsd and inverse_sqrt"),
        (
            RWKV7,
            ["optimizer.schedule=wsd", "optimizer.decay_steps=9", "optimizer.warmup_steps=2"],
            "optimizer.decay_steps is 9: expected at most 8, train.max_steps - optimizer.warmup_steps",
        ),
        (RWKV7, ["data.train=[]"], "data.train is missing: expected a list"),
        (RWKV7, ["run.dir="], "run.dir is null: expected a path"),
        (RWKV7, ["run.dir=''"], 'run.dir is "": expected a path'),
        (RWKV7, ["deepspeed.train_batch_size=4"], "use train.global_batch_size and remove it"),
        (RWKV7, ["train.sample_prompt=a: b: c"], "quote text that holds YAML signs"),
    ],
)
def test_one_contradiction_one_sentence(write, base, overrides, sentence):
    (found,) = mistakes_of(write(base), *overrides)
    assert sentence in found


def test_a_contradiction_beside_a_wrong_value_shows_only_what_was_written(write):
    text = RWKV7.replace("global_batch_size: 8", "global_batch_size: many, max_epochs: 1")
    assert set(mistakes_of(write(text))) == {
        'train.global_batch_size is "many": expected a whole number at least 1',
        "train.max_epochs is 1.0: expected null, since train.max_steps is 10: give exactly one of them",
    }


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"run: [1\nmodel: 2", "not valid YAML: line 2, column 6"),
        (b"- a\n- b", 'holds ["a", "b"]: expected sections'),
        (b"run: !!python/object:os.system {}", "not valid YAML: line 1, column 6"),
        (b"run: \xff", "byte 5 is not UTF-8 text"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, sentence):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    (found,) = mistakes_of(path)
    assert sentence in found


def test_a_file_that_is_not_there(tmp_path):
    (found,) = mistakes_of(tmp_path / "none.yaml")
    assert "there is no such file" in found
    (found,) = mistakes_of(tmp_path)
    assert "cannot be read: Is a directory" in found


def test_round_trip_and_update(write):
    for text in (RWKV7, QWEN3):
        config = load_config(write(text), ["data.skip=[[1, 2], [5, 9]]", "run.dir='2026-11-20'", "optimizer.lr=3e-5"])
        assert load_config(write(to_yaml(config))) == config
        changed = updated(config, {"model.vocab_size": 65536, "data.sequence_length": 512})
        assert (changed.model.vocab_size, changed.data.sequence_length) == (65536, 512)
        assert updated(changed, {"model.vocab_size": None, "data.sequence_length": None}) == config
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 0: expected a whole number at least 1 or null"):
        updated(config, {"model.vocab_size": 0})


@settings(max_examples=50, deadline=None)
@given(
    lr=st.floats(min_value=1e-12, max_value=10.0),
    seed=st.integers(0, 2**63 - 1),
    prompt=st.text(max_size=20),
    weight=st.floats(min_value=1e-6, max_value=1e6),
)
def test_every_value_survives_the_round_trip(lr, seed, prompt, weight):
    base = load_config(None, _as_overrides(yaml.safe_load(RWKV7)))
    values = {
        "optimizer.lr": lr,
        "run.seed": seed,
        "train.sample_every": 5,
        "train.sample_prompt": prompt,
        "data.train.0.weight": weight,
    }
    config = updated(base, values)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert load_config(None, _as_overrides(yaml.safe_load(to_yaml(config)))) == config


def _as_overrides(tree: dict[str, Any]) -> list[str]:
    return [f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6)}" for key, value in tree.items()]


def test_the_tree_is_frozen_and_direct_use_is_checked(write):
    config = load_config(write(RWKV7))
    with pytest.raises(ValidationError):
        config.train.max_steps = 3
    sections = {name: getattr(config, name) for name in RunConfig.model_fields}
    late = config.optimizer.model_copy(update={"warmup_steps": 99})
    with pytest.raises(ValidationError, match=r"at most train\.max_steps"):
        RunConfig(**{**sections, "optimizer": late})


def test_every_field_is_documented():
    def undocumented(section: type[Section], prefix: str) -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            if not field.description:
                found.append(prefix + name)
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found += undocumented(field.annotation, f"{prefix}{name}.")
        return found

    assert undocumented(RunConfig, "") == []


@pytest.mark.parametrize(
    ("micro", "accumulation", "world_size", "plan"),
    [
        (2, None, 4, BatchPlan(24, 2, 3)),
        (None, 3, 4, BatchPlan(24, 2, 3)),
        (2, 3, 4, BatchPlan(24, 2, 3)),
        (24, None, 1, BatchPlan(24, 24, 1)),
    ],
)
def test_batch_plan(write, micro, accumulation, world_size, plan):
    assert resolve_batch(_train(write, micro, accumulation), world_size) == plan


@pytest.mark.parametrize(
    ("micro", "accumulation", "world_size", "sentence"),
    [
        (2, None, 5, "train.global_batch_size is 24: expected a multiple of train.micro_batch_size = 2 * 5 ranks"),
        (None, 6, 5, "expected a multiple of train.gradient_accumulation_steps = 6 * 5 ranks"),
        (2, 3, 2, "24: expected train.micro_batch_size = 2 * train.gradient_accumulation_steps = 3 * 2 ranks"),
        (24, None, 2, "expected a multiple of train.micro_batch_size = 24 * 2 ranks"),
        (None, 1, 48, "expected a multiple of train.gradient_accumulation_steps = 1 * 48 ranks"),
    ],
)
def test_batch_sizes_that_do_not_multiply(write, micro, accumulation, world_size, sentence):
    with pytest.raises(ConfigError) as caught:
        resolve_batch(_train(write, micro, accumulation), world_size)
    assert sentence in caught.value.mistakes[0]


def test_a_ramp_of_batch_sizes(write):
    ramp = ["train.micro_batch_size=2", "train.gradient_accumulation_steps=null", "train.global_batch_size=24"]
    plan = resolve_batch(load_config(write(RWKV7), [*ramp, "train.batch_size_ramp=[[9, 4], [25, 8]]"]).train, 2)
    assert plan == BatchPlan(24, 2, 6, ((9, 4), (25, 8)))
    # 9 is no multiple of 4: the step that passes the border keeps its size, the next one begins where it ends.
    spans, position = [], 0
    while position < 100:
        spans.append((position, plan.size_at(position)))
        position += spans[-1][1]
    assert spans == [(0, 4), (4, 4), (8, 4), (12, 8), (20, 8), (28, 24), (52, 24), (76, 24)]
    for start, _ in spans:
        for end in range(start, 110):
            whole = sum(start <= first and first + size <= end for first, size in spans)
            if end < 100:
                assert plan.steps_between(start, end) == whole, (start, end)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["train.batch_size_ramp=[[9, 4], [9, 8]]"], "train.batch_size_ramp.1 is [9, 8]: expected a position above 9"),
        (
            ["train.batch_size_ramp=[[9, 3]]"],
            "[9, 3]: expected rows that are a multiple of train.micro_batch_size (2)",
        ),
        (
            ["train.batch_size_ramp=[[9, 4]]", "train.gradient_accumulation_steps=12"],
            "train.gradient_accumulation_steps is 12: expected null, since train.batch_size_ramp changes it",
        ),
    ],
)
def test_ramps_that_are_none(write, changes, sentence):
    batch = ["train.global_batch_size=24", "train.micro_batch_size=2", "train.gradient_accumulation_steps=null"]
    with pytest.raises(ConfigError) as caught:
        load_config(write(RWKV7), [*batch, *changes])
    assert any(sentence in mistake for mistake in caught.value.mistakes)


def test_a_ramp_that_the_ranks_do_not_divide(write):
    batch = ["train.micro_batch_size=2", "train.gradient_accumulation_steps=null", "train.global_batch_size=24"]
    config = load_config(write(RWKV7), [*batch, "train.batch_size_ramp=[[9, 4], [24, 6]]"])
    with pytest.raises(ConfigError) as caught:
        resolve_batch(config.train, 2)
    assert list(caught.value.mistakes) == [
        "train.batch_size_ramp.1 is [24, 6]: expected rows that are a multiple of train.micro_batch_size = 2 * 2 ranks"
    ]


def _train(write, micro, accumulation):
    values = {"global_batch_size": 24, "micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
    overrides = [f"train.{name}={'null' if value is None else value}" for name, value in values.items()]
    return load_config(write(RWKV7), overrides).train
