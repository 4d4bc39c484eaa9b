"""What a process notes of being asked to end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dlm_dist.training import stop_requests
from dlm_dist.training.stop_requests import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopRequest(None) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == signal.Signals(number).name
        os.kill(os.getpid(), number)  # its echo, as launchers send it, ends nothing
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_hours_run_out():
    stop = StopRequest(1e-5)
    assert stop.reason is None
    time.sleep(0.05)
    assert stop.reason == "train.max_hours = 1e-05 have passed"


def test_slurm_repeats_its_signals_and_the_rank_goes_on_to_its_checkpoint(monkeypatch):
    monkeypatch.setattr(stop_requests, "_ECHO_SECONDS", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with StopRequest(None) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGUSR1"


def test_a_signal_that_came_too_early_waits():
    """launcher/node.py blocks it in its ranks: they may still import torch when the time limit comes near."""
    program = (
        "import os, signal\n"
        "from dlm_dist.training.stop_requests import StopRequest\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "with StopRequest(None) as stop:\n"
        "    print(stop.reason)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "SIGUSR1\n", done


def test_a_second_signal_ends_the_process_at_once():
    program = (
        "import time\n"
        "from dlm_dist.training.stop_requests import StopRequest\n"
        "with StopRequest(None):\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.1)\n"
    )
    plain = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=plain)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(2.5)
        assert process.poll() is None, "the first one is only noted"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.stdout.close()
