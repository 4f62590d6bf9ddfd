"""A plug-in of pytest: the tests that matter most first, those that compile last, and what failed into the records.

python -m pytest -p benchmarks.gpu.pytest_records --records FOLDER …
"""

import re
import time
from pathlib import Path

import pytest

from benchmarks.gpu.folder import Folder

FIRST = re.compile(r"masks_of_100_000|test_step_cuda|test_repeats")
LAST = re.compile(r"compile|opcheck|fullgraph|dynamo|torch_compile", re.IGNORECASE)


def rank(nodeid: str) -> int:
    """Where a test comes: masks and the step at the beginning, what compiles at the end."""
    if LAST.search(nodeid):
        return 2
    return 0 if FIRST.search(nodeid) else 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", help="the folder of a GPU session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: rank(item.nodeid))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--records") is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporter(Folder(Path(config.getoption("--records")), "tests")), "m4-gpu-records")


EVERY = 5.0  # seconds between numbers so far: what is interrupted may not get to say the last ones


class Reporter:
    """In the process that hears of all tests: keeps failures at once, and numbers now and then."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._start, self._said = folder, time.monotonic(), time.monotonic()
        self._counts = {"passed": 0, "failed": 0, "skipped": 0}
        self._collected = 0
        self._slow: list[tuple[float, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = report.longreprtext.splitlines()[-25:]
            self._folder.append("test", test=report.nodeid, when=report.when, seconds=report.duration, lines=lines)
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self._counts[report.outcome] += 1
            self._slow.append((report.duration, report.nodeid))
        if time.monotonic() - self._said > EVERY:
            self._say("so far")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            lines = report.longreprtext.splitlines()[-25:]
            self._folder.append("test", test=report.nodeid, when="collect", seconds=0.0, lines=lines)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        whole = sum(self._counts.values()) == self._collected
        self._say("all" if whole else f"ended early with status {int(exitstatus)}")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._collected = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._collected = len(ids)

    def _say(self, how_far: str) -> None:
        self._said = time.monotonic()
        slowest = [(round(seconds, 2), test) for seconds, test in sorted(self._slow, reverse=True)[:15]]
        seconds = self._said - self._start
        numbers = {"collected": self._collected, **self._counts}
        self._folder.append("tests", **numbers, how_far=how_far, seconds=seconds, slowest=slowest)
