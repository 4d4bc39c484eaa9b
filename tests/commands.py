"""Running `dlm` commands in this process."""

from __future__ import annotations

from typing import Any

import pytest

from launcher import cli


def dlm(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


def mistake(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The sentence that a wrong command prints."""
    capsys.readouterr()
    assert dlm(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("dlm: error: ")
    assert output.err.count("\n") == 1
    return output.err
