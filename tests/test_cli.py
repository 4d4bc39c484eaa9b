"""The `dlm` command: a fast start, and mistakes told in one sentence."""

from __future__ import annotations

import argparse
import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import cli, info_commands

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "numpy", "transformers", "deepspeed", "webdataset", "wandb", "bitsandbytes", "pydantic", "tokenizers")


def dlm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.cli", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_help_lists_the_commands_and_starts_fast():
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = dlm("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
    for name in ("data", "init", "convert", "generate", "evaluate", "checkpoint", "doctor"):
        assert re.search(rf"^ {{4}}{name}\b", done.stdout, re.MULTILINE), name
    # Processor time, which a busy machine does not lengthen as it does the time on the clock.
    assert min(seconds) < 0.3


def test_the_parser_imports_nothing_heavy():
    program = f"import sys, launcher.cli as cli; cli.build_parser(); print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_reads_checkpoints_needs_no_deepspeed():
    """It prints to standard output while it is imported, where --json has its object."""
    program = "import sys, dlm_dist.training.model_files as found; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("arguments", [[], ["dta"], ["doctor", "--loud"]])
def test_a_wrong_command_line_is_status_2_without_traceback(arguments):
    done = dlm(*arguments)
    assert done.returncode == 2
    assert "usage: dlm" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def _raises(error: BaseException):
    def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        def run(_: argparse.Namespace) -> int:
            raise error

        subparsers.add_parser("try").set_defaults(run=run)

    return add


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("train.lr is -1: expected a number above 0"), "train.lr is -1: expected a number above 0"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.yaml"), "a.yaml: No such file or directory"),
        (PermissionError(errno.EACCES, "Permission denied", b"b.tar"), "b.tar: Permission denied"),
    ],
)
def test_a_mistake_is_one_sentence_on_stderr(monkeypatch, capsys, error, line):
    monkeypatch.delenv("DLM_DEBUG", raising=False)
    monkeypatch.setattr(cli, "_GROUPS", (_raises(error),))
    assert cli.main(["try"]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", f"dlm: error: {line}\n")
    monkeypatch.setenv("DLM_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["try"])


def test_our_own_faults_keep_their_traceback(monkeypatch):
    monkeypatch.delenv("DLM_DEBUG", raising=False)
    for error in (AssertionError("broken"), KeyError("x"), OSError("no file is named")):
        monkeypatch.setattr(cli, "_GROUPS", (_raises(error),))
        with pytest.raises(type(error)):
            cli.main(["try"])


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_GROUPS", (_raises(KeyboardInterrupt()),))
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_is_no_traceback():
    program = (
        "import sys, launcher.cli as cli\n"
        "def add(s):\n"
        "    s.add_parser('try').set_defaults(run=lambda a: [print('x' * 100) for _ in range(10**5)] and 0)\n"
        "cli._GROUPS = (add,)\n"
        "sys.exit(cli.main(['try']))\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


@pytest.mark.parametrize("rank", [None, "0"])
def test_a_rank_leaves_without_the_interpreters_way_out(rank):
    """On which threads of the collectives abort now and then, after all the work is done."""
    program = (
        "import atexit, launcher.cli as cli\n"
        "atexit.register(print, 'the way out')\n"
        "cli._GROUPS = (lambda s: s.add_parser('try').set_defaults(run=lambda a: print('work', end=', ') or 3),)\n"
        "cli.sys.argv[1:] = ['try']\n"
        "cli.program()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | (
        {"RANK": rank} if rank else {}
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == ("work, " if rank else "work, the way out\n")


def test_doctor_tries_and_reports(monkeypatch, capsys):
    monkeypatch.setattr(info_commands, "_import", lambda name: "1.0")
    monkeypatch.setattr(info_commands, "_compiler", lambda: "13.0")
    assert info_commands.run_doctor(argparse.Namespace()) == 0
    output = capsys.readouterr().out
    assert "everything a run needs works" in output
    assert "AdamW8bit took a step with 8-bit states" in output
    assert re.search(r"C compiler +ok +13.0", output)


def test_doctor_compiles_as_triton_does(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\necho "probe.c:1:10: fatal error: Python.h: No such file" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(RuntimeError, match=r"Python\.h: No such file"):
        info_commands._compiler()
    compiler.write_text("#!/bin/sh\necho gcc 13\n")
    assert info_commands._compiler() == "gcc 13, compiles with Python.h"
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(RuntimeError, match="neither clang nor gcc"):
        info_commands._compiler()


def test_doctor_fails_where_something_needed_is_missing(monkeypatch, capsys):
    def missing(name: str) -> str:
        if name in ("wandb", "deepspeed"):
            raise ModuleNotFoundError(f"No module named '{name}'")
        return "1.0"

    monkeypatch.setattr(info_commands, "_import", missing)
    monkeypatch.setattr(info_commands, "_compiler", lambda: "13.0")
    assert info_commands.run_doctor(argparse.Namespace()) == 1
    output = capsys.readouterr().out
    assert "missing for a run on this machine: deepspeed, wandb\n" in output
    assert "FAILS  ModuleNotFoundError: No module named 'wandb'" in output
    assert "accelerator" not in output
