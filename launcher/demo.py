"""`make demo`: the main job from end to end on text that every machine has, killed and resumed on the way.

Data from the interpreter's own standard library, a small RWKV-7 trained by `deepspeed launcher/pretrain.py`, SIGKILL in
the middle, resume from the newest checkpoint, the bound on held-out rows beside a unigram model, and infilled
passages. Each step prints the command that a person would type for it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

CONFIG = Path("configs/demo.yaml")
ROOT = Path("runs/demo")
RUN = ROOT / "run"
DATA = ROOT / "data"
KILL_AT_STEP = 50
MARGIN = 0.5
"""Nats per token that the model must beat the unigram model by."""


def main() -> int:
    """Run the demo; 0 only if everything it promises came true."""
    started = time.monotonic()
    os.chdir(Path(__file__).resolve().parent.parent)
    _title("1. Build shards from the sources of this Python's standard library")
    build = "data build --include *.py --exclude site-packages/* --tokenizer bytes --sequence-length 256"
    build += f" --validation-fraction 0.01 --output {DATA} --input"
    _run([*_dlm(), *build.split(), sysconfig.get_path("stdlib")])
    shutil.rmtree(RUN, ignore_errors=True)

    _title(f"2. Pretrain, and kill all processes hard at step {KILL_AT_STEP}")
    step = _train_until_killed(_pretrain())
    print(f"killed with SIGKILL after step {step}; on disk: {', '.join(_checkpoints())}", flush=True)

    _title("3. Resume from the newest checkpoint that verifies, and finish")
    _run([*_pretrain(), "--resume", "auto"])

    _title("4. The bound on held-out text beside an add-one unigram model of the training text")
    newest = RUN / "checkpoints" / _checkpoints()[-1]
    evaluation = _evaluate(newest)
    gain = evaluation["unigram_nats_per_token"] - evaluation["bound_nats_per_token"]
    print(f"{gain:.2f} nats per token below the unigram model (at least {MARGIN} are promised)", flush=True)

    _title("5. Fill gaps in text that the model has never seen")
    _infill(newest)
    print(f"\ndone in {time.monotonic() - started:.0f} s; the run is in {RUN}, its numbers in {RUN}/metrics.jsonl")
    return 0 if gain >= MARGIN else 1


def _dlm() -> list[str]:
    return [sys.executable, "-m", "launcher.cli"]


def _pretrain() -> list[str]:
    """The deepspeed command: two ranks on a CPU, else one for each of at most two GPUs."""
    import torch

    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    deepspeed = Path(sysconfig.get_path("scripts")) / "deepspeed"
    return [str(deepspeed), "--num_gpus", str(ranks), "launcher/pretrain.py", "--config", str(CONFIG)]


def _title(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def _show(command: list[str]) -> None:
    """Print a command as a person would type it."""
    scripts = sysconfig.get_path("scripts")
    typed = ["dlm", *command[3:]] if command[:3] == _dlm() else [command[0].removeprefix(f"{scripts}/"), *command[1:]]
    print(f"$ {shlex.join(typed)}", flush=True)


def _run(command: list[str]) -> None:
    _show(command)
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(f"demo: this command failed with status {done.returncode}")


def _train_until_killed(command: list[str]) -> int:
    """Start a run and kill its whole family of processes once it has recorded the step -> the last step recorded."""
    import psutil

    _show(command)
    process = psutil.Popen(command)
    while (step := _last_step()) < KILL_AT_STEP:
        if process.poll() is not None:
            sys.exit(f"demo: training ended by itself with status {process.returncode} after step {step}")
        time.sleep(0.05)
    family = [process, *process.children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    return _last_step()


def _last_step() -> int:
    try:
        return int(json.loads((RUN / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (FileNotFoundError, IndexError, ValueError):
        return 0  # nothing there yet, or the last line is being written


def _checkpoints() -> list[str]:
    from dlm_dist.training.checkpoint_files import list_checkpoints

    return [path.name for path in list_checkpoints(RUN / "checkpoints")]


def _evaluate(checkpoint: Path) -> dict[str, float]:
    command = [*_dlm(), "evaluate", "--checkpoint", str(checkpoint), "--data", str(DATA / "validation")]
    command += ["--rows", "128", "--unigram-from", str(DATA / "train"), "--json"]
    _show(command)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"demo: this command failed with status {done.returncode}")
    evaluation: dict[str, float] = json.loads(done.stdout)
    print(
        f"bound {evaluation['bound_nats_per_token']:.3f} +- {evaluation['standard_error']:.3f} nats per byte, "
        f"unigram {evaluation['unigram_nats_per_token']:.3f}",
        flush=True,
    )
    return evaluation


def _infill(checkpoint: Path) -> None:
    """Hide a few bytes in the middle of held-out passages and let the model fill them in."""
    from data_pipeline.shards import ShardedSource
    from dlm_dist import models
    from dlm_dist.generation.samplers import infill

    source = ShardedSource.open(DATA / "validation")
    tokenizer = source.load_tokenizer()
    model = models.load(checkpoint)
    print("$ dlm generate --model CHECKPOINT --infill --prompt 'text with {{mask:8}} gaps'")
    for row in source.read([3, 17, 31]).tokens[:, :160]:
        gappy = row.copy()
        for start in (70, 110):
            gappy[start : start + 8] = tokenizer.mask_id
        filled = infill(model, gappy, steps=16, forbidden_ids=[tokenizer.eos_id])
        for name, ids in (("with gaps", gappy), ("filled in", filled.numpy()), ("original", row)):
            print(f"{name}: {tokenizer.decode(ids)!r}", flush=True)
        print()


if __name__ == "__main__":
    sys.exit(main())
