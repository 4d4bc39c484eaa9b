"""What a process notes of being asked to end."""

import os
import signal
import subprocess
import sys
import time

import pytest

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


def test_a_second_signal_ends_the_process_at_once():
    program = (
        "import time\n"
        "from dlm_dist.training.stop_requests import StopRequest\n"
        "with StopRequest(None):\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
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
