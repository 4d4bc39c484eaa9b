"""The `dlm` command: a parser whose sub-commands come from one module per group.

Such a module has `add_<group>_command(s)(subparsers)`, which sets `run` on each of its parsers: a function of the
parsed arguments that returns the exit status. The modules import what is heavy inside those functions, so that
`dlm --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from launcher.chain_command import add_chain_command
from launcher.checkpoint_commands import add_checkpoint_commands
from launcher.compare_command import add_compare_command
from launcher.convert_command import add_convert_command
from launcher.data_commands import add_data_commands
from launcher.evaluate_command import add_evaluate_command
from launcher.generate_command import add_generate_command
from launcher.goodput_command import add_goodput_command
from launcher.info_commands import add_info_commands
from launcher.init_command import add_init_command
from launcher.leaving import leave
from launcher.status_command import add_status_command
from launcher.sweep_commands import add_sweep_commands

_GROUPS: tuple[Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None], ...] = (
    add_data_commands,
    add_init_command,
    add_convert_command,
    add_generate_command,
    add_evaluate_command,
    add_checkpoint_commands,
    add_status_command,
    add_compare_command,
    add_sweep_commands,
    add_chain_command,
    add_goodput_command,
    add_info_commands,
)

USER_ERROR = 2
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of `dlm` with every group."""
    parser = argparse.ArgumentParser(
        prog="dlm",
        description="Build data for masked-diffusion language models, look after checkpoints, generate and evaluate. "
        "Training itself is started with `deepspeed launcher/pretrain.py --config FILE`.",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _GROUPS:
        add(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 only when its work was done.

    A mistake of the user's (ValueError, or OSError about a file) is one sentence and status 2; with DLM_DEBUG=1 it
    keeps its traceback.
    """
    parsed = build_parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read our output has left (`dlm ... | head`). What is still buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if os.environ.get("DLM_DEBUG") == "1" or (isinstance(error, OSError) and error.filename is None):
            raise
        print(f"dlm: error: {error_sentence(error)}", file=sys.stderr)
        return USER_ERROR


def error_sentence(error: ValueError | OSError) -> str:
    """What to tell the user: the message, for a file its name first."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def program() -> NoReturn:
    """The process `dlm`."""
    status = main()
    if "RANK" in os.environ:
        leave(status)
    sys.exit(status)


if __name__ == "__main__":
    program()
