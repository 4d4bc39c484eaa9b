"""The trainer's step beside a bare loop, and our loss beside full logits. One process, one rank.

    python -m benchmarks.train_step [--size small] [--backbones rwkv7 qwen3] [--rounds 3] [--output FILE]

Systems take turns, step by step on the same rows and masks, because machines are noisy: the figure to read is
the ratio of times within a round. `bare` is model, loss, fp32 masters, clipping and optimizer and nothing else
(bare_loop.py). `zero0` and `zero2` are the trainer's own loop (Stepper.step): rows read ahead from shards on disk,
keyed noise, hashes, totals, DeepSpeed, one record to metrics.jsonl. `full logits` is the bare loop with the usual
loss. `--parts head` takes a model most of whose work is its head (Qwen3 of 103 million parameters, 78 of them the
embedding of 151,936 ids; 8 rows of 512 tokens a step): the bare loop with full logits, the measure there, beside ours
and the trainer, with the goals of 3 times its speed and less than 4 GB; it needs 16 GB. MFU is model FLOPs (the head
on scored rows only, in every system) over time over the best matrix product measured in the same run. Peak memory is
the growth of a fresh process from before the model to the end of two steps; what the imports take (half a GB) is not
in it. Ends with one line of JSON.

What the trainer adds is passes over the weights, so its share falls with the tokens of a step. A step here has
more of them per weight than a test and far fewer than a real run (0.1 to 0.5 million tokens per rank); RWKV-7
scans one way only and Qwen3 ties its embeddings, as their authors publish them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.loader import ReadAhead, SampleStream
from data_pipeline.shards import ShardedSource, write_source
from data_pipeline.tokenizer_backends.characters import CharacterTokenizer
from dlm_dist import models
from dlm_dist.config import RunConfig, load_config, resolve_batch
from dlm_dist.diffusion.objectives import Objective
from dlm_dist.training.distributed import start_distributed

VOCABULARY = 65_536
VOCABULARIES = (65_536, 151_936)
"""RWKV World's and Qwen's, for the comparison of losses."""


@dataclass(frozen=True)
class Size:
    """A model, and the rows of a step: micro_batch rows of `length` tokens, `accumulation` times.

    Losses are compared on one micro-batch of `loss_rows` rows, since full logits of more do not fit everywhere.
    """

    hidden: int
    layers: int
    length: int
    micro_batch: int
    accumulation: int
    loss_rows: int
    vocabularies: tuple[int, ...] = VOCABULARIES
    key_value_heads: int | None = None


SIZES = {
    "tiny": Size(hidden=64, layers=2, length=32, micro_batch=2, accumulation=2, loss_rows=2, vocabularies=(512,)),
    "demo": Size(hidden=256, layers=6, length=256, micro_batch=8, accumulation=2, loss_rows=8),
    "small": Size(hidden=384, layers=6, length=512, micro_batch=16, accumulation=2, loss_rows=4),
    "0.1b": Size(hidden=768, layers=12, length=1024, micro_batch=16, accumulation=2, loss_rows=8),
}
"""tiny only shows that the script runs: its steps are all overhead."""

HEAD_SIZE = Size(
    hidden=512,
    layers=8,
    length=512,
    micro_batch=8,
    accumulation=1,
    loss_rows=8,
    vocabularies=(151_936,),
    key_value_heads=4,
)
HEAD_SPEED_GOAL = 3.0
HEAD_MEMORY_GOAL = 4e9


@dataclass(frozen=True)
class Options:
    """What the command line decides for all that is measured."""

    size: str
    precision: str
    optimizer: str
    device: str
    threads: int
    rounds: int


@dataclass(frozen=True)
class Case:
    """One model on one kind of step. Travels to the processes that measure memory."""

    options: Options
    backbone: str
    size: Size
    vocabulary: int

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step."""
        return self.size.micro_batch * self.size.accumulation

    def config(self, system: str, data: Path) -> RunConfig:
        """The run that `system` would make on `data`: everything not named here is the project's default."""
        model: dict[str, Any] = {"hidden_size": self.size.hidden, "num_hidden_layers": self.size.layers}
        if self.backbone == "rwkv7":
            model |= {"direction": "causal"}
        else:
            model |= {"num_attention_heads": self.size.hidden // 64, "head_dim": 64, "tie_word_embeddings": "true"}
            if self.size.key_value_heads is not None:
                model |= {"num_key_value_heads": self.size.key_value_heads}
        values = {
            "run.dir": data.parent / system,
            "model.backbone": self.backbone,
            "model.vocab_size": self.vocabulary,
            **{f"model.{name}": value for name, value in model.items()},
            "data.train.0.path": data,
            "data.sequence_length": self.size.length,
            "train.max_steps": 1_000_000,
            "train.global_batch_size": self.rows_per_step,
            "train.micro_batch_size": self.size.micro_batch,
            "train.precision": self.options.precision,
            "optimizer.name": self.options.optimizer,
            "zero.stage": {"zero0": 0, "zero2": 2}.get(system, 0),
        }
        return load_config(None, [f"{name}={value}" for name, value in values.items()])

    def model(self) -> Any:
        """The model in fp32, on the host."""
        sizes = self.config("bare", Path("data")).model.sizes()
        return models.build(self.backbone, seed=0, mask_token_id=self.vocabulary - 1, **sizes)

    def build(self, system: str, model: Any, data_folder: Path, device: torch.device, peak: float) -> Any:
        """The system, ready for its first step; it takes over `model`."""
        config = self.config(system, data_folder)
        data = Data.open(config)
        if system in ("zero0", "zero2"):
            return TrainerSystem(config, model, data, device, peak)
        return BareSystem(config, model, data, device, full_logits=system == "full logits")


# --- data ------------------------------------------------------------------------------------------------------


def write_random_rows(folder: Path, vocabulary: int, length: int, rows: int) -> None:
    """A data set on disk whose ids are spread evenly over the whole vocabulary."""
    points = (point for point in range(sys.maxunicode) if not 0xD800 <= point < 0xE000)
    tokenizer = CharacterTokenizer([next(points) for _ in range(vocabulary - 2)])
    ids = np.random.default_rng(0).integers(0, vocabulary - 2, (rows, length))
    write_source(folder, ids, tokenizer)


@dataclass(frozen=True)
class Data:
    """The rows of a run, as the trainer reads them."""

    source: ShardedSource
    stream: SampleStream
    objective: Objective

    @staticmethod
    def open(config: RunConfig) -> Data:
        from dlm_dist.training.objective import make_objective

        source = ShardedSource.open(config.data.train[0].path)
        objective = make_objective(config, source)
        return Data(source, SampleStream([source], [1.0], config.run.seed), objective)

    def prepare(self, config: RunConfig, device: torch.device) -> Callable[[int], Any]:
        """data_pos -> the step's RankStep."""
        from dlm_dist.training.batches import prepare_step

        plan, size = resolve_batch(config.train, 1), config.train.global_batch_size
        pin = device.type == "cuda"
        return lambda pos: prepare_step(
            self.stream.read, self.objective, self.stream.positions(pos, size), plan, 0, 1, pin
        )


# --- the systems -----------------------------------------------------------------------------------------------


class BareSystem:
    """The bare loop on rows that were read and corrupted beforehand."""

    def __init__(self, config: RunConfig, model: Any, data: Data, device: torch.device, full_logits: bool) -> None:
        from benchmarks.bare_loop import BareLoop

        self.loop = BareLoop(model, config, device, full_logits)
        self._prepare = data.prepare(config, device)
        self._size = config.train.global_batch_size
        self._step = 0

    def ready(self) -> Any:
        """What the next step will run on."""
        return self._prepare(self._step * self._size)

    def step(self, batch: Any) -> None:
        """One step on `batch`."""
        self.loop.step(batch.micro_batches, int(batch.counts[0]))
        self._step += 1

    def close(self) -> None:
        """Nothing to stop."""


class TrainerSystem:
    """The trainer's loop, one iteration at a time; evaluation, samples and checkpoints never fall due."""

    def __init__(self, config: RunConfig, model: Any, data: Data, device: torch.device, peak: float) -> None:
        from dlm_dist.training.checkpoint_writer import CheckpointWriter
        from dlm_dist.training.engine import build_engine
        from dlm_dist.training.guards import Guards
        from dlm_dist.training.metrics import MetricsLog
        from dlm_dist.training.phases import PhaseClock
        from dlm_dist.training.progress import Progress
        from dlm_dist.training.rank_times import RankTimes
        from dlm_dist.training.starting_model import whole_parts
        from dlm_dist.training.step import Stepper
        from dlm_dist.training.step_figures import Pace, StepFigures
        from dlm_dist.training.stop_requests import StopRequest
        from dlm_dist.training.update_figures import UpdateMeter

        plan = resolve_batch(config.train, 1)
        engine, _ = build_engine(model, config, plan, whole_parts(model))
        config.run.dir.mkdir(parents=True, exist_ok=True)
        self._stepper = Stepper(
            config=config,
            plan=plan,
            max_steps=config.train.max_steps or 0,
            engine=engine,
            device=device,
            host_group=torch.distributed.new_group(backend="gloo") if device.type == "cuda" else None,
            read_ahead=ReadAhead(
                data.prepare(config, device),
                plan.size_at,
                config.data.read_ahead_steps,
                config.data.loader_threads,
            ),
            is_bound=data.objective.is_bound,
            head_settings=data.objective.head_settings(),
            peak_flops=peak,
            log=MetricsLog(config.run.dir, 0, 0, 2**62, None),
            writer=CheckpointWriter(config.run.dir / "checkpoints"),
            alarm=lambda: None,
            guards=Guards(),
            stop=StopRequest(None),
            clock=PhaseClock(device),
            figures=StepFigures(1, UpdateMeter(engine), RankTimes([""]), Pace(0), lambda data_pos: {}),
        )
        self._progress = Progress()
        self._stepper.seek(self._progress)

    def ready(self) -> None:
        """The trainer reads its rows itself."""

    def step(self, batch: None) -> None:
        """One iteration of the loop."""
        self._stepper.step(self._progress)

    def close(self) -> None:
        """Stop the reading threads and let go of the engine."""
        self._stepper.read_ahead.close()
        self._stepper.engine.destroy()


def take_turns(systems: Mapping[str, Any], device: torch.device, warmup: int, rounds: int) -> dict[str, list[Time]]:
    """Time one step of every system per round. The order moves on by one each round."""
    times: dict[str, list[Time]] = {name: [] for name in systems}
    names = list(systems)
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            elapsed = timed_step(systems[name], device)
            if number >= warmup:
                times[name].append(elapsed)
        latest = "  ".join(f"{name} {times[name][-1].wall:.2f} s" for name in names) if number >= warmup else "warm-up"
        print(f"    round {number + 1 - warmup}: {latest}", file=sys.stderr, flush=True)
    return times


@dataclass(frozen=True)
class Time:
    """Seconds of a step: on the clock, and of all cores of this process together."""

    wall: float
    cpu: float


def timed_step(system: Any, device: torch.device) -> Time:
    """One step, with nothing of the device left over before or after it."""
    from benchmarks.machine import synchronize

    batch = system.ready()
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    system.step(batch)
    synchronize(device)
    return Time(time.perf_counter() - wall, time.process_time() - cpu)


# --- peak memory -----------------------------------------------------------------------------------------------


def peak_memory(case: Case, system: str) -> int:
    """Bytes that two steps of `system` add to a fresh process, which is to call this, at their highest."""
    device = start_distributed(case.options.device)
    if device.type == "cpu":
        torch.set_num_threads(case.options.threads)
    import dlm_dist.training.zero_state  # noqa: F401 - imports are no part of the growth
    from benchmarks.machine import PeakMemory

    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        write_random_rows(data, case.vocabulary, case.size.length, 8 * case.rows_per_step)
        with PeakMemory(device) as memory:
            model = case.model()
            memory.forget_peak()  # that of drawing the initial values
            built = case.build(system, model, data, device, 1.0)
            for _ in range(2):
                built.step(built.ready())
        built.close()
    return memory.bytes


# --- the two comparisons ---------------------------------------------------------------------------------------


def model_flops(config: RunConfig, model: Any, steps: range) -> list[float]:
    """Model FLOPs of each step: backward counts twice the forward, the head runs on scored rows only."""
    data = Data.open(config)
    prepare = data.prepare(config, torch.device("cpu"))
    size, length = config.train.global_batch_size, data.source.sequence_length
    supervised = [int(prepare(step * size).counts[1]) for step in steps]
    body = model.flops_per_token(length) * size * length
    return [3.0 * (body + model.head_flops_per_row() * rows) for rows in supervised]


def compare(case: Case, names: Sequence[str], device: torch.device, peak: float, memory: bool) -> list[dict[str, Any]]:
    """Steps of the systems `names`, a row of figures each. The first is the bare loop, the measure of the others."""
    print(f"  {case.backbone}, {case.vocabulary} ids: {', '.join(names)}", file=sys.stderr, flush=True)
    from benchmarks.machine import in_fresh_process

    warmup, rounds = 1, case.options.rounds
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        write_random_rows(data, case.vocabulary, case.size.length, case.rows_per_step * (warmup + rounds + 8))
        model = case.model()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        flops = model_flops(case.config(names[0], data), model, range(warmup, warmup + rounds))
        systems = {system: case.build(system, copy.deepcopy(model), data, device, peak) for system in names}
        del model
        times = take_turns(systems, device, warmup, rounds)
        while systems:
            systems.popitem()[1].close()
        gc.collect()  # engines refer to themselves in circles
    return [
        figures(times[system], times[names[0]], flops, case.rows_per_step * case.size.length, peak)
        | {"backbone": case.backbone, "system": system, "vocabulary": case.vocabulary, "parameters": parameters}
        | {"peak_memory_bytes": in_fresh_process(peak_memory, case, system) if memory else None}
        for system in names
    ]


def figures(
    times: Sequence[Time], reference: Sequence[Time], flops: Sequence[float], tokens: int, peak: float
) -> dict[str, Any]:
    """Times of one system, and its speed relative to the reference, round by round: above 1 is faster."""
    from benchmarks.machine import spread

    pairs = list(zip(times, reference, strict=True))
    return {
        "tokens_per_step": tokens,
        "seconds": spread([time.wall for time in times]),
        "cpu_seconds": spread([time.cpu for time in times]),
        "tokens_per_second": spread([tokens / time.wall for time in times]),
        "mfu": spread([work / time.wall / peak for time, work in zip(times, flops, strict=True)]),
        "speed_ratio": spread([other.wall / time.wall for time, other in pairs]),
        "cpu_ratio": spread([other.cpu / time.cpu for time, other in pairs]),
        "rounds": len(times),
    }


def head_goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What ours and the trainer have to reach beside full logits, and whether they do."""
    result = []
    for row in rows:
        if row["system"] == "full logits":
            continue
        speed, memory = row["speed_ratio"]["median"], row["peak_memory_bytes"]
        result += [
            {"goal": f"{row['system']}: tokens/s / full logits", "value": speed, "at_least": HEAD_SPEED_GOAL}
            | {"passed": speed >= HEAD_SPEED_GOAL},
            {"goal": f"{row['system']}: peak memory in bytes", "value": memory, "below": HEAD_MEMORY_GOAL}
            | {"passed": memory < HEAD_MEMORY_GOAL},
        ]
    return result


# --- the script ------------------------------------------------------------------------------------------------

_COLUMNS = "{:<8} {:<12} {:>8} {:>24} {:>7} {:>19} {:>19} {:>9}"


def print_table(title: str, rows: Sequence[Mapping[str, Any]], first: str) -> None:
    """Medians with minimum and maximum; nothing where a part was not asked for."""
    if not rows:
        return
    print(f"\n{title}")
    head = ("model", "system", "vocab", "tokens/s", "MFU", f"speed / {first}", f"CPU-s {first} /", "peak GB")
    print(_COLUMNS.format(*head))
    for row in rows:
        print(
            _COLUMNS.format(
                row["backbone"],
                row["system"],
                row["vocabulary"],
                _text(row["tokens_per_second"], ",.0f"),
                f"{row['mfu']['median']:.1%}",
                _text(row["speed_ratio"], ".3f"),
                _text(row["cpu_ratio"], ".3f"),
                "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.2f}",
            )
        )


def _text(values: Mapping[str, float], form: str) -> str:
    return f"{values['median']:{form}} ({values['min']:{form}}-{values['max']:{form}})"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, help="model and batch (default: small on CPU, 0.1b on CUDA)")
    parser.add_argument("--backbones", nargs="+", choices=("rwkv7", "qwen3"), default=["rwkv7", "qwen3"])
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit", "lion8bit"), default="adamw")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each system (default: 3)")
    parser.add_argument("--micro-batch", type=int, help="rows of a micro-batch (default: by size)")
    parser.add_argument("--accumulation", type=int, help="micro-batches of a step (default: by size)")
    parser.add_argument("--parts", nargs="+", choices=("steps", "losses", "head"), default=["steps", "losses"])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on CPU (default: one per core)")
    parser.add_argument("--output", type=Path, help="also write the line of JSON to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and the line of JSON."""
    asked = parse(arguments)
    device = start_distributed(asked.device)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    from benchmarks.machine import describe, gemm_rates, spread

    options = Options(
        size=asked.size or ("0.1b" if device.type == "cuda" else "small"),
        precision=asked.precision,
        optimizer=asked.optimizer,
        device=device.type,
        threads=torch.get_num_threads(),
        rounds=asked.rounds,
    )
    size = SIZES[options.size]
    size = replace(
        size,
        micro_batch=asked.micro_batch or size.micro_batch,
        accumulation=asked.accumulation or size.accumulation,
    )
    dimension = 8192 if device.type == "cuda" else 2048
    gemm = {
        name: spread(gemm_rates(device, dtype, dimension, 10))
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    peak = gemm[options.precision]["max"]
    steps: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    for backbone in asked.backbones if "steps" in asked.parts else ():
        case = Case(options, backbone, size, size.vocabularies[0])
        steps += compare(case, ("bare", "zero0", "zero2"), device, peak, memory=False)
    one = replace(size, micro_batch=size.loss_rows, accumulation=1)
    for backbone in asked.backbones if "losses" in asked.parts else ():
        for vocabulary in size.vocabularies:
            case = Case(options, backbone, one, vocabulary)
            losses += compare(case, ("bare", "full logits"), device, peak, memory=True)
    head: list[dict[str, Any]] = []
    if "head" in asked.parts:
        whole = size if options.size == "tiny" else HEAD_SIZE
        case = Case(options, "qwen3", whole, whole.vocabularies[-1])
        head = compare(case, ("full logits", "bare", "zero0"), device, peak, memory=True)
    reached = head_goals(head)
    result = {
        "benchmark": "train_step",
        **describe(device),
        "options": asdict(options) | {"sizes": asdict(size)},
        "gemm_flops": gemm | {"dimension": dimension},
        "steps": steps,
        "losses": losses,
        "head": head,
        "goals": reached,
    }
    print(f"matrix product {dimension}^3: " + ", ".join(f"{n} {r['max'] / 1e12:.2f} TFLOP/s" for n, r in gemm.items()))
    print_table("The trainer beside the bare loop", steps, "bare")
    print_table("The bare loop with full logits beside ours, one micro-batch a step", losses, "ours")
    print_table("A step that is mostly its head: ours and the trainer beside full logits", head, "full")
    for goal in reached:
        limit = f"at least {goal['at_least']:g}" if "at_least" in goal else f"below {goal['below']:g}"
        print(f"{'pass' if goal['passed'] else 'FAIL'}  {goal['goal']}: {goal['value']:.4g}, {limit}")
    line = json.dumps(result)
    print(line)
    if asked.output is not None:
        asked.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
