"""The DeepSpeed engine: built so that its known traps are closed.

- Stage 3 patches `F.linear` for the whole process, which changes bf16 results: switched off.
- bf16 stage 0 makes a hidden optimizer step: it runs at lr 0 and its state is forgotten.
- Masters are cloned from weights already rounded to bf16: the unrounded values are written back.
- fp32 stage 0 neither checks nor measures gradients: the optimizer does (optimizers.FiniteGuard).
- Gradients accumulate in bf16 by default: fp32 where DeepSpeed can (docs/resume.md says where it cannot).
- Buffers are cast to bf16 with the weights (rotary frequencies among them): they stay fp32.
- Offload keeps the gradients of a skipped step, NaN and all: forgotten.
- Offload wants an Adam of DeepSpeed's own, compiled at the start: ours updates on the CPU as fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlm_dist.config import BatchPlan, RunConfig
from dlm_dist.training import zero_speed, zero_state
from dlm_dist.training.optimizers import build_optimizer, group_table, parameter_groups


def deepspeed_config(config: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's configuration for this run; `config.deepspeed` is merged last."""
    stage, bf16 = config.zero.stage, config.train.precision == "bf16"
    result: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_clipping": 0.0 if steps_bare(config) else config.train.gradient_clipping,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "data_types": {"keep_in_fp32_modules": ["*"]},
        "steps_per_print": 2**62,
    }
    if config.zero.offload_optimizer != "none":
        offload = {"device": config.zero.offload_optimizer, "pin_memory": True}
        result["zero_optimization"]["offload_optimizer"] = offload
        result["zero_force_ds_cpu_optimizer"] = False
    if stage == 2:
        result["zero_optimization"] |= zero_speed.STAGE_2_SETTINGS
    if bf16 and stage > 0:
        result["data_types"]["grad_accum_dtype"] = "fp32"
        result["communication_data_type"] = "fp32"
    return _merged(result, config.deepspeed)


def steps_bare(config: RunConfig) -> bool:
    """Whether DeepSpeed calls our optimizer without a wrapper of its own."""
    return config.zero.stage == 0 and config.train.precision == "fp32"


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if nested else value
    return result


def build_engine(
    model: Any, config: RunConfig, plan: BatchPlan, unrounded: Mapping[str, zero_state.Part]
) -> tuple[Any, list[dict[str, Any]]]:
    """A DeepSpeed engine over `model` (see `starting_model`) and the table of its groups.

    Collective: every rank must call. The masters start from the `unrounded` fp32 values.
    """
    import deepspeed

    settings = config.optimizer
    groups = parameter_groups(
        model, model.parameter_roles(), settings.lr, settings.weight_decay, settings.name.endswith("8bit")
    )
    table = group_table(model, groups)
    for group in groups:
        group["lr"] = 0.0
    bare = steps_bare(config)
    optimizer = build_optimizer(settings.name, groups, 0.0, settings.betas, settings.eps, guard=bare)
    if bare:
        optimizer.clip_norm = config.train.gradient_clipping  # type: ignore[attr-defined]
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, plan), dist_init_required=False
    )
    zero_speed.leave_out_repeated_work(engine)
    zero_state.forget_skipped_gradients(engine)
    zero_state.clear_optimizer_state(engine)
    if config.train.precision != "fp32":
        zero_state.write_masters(engine, unrounded)
    return engine, table


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set every group's rate to `lr` times its own scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def gradient_norm(engine: Any) -> float:
    """Global L2 norm of the last step's gradient before clipping; inf or nan if the step was skipped."""
    return float(engine.get_global_grad_norm())
