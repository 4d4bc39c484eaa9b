"""What setup.py declares agrees with the constraints, the imports and the files of the project."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("dlm_dist", "data_pipeline", "launcher")


@pytest.fixture
def declared(monkeypatch) -> dict[str, Any]:
    """The arguments that setup.py gives to setuptools.setup."""
    caught: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: caught.update(arguments))
    monkeypatch.chdir(REPOSITORY)
    runpy.run_path(str(REPOSITORY / "setup.py"))
    return caught


@pytest.fixture
def constraints() -> dict[str, Version]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        versions[canonicalize_name(pin.name)] = Version(specifier.version)
    assert len(versions) == len(pins)
    return versions


def test_every_requirement_has_a_lower_bound_and_a_tested_version(declared, constraints):
    requirements = [Requirement(text) for text in declared["install_requires"] + declared["extras_require"]["test"]]
    for requirement in requirements:
        assert any(specifier.operator == ">=" for specifier in requirement.specifier), requirement
        assert constraints[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_an_upper_bound_says_why(declared):
    lines = (REPOSITORY / "setup.py").read_text().splitlines()
    bounded = [text for text in declared["install_requires"] if "<" in text]
    assert bounded
    for text in bounded:
        place = next(i for i, line in enumerate(lines) if f'"{text}"' in line)
        assert lines[place - 1].strip().startswith("# Below "), text


def test_no_constraint_names_a_local_build(constraints):
    assert [name for name, version in constraints.items() if version.local] == []


def test_make_installs_the_torch_of_the_constraints(constraints):
    (pin,) = re.findall(r"^TORCH \?= torch==(\S+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert Version(pin) == constraints["torch"]


def test_every_import_is_a_declared_requirement(declared):
    allowed = {canonicalize_name(Requirement(text).name) for text in declared["install_requires"]}
    distributions = importlib.metadata.packages_distributions()
    missing = set()
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            for name in _imported(ast.parse(path.read_text())):
                if name in sys.stdlib_module_names or name in PACKAGES:
                    continue
                if not allowed & {canonicalize_name(owner) for owner in distributions.get(name, [name])}:
                    missing.add((name, str(path.relative_to(REPOSITORY))))
    assert missing == set()


def _imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_every_folder_with_code_is_a_package(declared):
    folders = {path.parent for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")}
    assert {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders} == set(declared["packages"])
    assert (REPOSITORY / "dlm_dist" / declared["package_data"]["dlm_dist"][0]).exists()


def test_the_console_script_exists(declared):
    (script,) = declared["entry_points"]["console_scripts"]
    entry = importlib.metadata.EntryPoint(*script.split(" = "), group="console_scripts")
    assert entry.name == "dlm"
    assert callable(entry.load())


def test_ci_is_make_test():
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text().splitlines()
    assert lines[-1] == "make test"
    assert "set -euo pipefail" in lines


def test_licence_and_changelog(declared):
    licence = (REPOSITORY / declared["license_files"][0]).read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert re.search(r"Copyright \d{4} dlm_dist authors", licence)
    assert "## [Unreleased]" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_no_module_of_the_launcher_hides_one_of_the_standard_library() -> None:
    """`deepspeed launcher/pretrain.py` puts launcher/ in front of the path."""
    launcher = Path(__file__).parents[1] / "launcher"
    assert not {path.stem for path in launcher.glob("*.py")} & set(sys.stdlib_module_names)
