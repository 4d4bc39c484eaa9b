"""What a person sees on a terminal."""

import contextlib
import io
import pty
import re
import sys

import pytest
from rich.console import Console as Terminal

from dlm_dist.training.console import Console
from dlm_dist.training.progress_display import ProgressDisplay
from tests.training.test_metrics import EVALUATION, RECORD


def test_the_bar_has_the_newest_figures_and_lines_stay_above_it():
    terminal = Terminal(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    display = ProgressDisplay(start=4, total=10, terminal=terminal)
    display.step(5, ["loss 3.2500", "MFU 12.0 %"])
    display.line("step 5  sample: '[bold]no markup[/bold]'")
    display.step(6, ["loss 3.1250", "MFU 13.0 %"])
    display.close()
    text = terminal.file.getvalue()
    assert "step 5  sample: '[bold]no markup[/bold]'" in text
    last = text[text.rindex("step  ") :]
    assert " 6/10 " in last
    assert "left" in last
    assert "loss 3.1250   MFU 13.0 %" in last
    # The cursor stays visible while the bar is drawn: a process that is killed could not bring it back.
    assert text.count("\x1b[?25l") == 1
    assert text.index("\x1b[?25l") < text.index("\x1b[?25h") < text.index("no markup")


def whole(reader: int) -> str:
    """What went through a terminal whose other end is closed."""
    text = b""
    with open(reader, "rb", buffering=0) as file, contextlib.suppress(OSError):
        while part := file.read(1 << 16):
            text += part
    return text.decode()


@pytest.mark.parametrize("dumb", [False, True])
def test_a_terminal_gets_the_bar_and_a_dumb_one_plain_lines(monkeypatch, dumb):
    reader, writer = pty.openpty()
    monkeypatch.setenv("TERM", "dumb" if dumb else "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with open(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        console = Console(0, 10, every=1)
        console.step({"step": 1, **RECORD})
        console.evaluation({"step": 1, **EVALUATION})
        console.step({"step": 2, **RECORD, "skipped": True, "skip_reason": "the loss is a spike"})
        console.rolled_back(2, 1, "a spike")
        console.close(finished=True)
    text = whole(reader)
    assert "step 1  held-out bound 3.5000 nats/token  1.2500 bits/byte" in text
    assert "(skipped: the loss is a spike; data positions 0 to 7)" in text
    assert ("step 1/10  loss 2.5000" in text) == dumb
    assert ("\x1b[" in text) == (not dumb)
    # The bar stands behind the last line, at the step that the run went back to.
    assert ("  1/10" in re.sub(r"\x1b\[[0-9;]*m", "", text[text.rindex("back to the checkpoint") :])) == (not dumb)
