"""What happens between steps: evaluation, a text sample, a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from data_pipeline.loader import SampleStream
from data_pipeline.source import Source
from data_pipeline.tokenizer_base import Tokenizer
from dlm_dist.config import BatchPlan, RunConfig
from dlm_dist.diffusion.block_diffusion import BlockDiffusion, BlockLengths, ClipRange
from dlm_dist.diffusion.objectives import Objective
from dlm_dist.evaluation.bound import evaluate_bound
from dlm_dist.evaluation.clip_search import search_range
from dlm_dist.generation.autoregressive import continue_text
from dlm_dist.generation.blocks import generate_blocks
from dlm_dist.generation.samplers import generate, ids_without_text, until_the_end
from dlm_dist.training import checkpoint
from dlm_dist.training.checkpoint_files import load_trainer_state
from dlm_dist.training.checkpoint_snapshot import take_snapshot
from dlm_dist.training.checkpoint_writer import CheckpointWriter
from dlm_dist.training.metrics import MetricsLog
from dlm_dist.training.progress import Progress
from dlm_dist.training.records import versions
from dlm_dist.training.resume import Resume, leave_other_branches, topology
from dlm_dist.training.sources import open_validation
from dlm_dist.training.weight_average import WeightAverage

EVALUATED_AS = {"ar": "ar", "card": "ar", "block": "block"}
"""The objective by which held-out rows are scored, where it is not masked diffusion."""

SAMPLE_TOKENS = 64
"""Length of the texts of train.sample_every."""


@dataclass(frozen=True)
class SideInputs:
    """What evaluation and samples need, opened and checked before the first step."""

    tokenizer: Tokenizer
    validation: Source | None
    prompt: list[int]

    @classmethod
    def open(cls, config: RunConfig, train: Source) -> SideInputs:
        """Raises ConfigError or DataError where data.validation or train.sample_prompt cannot be used."""
        tokenizer = train.load_tokenizer()
        validation = None
        if config.data.validation is not None:
            validation = open_validation(config.data.validation, train)
        prompt = config.train.sample_prompt if config.train.sample_every is not None else ""
        return cls(tokenizer, validation, tokenizer.encode(prompt).tolist())


@dataclass(frozen=True)
class Callbacks:
    """Every method is collective: every rank must call. `log` is None on ranks other than 0."""

    config: RunConfig
    plan: BatchPlan
    engine: Any
    device: torch.device
    source: Source
    objective: Objective
    side: SideInputs
    stream: SampleStream
    identity: dict[str, Any]
    writer: CheckpointWriter
    log: MetricsLog | None
    average: WeightAverage | None

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out rows."""
        return self.side.validation is not None

    def evaluate(self, progress: Progress) -> None:
        """Bound (`ar`, `card`: exact likelihood) on the held-out rows, and objective.clip_search where that is on."""
        settings, step = self.config.train, progress.step
        assert self.side.validation is not None
        bound = evaluate_bound(
            self.engine.module,
            self.side.validation,
            self.device,
            num_rows=settings.eval_rows,
            draws=settings.eval_draws,
            isolate_documents=self.config.data.isolate_documents,
            objective=EVALUATED_AS.get(self.config.objective.name, "mdlm"),
            shift=bool(self.config.objective.shift),
            block_length=self._block_length(progress.data_pos),
        )
        found = self._search(progress) if self._is_search_due(step) else None
        if self.log is not None:
            held_out = self.side.validation.fingerprint
            self.log.evaluation({"step": step, "held_out": held_out, **bound.record(), "clip_search": found})

    def _is_search_due(self, step: int) -> bool:
        """Not at the start, where the losses say nothing, nor at an end that is no multiple: the run may go on."""
        every = self.config.train.eval_every
        return bool(self.config.objective.clip_search) and every is not None and step > 0 and step % every == 0

    def _search(self, progress: Progress) -> dict[str, Any]:
        """Choose the range of times that holds from the next step on, until it is chosen again -> for the record."""
        objective, settings = self.objective, self.config.train
        assert isinstance(objective, BlockDiffusion)
        assert self.side.validation is not None
        length = self._block_length(progress.data_pos)
        choice = search_range(
            self.engine.module,
            self.side.validation,
            self.device,
            objective,
            block_length=length,
            num_rows=settings.eval_rows,
            draws=settings.eval_draws,
        )
        position = self.stream.positions(progress.data_pos, 1)
        held = replace(objective, clip_ranges=progress.clip_ranges).time_ranges(position, length)
        if (choice.t_min, choice.t_max) != (held[0][0], held[1][0]):
            new = ClipRange(int(position[0]), length, choice.t_min, choice.t_max)
            progress.clip_ranges = (*progress.clip_ranges, new)
        return {"from_position": int(position[0]), "block_length": length, **asdict(choice)}

    def _block_length(self, data_pos: int) -> int:
        """The length of the blocks that are trained on after `data_pos` samples; 0 for other objectives."""
        phases = self.config.objective.block_lengths
        if phases is None:
            return 0
        position = self.stream.positions(data_pos, 1)
        return int(BlockLengths(phases).at(position, self.source.sequence_length)[0])

    def sample(self, progress: Progress) -> None:
        """A text that continues train.sample_prompt; every rank runs it, since ZeRO-3 gathers weights."""
        tokenizer = self.side.tokenizer
        ids = self._sampled(progress)
        if self.log is not None:
            self.log.sample(progress.step, tokenizer.decode(until_the_end(ids, tokenizer.eos_id)))

    def _sampled(self, progress: Progress) -> torch.Tensor:
        """Ids [T] of the prompt and SAMPLE_TOKENS tokens, written as the objective has it. Collective."""
        model, tokenizer = self.engine.module, self.side.tokenizer
        if EVALUATED_AS.get(self.config.objective.name) == "ar":
            return continue_text(
                model,
                self.side.prompt,
                SAMPLE_TOKENS,
                eos_id=tokenizer.eos_id,
                seed=progress.step,
                temperature=1.0,
                forbidden_ids=ids_without_text(tokenizer, model.config.vocab_size),
            )
        # Blocks that are whole rows are masked diffusion.
        blocks = self._block_length(progress.data_pos) % self.source.sequence_length or None
        steps = SAMPLE_TOKENS // 2 if blocks is None else max(SAMPLE_TOKENS // 2, 1 + -(-SAMPLE_TOKENS // blocks))
        if self.config.objective.name == "block" and blocks is not None:
            return generate_blocks(
                model, self.side.prompt, SAMPLE_TOKENS, steps, block_length=blocks, seed=progress.step
            )
        return generate(
            model,
            self.side.prompt,
            SAMPLE_TOKENS,
            steps,
            seed=progress.step,
            block_length=blocks,
            shifted_behind=tokenizer.eos_id if self.config.objective.shift else None,
        )

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint. An asynchronous one leaves the loop as soon as the state is copied."""
        asynchronous = self.config.checkpoint.asynchronous
        self.writer.finish()
        files = self.source.tokenizer_files()
        buffers = self.writer.buffers if asynchronous else None
        state = self._trainer_state(progress)
        snapshot = take_snapshot(self.engine, progress.step, state, files, buffers, self.average)
        self.writer.start(snapshot)
        if not asynchronous:
            self.writer.finish()

    def restore(self) -> Progress:
        """Put the newest checkpoint back into the engine -> where it stands."""
        self.writer.finish()
        run_dir = self.config.run.dir
        path, passed_over = checkpoint.find_resumable(run_dir / "checkpoints", "auto")
        assert path is not None, "a run that may roll back saves its start"
        checkpoint.put_back(self.engine, path, self.average)
        state = load_trainer_state(path)
        notes = [*passed_over, *leave_other_branches(run_dir, Resume(path, state))]
        if self.log is not None:
            for note in notes:
                self.log.console.line(f"note: {note}")
        return Progress.from_state(state)

    def _trainer_state(self, progress: Progress) -> dict[str, Any]:
        epoch = progress.data_pos // self.stream.epoch_length
        return {
            "epoch": epoch,
            "epoch_batch": self.plan.steps_between(epoch * self.stream.epoch_length, progress.data_pos),
            **progress.as_state(),
            "skipped_ranges": [list(pair) for pair in self.stream.skip.ranges],
            "seed": self.config.run.seed,
            "sequence_length": self.source.sequence_length,
            "fingerprints": [source.fingerprint for source in self.stream.sources],
            "topology": topology(self.config),
            "optimizer": self.config.optimizer.name,
            "ema_half_life": self.config.train.ema_half_life,
            "identity": self.identity,
            "versions": versions(),
            "wandb_id": self.log.wandb_id if self.log is not None else None,
        }
