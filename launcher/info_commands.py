"""`dlm doctor`: what is installed here and what of it really works."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

_NEEDED = (
    "torch",
    "deepspeed",
    "transformers",
    "bitsandbytes",
    "fla",
    "webdataset",
    "wandb",
    "tensorboard",
    "tokenizers",
    "pyrwkv_tokenizer",
    "safetensors",
)
_DISTRIBUTIONS = {"fla": "flash-linear-attention", "pyrwkv_tokenizer": "pyrwkv-tokenizer"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `works` is None where there was nothing to try."""

    name: str
    text: str
    works: bool | None
    needed: bool


def add_info_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm doctor`."""
    doctor = subparsers.add_parser(
        "doctor",
        help="show versions and devices, and try what a run needs",
        description="Show versions and devices and try what a run needs. The exit status is 1 when something that "
        "a run here needs is missing or does not work.",
    )
    doctor.set_defaults(run=run_doctor)
    objectives = subparsers.add_parser(
        "objectives",
        help="which objective runs on which backbone, in which direction",
        description="Print the table objective x backbone x direction, and why a combination is refused.",
    )
    objectives.set_defaults(run=run_objectives)


def run_objectives(arguments: argparse.Namespace) -> int:
    """Print which objective runs where. Returns 0."""
    from dlm_dist.compatibility import table

    print(table())
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print one line per finding. Returns 0 when everything that is needed here works."""
    findings = []
    for finding in examine():
        mark = {True: "ok", False: "FAILS" if finding.needed else "no", None: ""}[finding.works]
        print(f"{finding.name:<18} {mark:<6} {finding.text}".rstrip(), flush=True)
        findings.append(finding)
    broken = [finding.name for finding in findings if finding.needed and not finding.works]
    print(f"missing for a run on this machine: {', '.join(broken)}" if broken else "everything a run needs works")
    return 1 if broken else 0


def examine() -> Iterator[Finding]:
    """Every finding, in the order of the report."""
    version = platform.python_version()
    yield Finding("python", f"{version} at {sys.executable}", sys.version_info >= (3, 11), True)
    imported = {}
    for name in _NEEDED:
        finding = _try(name, partial(_import, name), needed=True)
        imported[name] = finding.works
        yield finding
    if not imported["torch"]:
        return
    import torch

    cuda = torch.cuda.is_available()
    yield _try("triton", partial(_import, "triton"), needed=cuda)
    if imported["deepspeed"]:
        yield _try("accelerator", _accelerator, needed=True)
    yield from _devices()
    device = "cuda" if cuda else "cpu"
    yield _try(f"bf16 on {device}", partial(_bf16, device), needed=False)
    if imported["bitsandbytes"]:
        for where in ("cpu", "cuda") if cuda else ("cpu",):
            yield _try(f"8-bit step on {where}", partial(_eight_bit_step, where), needed=where == device)
    # Triton compiles a launcher for each kernel; a run on CPU compiles nothing.
    yield _try("C compiler", _compiler, needed=cuda)


def _try(name: str, check: Callable[[], str], needed: bool) -> Finding:
    """Run a check; whatever it raises is the finding, since the reason is what the user wants to read."""
    try:
        return Finding(name, check(), True, needed)
    except Exception as error:
        reason = str(error).strip().splitlines()
        return Finding(name, f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}", False, needed)


def _import(name: str) -> str:
    from importlib import metadata

    importlib.import_module(name)
    return metadata.version(_DISTRIBUTIONS.get(name, name))


def _accelerator() -> str:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return f"{accelerator.device_name()}, communicates over {accelerator.communication_backend_name()}"


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads for torch", None, False)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {torch.cuda.get_device_capability(index)}"
        )
        yield Finding(f"cuda:{index}", text, None, False)
    if torch.backends.mps.is_available():
        yield Finding("mps", "Apple GPU", None, False)


def _bf16(device: str) -> str:
    import torch

    ones = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    if (ones @ ones).float().mean().item() != 64.0:
        raise RuntimeError("a product of two matrices of ones is wrong")
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else None
    return "computed; the device only emulates it" if native is False else "computed"


def _eight_bit_step(device: str) -> str:
    """One AdamW8bit step with 8-bit states."""
    import torch

    from dlm_dist.training.optimizers import eight_bit_problem

    problem = eight_bit_problem("adamw8bit", torch.device(device))
    if problem is not None:
        raise RuntimeError(problem)
    return "AdamW8bit took a step with 8-bit states"


def _compiler() -> str:
    """Compile what a kernel's launcher is made of: a shared library with the interpreter's headers."""
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("neither clang nor gcc is on PATH, and CC is not set")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "probe.c"), Path(folder, "probe.so")
        source.write_text("#include <Python.h>\nlong probe(void) { return PyLong_AsLong(Py_None); }\n")
        _output([compiler, "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", str(source), "-o", str(target)])
    return f"{_output([compiler, '--version'])}, compiles with Python.h"


def _output(command: list[str]) -> str:
    """The first line that a program prints. Raises when it cannot be started or fails, with its first error."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{command[0]}: {errors[0].strip()}")
    return done.stdout.strip().partition("\n")[0]
