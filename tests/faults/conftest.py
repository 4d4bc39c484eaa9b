"""One data set and one report for the whole campaign; the report is printed behind the tests."""

import os
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.faults.report import Report

REPORT = pytest.StashKey[Report]()


def pytest_configure(config):
    config.stash[REPORT] = Report(Path(os.environ.get("FAULTS_REPORT", "faults-report.json")).resolve())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    result = yield
    if result.failed and item.get_closest_marker("faults"):
        item.config.stash[REPORT].failed.append(item.name)
    return result


def pytest_terminal_summary(terminalreporter, config):
    report = config.stash[REPORT]
    if report.chains or report.cases or report.failed:
        terminalreporter.write_sep("=", f"fault campaign, written to {report.path}")
        terminalreporter.write_line(report.write())


@pytest.fixture(scope="session")
def report(request):
    return request.config.stash[REPORT]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return runs.build_data(tmp_path_factory.mktemp("data"))
