"""The objective of a run, from its configuration and what its data say of their tokenizer."""

from __future__ import annotations

from dataclasses import replace

from data_pipeline.source import Source
from dlm_dist.config import ConfigError, RunConfig
from dlm_dist.diffusion.block_diffusion import BlockDiffusion, BlockLengths
from dlm_dist.diffusion.mask_noise import WithMaskNoise
from dlm_dist.diffusion.objectives import OBJECTIVES, Objective, Vocabulary
from dlm_dist.training.progress import Progress


def make_objective(config: RunConfig, source: Source) -> Objective:
    """The objective of a run on `source`. Raises ConfigError where its settings make none."""
    settings = config.objective.settings()
    if config.data.random_length_prob:
        settings |= {"random_length_prob": config.data.random_length_prob}
        settings |= {"random_length_group": config.data.random_length_group}
    try:
        if config.objective.one_block_length is not None:
            BlockLengths(((0, config.objective.one_block_length),)).check(source.sequence_length)
        if config.objective.block_lengths is not None:
            BlockLengths(config.objective.block_lengths).check(source.sequence_length)
        objective = OBJECTIVES[config.objective.name](
            seed=config.run.seed,
            vocabulary=vocabulary(source),
            isolate_documents=config.data.isolate_documents,
            **settings,
        )
    except ValueError as error:
        raise ConfigError([f"objective: {error}"]) from error
    noise = config.objective.mask_noise
    return objective if noise is None else WithMaskNoise(objective, config.run.seed, *noise)


def vocabulary(source: Source) -> Vocabulary:
    """What an objective needs to know of the source's tokenizer."""
    tokenizer = source.load_tokenizer()
    named = {"pad": tokenizer.pad_id} | ({} if tokenizer.bos_id is None else {"bos": tokenizer.bos_id})
    return Vocabulary(source.mask_id, source.eos_id, source.token_bytes, source.vocab_size, named)


def with_choices(objective: Objective, progress: Progress) -> Objective:
    """The objective with the ranges of times that were chosen so far, each of which holds from a position on."""
    if not progress.clip_ranges:
        return objective
    if isinstance(objective, WithMaskNoise):
        return replace(objective, objective=with_choices(objective.objective, progress))
    assert isinstance(objective, BlockDiffusion)
    return replace(objective, clip_ranges=progress.clip_ranges)
