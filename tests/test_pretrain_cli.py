"""`launcher/pretrain.py` as a program: a mistake is one sentence, told once, and the exit status says how it ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from data_pipeline.shards import write_source
from data_pipeline.tokenizers import load
from launcher import pretrain
from tests.data_pipeline.test_token_files import write_llmc
from tests.distributed import runs

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = ["--config", str(REPOSITORY / "tests" / "distributed" / "tiny.yaml")]


def environment(**changes: str) -> dict[str, str]:
    """What a user's shell has: none of a launcher's variables, and an environment that is not activated."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_PORT", "DS_ACCELERATOR", "DLM_DEBUG")
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    return kept | {"PATH": os.defpath, "OMP_NUM_THREADS": "1"} | changes


def start(arguments: list[str], **changes: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "launcher" / "pretrain.py"), *arguments]
    return subprocess.Popen(
        command, env=environment(**changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def tiny(data: Path, run: Path, **changes: Any) -> list[str]:
    return runs.overrides(data, run, "qwen3", **{"optimizer__warmup_steps": 0} | changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = np.stack([load("bytes").encode(f"{i:06d} some text that is 32 byte!"[:32]) for i in range(24)])
    write_source(folder / "train", rows, load("bytes"))
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run of two steps by one process without a launcher, with a checkpoint of each."""
    run = tmp_path_factory.mktemp("finished") / "run"
    process = start([*CONFIG, *tiny(data, run, train__max_steps=2, checkpoint__every=1)])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "step 2/2" in out
    return run


def test_a_run_without_launcher_reaches_its_end(finished):
    assert [record["step"] for record in runs.metrics(finished)] == [1, 2]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-1", "step-2"]
    (record,) = json.loads((finished / "manifest.json").read_text())["starts"]
    assert record["fallbacks"] == record["notes"] == []
    assert record["topology"]["world_size"] == 1


@pytest.fixture(scope="module")
def mistakes(data, finished, tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    """(status, standard output, standard error) of each mistake; they run at the same time, since each is mostly
    the start of Python."""
    folder = tmp_path_factory.mktemp("mistakes")
    damaged = shutil.copytree(finished, folder / "damaged")
    with open(damaged / "checkpoints" / "step-2" / "model" / "model.safetensors", "r+b") as file:
        file.truncate(100)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        of_two = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        again = ["--resume", str(damaged / "checkpoints" / "step-2"), "train.max_steps=3"]
        started = {
            "key": start([*CONFIG, *tiny(data, folder / "key"), "train.max_stps=3"]),
            "file": start(["--config", str(folder / "nothing.yaml")]),
            "data": start([*CONFIG, *tiny(folder / "nowhere", folder / "data")]),
            "init_from": start([*CONFIG, *tiny(data, folder / "init", model__init_from=folder / "nowhere")]),
            "exists": start([*CONFIG, *tiny(data, finished)]),
            "damaged": start([*CONFIG, *tiny(data, damaged, checkpoint__every=1), *again]),
            **_no_objective(data, folder),
            "port": start([*CONFIG, *tiny(data, folder / "port")], **of_two),
        }
        ended = {}
        for name, process in started.items():
            out, err = process.communicate(timeout=300)
            ended[name] = (process.returncode, out, err)
    return ended


def _no_objective(data: Path, folder: Path) -> dict[str, subprocess.Popen[str]]:
    """Settings and data that no objective can train with, each found before anything is made."""

    def attempt(name: str, at: Path = data, **changes: Any) -> subprocess.Popen[str]:
        return start([*CONFIG, *tiny(at, folder / "none" / name, **changes)])

    same = shutil.copytree(data / "train", folder / "same" / "train") / "tokenizer" / "dlm_tokenizer.json"
    same.write_text(json.dumps(json.loads(same.read_text()) | {"mask_id": load("bytes").eos_id}))
    tokens = np.full(200, 65)
    tokens[40] = load("bytes").mask_id
    masked = {"data__train__0__path": write_llmc(folder / "mask.bin", tokens), "data__tokenizer": "bytes"}
    table = {"objective__schedule": "table", "objective__schedule_points": "[0, 0.6, 0.4, 1]"}
    return {
        "blocks": attempt("blocks", objective__name="block", objective__block_lengths="[[0, 7]]"),
        "growing": attempt("growing", objective__name="wsd", objective__block_lengths="[[64, 2], [0, 3]]"),
        "falls": attempt("falls", **table),
        "flat": attempt("flat", objective__schedule="power", objective__schedule_exponent=0),
        "direction": attempt("direction", objective__name="card", model__direction="bidirectional"),
        "mask is eos": attempt("eos", folder / "same"),
        "mask in data": attempt("masked", **masked, data__sequence_length=32),
        "no bos": attempt("bos", objective__protected_tokens="[bos]"),
    }


def test_nothing_is_made_for_a_run_without_an_objective(mistakes, tmp_path_factory):
    assert not list(tmp_path_factory.getbasetemp().glob("mistakes*/none"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("key", "train.max_stps (3) is not a key: the nearest valid one is train.max_steps"),
        ("file", "nothing.yaml: there is no such file"),
        ("data", "nowhere/train does not exist; build it with `dlm data build`"),
        ("init_from", "cannot make the model: No model at"),
        ("exists", "already holds a run: add --resume auto, or choose another folder"),
        ("damaged", "step-2/model/model.safetensors has 100 bytes instead of"),
        ("port", "address already in use"),
        ("blocks", "objective: The block length 7 does not divide rows of 32 tokens."),
        ("growing", "objective: The block length 3 does not divide rows of 32 tokens."),
        (
            "falls",
            "objective.schedule_points is [0.0, 0.6, 0.4, 1.0]: expected shares that start with 0, rise everywhe",
        ),
        ("flat", "objective.schedule_exponent is 0: expected a number at least 0.5 and at most 20 or null"),
        ("direction", 'model.direction is "bidirectional": expected causal, since objective.name is card'),
        ("mask is eos", "the id 256 cannot be the mask of bytes"),
        ("mask in data", "mask.bin: token 40 is the id 257, which hides tokens and is in no text"),
        ("no bos", "This tokenizer has no token called bos (it knows eos, pad): give its id."),
    ],
)
def test_a_mistake_is_one_sentence(mistakes, name, words):
    status, out, err = mistakes[name]
    assert status == 2
    assert out == ""
    assert words in err
    assert err.count("pretrain: error: ") == 1
    assert len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    ("error", "words", "status"),
    [
        (OSError(28, "No space left on device", "x.bin"), "x.bin: No space left on device", 2),
        (RuntimeError("[x/pair.cc:5] Connection closed by peer [::1]:3"), "lost contact with another rank", 74),
    ],
)
def test_what_is_told_in_a_sentence(monkeypatch, capsys, error, words, status):
    def fail(options):
        raise error

    monkeypatch.setattr(pretrain, "_run", fail)
    monkeypatch.delenv("DLM_DEBUG", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert pretrain.main(["--config", "x.yaml"]) == status
    assert words in capsys.readouterr().err
    monkeypatch.setenv("DLM_DEBUG", "1")
    with pytest.raises(type(error)):
        pretrain.main(["--config", "x.yaml"])


@pytest.mark.parametrize("error", [RuntimeError("a shape is wrong"), ValueError("of ours"), KeyError("x")])
def test_our_own_faults_keep_their_traceback(monkeypatch, error):
    def fail(options):
        raise error

    monkeypatch.setattr(pretrain, "_run", fail)
    monkeypatch.delenv("DLM_DEBUG", raising=False)
    with pytest.raises(type(error)):
        pretrain.main(["--config", "x.yaml"])


def deepspeed(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Two ranks as a user starts them on a machine without a GPU; no variable says that it has none."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    command += ["--master_port", str(runs.free_port()), str(REPOSITORY / "launcher" / "pretrain.py"), *CONFIG]
    with open(log, "wb") as output:
        return subprocess.Popen(
            [*command, *arguments], env=environment(), stdout=output, stderr=subprocess.STDOUT, cwd=log.parent
        )


@pytest.mark.distributed
def test_all_ranks_together_tell_a_mistake_once(data, tmp_path):
    process = deepspeed([*tiny(data, tmp_path / "run", train__device="auto"), "train.max_stps=3"], tmp_path / "log")
    assert process.wait(timeout=300) == 2
    text = (tmp_path / "log").read_text()
    assert text.count("pretrain: error: ") == 1
    assert "Traceback" not in text


@pytest.mark.distributed
def test_a_rank_that_dies_ends_the_run_with_an_error(data, tmp_path):
    run = tmp_path / "run"
    process = deepspeed(tiny(data, run, train__max_steps=100_000, train__device="auto"), tmp_path / "log")
    deadline = time.monotonic() + 300
    while runs.last_step(run) < 2:
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (rank,) = [p for p in psutil.Process(process.pid).children(recursive=True) if "--local_rank=1" in p.cmdline()]
    rank.send_signal(signal.SIGKILL)
    assert process.wait(timeout=120) not in (0, None)
    assert "Traceback" not in (tmp_path / "log").read_text()
