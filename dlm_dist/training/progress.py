"""Where a run stands: what a checkpoint holds besides the tensors and what never changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dlm_dist.diffusion.block_diffusion import ClipRange


@dataclass
class Progress:
    """Where the run stands: everything that changes from step to step besides the tensors."""

    step: int = 0
    """Completed optimizer steps, skipped ones included."""
    data_pos: int = 0
    """Samples of completed steps."""
    skipped_steps: int = 0
    """Steps whose update was left out."""
    skips_in_a_row: int = 0
    clip_ranges: tuple[ClipRange, ...] = ()
    """What objective.clip_search has chosen so far."""
    losses: list[float] = field(default_factory=list)
    """Of the last steps that updated the weights, for guards.loss_spike."""
    gradient_norms: list[float] = field(default_factory=list)
    """Of the same, for guards.grad_norm_spike."""
    condemned: dict[int, str] = field(default_factory=dict)
    """Steps that a rollback leaves out -> why; by the value of `step` after them. Also those that are done: another
    rollback may come by again."""
    rollbacks: int = 0
    """Rollbacks of the whole run."""
    tokens_seen: int = 0
    """Tokens of the rows of completed steps: each row once, however many draws it gives."""
    nats_by_time: list[float] = field(default_factory=list)
    """Weighted losses by bucket of diffusion time since they were last recorded; empty: none yet."""
    tokens_by_time: list[int] = field(default_factory=list)
    """The tokens that these account for."""

    def as_state(self) -> dict[str, Any]:
        """For trainer_state.json."""
        return {
            "global_step": self.step,
            "data_pos": self.data_pos,
            "skipped_steps": self.skipped_steps,
            "skips_in_a_row": self.skips_in_a_row,
            "clip_ranges": [list(chosen) for chosen in self.clip_ranges],
            "losses": list(self.losses),
            "gradient_norms": list(self.gradient_norms),
            "condemned": {str(step): why for step, why in self.condemned.items() if step > self.step},
            "rollbacks": self.rollbacks,
            "tokens_seen": self.tokens_seen,
            "nats_by_time": list(self.nats_by_time),
            "tokens_by_time": list(self.tokens_by_time),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """From trainer_state.json; what older checkpoints lack starts empty."""
        return cls(
            step=state["global_step"],
            data_pos=state["data_pos"],
            skipped_steps=state["skipped_steps"],
            skips_in_a_row=state["skips_in_a_row"],
            clip_ranges=tuple(ClipRange(*chosen) for chosen in state.get("clip_ranges", ())),
            losses=list(state.get("losses", ())),
            gradient_norms=list(state.get("gradient_norms", ())),
            condemned={int(step): why for step, why in state.get("condemned", {}).items()},
            rollbacks=state.get("rollbacks", 0),
            tokens_seen=state.get("tokens_seen", 0),
            nats_by_time=list(state.get("nats_by_time", ())),
            tokens_by_time=list(state.get("tokens_by_time", ())),
        )
