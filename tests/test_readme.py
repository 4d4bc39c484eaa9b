"""The README's commands are commands of this version, and its configuration is one."""

import re
import shlex
from pathlib import Path

import pytest

from dlm_dist.config import load_config
from launcher.cli import build_parser
from launcher.pretrain import parse_arguments

ROOT = Path(__file__).resolve().parent.parent


def _blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def _commands(page: str) -> list[str]:
    return [line.strip() for kind, block in _blocks(page) if not kind for line in block.splitlines() if line.strip()]


BLOCKS, COMMANDS = _blocks("README.md"), _commands("README.md")


@pytest.mark.parametrize("command", [c for c in [*COMMANDS, *_commands("docs/slurm.md")] if c.startswith("dlm ")])
def test_dlm_commands_parse(command):
    assert callable(build_parser().parse_args(shlex.split(command)[1:]).run)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "launcher/pretrain.py" in c])
def test_pretrain_commands_parse(command):
    words = shlex.split(command)
    options = parse_arguments(words[words.index("launcher/pretrain.py") + 1 :])
    assert options.config == Path("my.yaml")
    assert all("=" in override for override in options.overrides)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {command.split("#")[0].split()[1] for command in COMMANDS if command.startswith("make ")}
    assert {"demo", "test", "install"} <= named <= targets


def test_the_configuration_loads(tmp_path):
    (text,) = [block for kind, block in BLOCKS if kind == "yaml"]
    path = tmp_path / "my.yaml"
    path.write_text(text)
    assert load_config(path).model.backbone == "rwkv7"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target
    assert not re.findall(r"\{[A-Z_]+\}", text)
