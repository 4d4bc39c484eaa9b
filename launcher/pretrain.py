"""Pretrain a masked-diffusion language model: `deepspeed launcher/pretrain.py --config FILE [key.sub=value ...]`.

One process per device, started by `deepspeed`, `torchrun` or `srun`; without a launcher it runs as one process. On a
machine without a GPU say how many: `deepspeed --num_gpus 2 launcher/pretrain.py --config FILE` starts two on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

USER_ERROR = 2
INTERRUPTED = 130
LOST_CONTACT = 74  # EX_IOERR: another rank has ended, and its status says why
STOPPED_EARLY = 75  # EX_TEMPFAIL: saved, and to be gone on with
# What gloo and NCCL say to a rank whose neighbour is gone.
_LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")
_NEIGHBOUR_ENDED = "lost contact with another rank, which has ended: its own message says why"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; deepspeed adds --local_rank."""
    parser = argparse.ArgumentParser(prog="pretrain.py", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument(
        "--resume",
        metavar="auto|CHECKPOINT",
        help="auto: the newest checkpoint that verifies, or a fresh start if there is none; or the path of one",
    )
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace those of the file")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Run; 0 only when the last step was reached, STOPPED_EARLY where it was asked to end and has saved."""
    options = parse_arguments(arguments)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    from dlm_dist.training.errors import StoppedEarlyError
    from launcher.slurm import adopt_srun_task

    adopt_srun_task(os.environ)
    try:
        _run(options)
    except StoppedEarlyError as end:
        if os.environ.get("RANK", "0") == "0":
            print(f"pretrain: {end}", file=sys.stderr, flush=True)
        return STOPPED_EARLY
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        sentence = _for_the_user(error)
        if os.environ.get("DLM_DEBUG") == "1" or sentence is None:
            raise
        _tell(sentence)
        return LOST_CONTACT if sentence is _NEIGHBOUR_ENDED else USER_ERROR
    return 0


def _run(options: argparse.Namespace) -> None:
    from dlm_dist.config import load_config

    config = load_config(options.config, options.overrides)

    from dlm_dist.training.distributed import start_distributed

    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = start_distributed(config.train.device, config.train.cpu_threads)

    import torch

    from dlm_dist.training.run import train

    train(config, device, options.resume, [Path(sys.executable).name, *sys.argv])
    torch.distributed.destroy_process_group()


def _for_the_user(error: ValueError | OSError | RuntimeError) -> str | None:
    """The sentence about what the user can mend; None for anything else, which deserves its traceback."""
    from data_pipeline.errors import DataError
    from dlm_dist.config import ConfigError
    from dlm_dist.training.checkpoint_files import CheckpointError
    from dlm_dist.training.errors import TrainingStoppedError

    if isinstance(error, OSError):
        return str(error) if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, (ConfigError, DataError, CheckpointError, TrainingStoppedError)):
        return str(error)
    if any(sign in str(error) for sign in _LOST_CONTACT):
        return _NEIGHBOUR_ENDED
    return None


def _tell(sentence: str) -> None:
    """Ranks usually fail alike: the first one tells it, the others only if nobody has stopped them by then."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(3)
    print(f"pretrain: error: {sentence}" + (f" (rank {rank})" if rank else ""), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from launcher.leaving import leave

    leave(main(sys.argv[1:]))
