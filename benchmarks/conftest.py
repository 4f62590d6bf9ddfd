"""Options, parametrisation and the final table of `pytest benchmarks/`."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.device import ON_GPU
from benchmarks.gpu.folder import Folder
from benchmarks.guard import FLOORS
from benchmarks.results import RESULTS, Session

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("m4 benchmarks")
    group.addoption(
        "--save-results", action="store_true", help="write what was measured to benchmarks/results/<machine>/"
    )
    group.addoption(
        "--results-dir", type=Path, default=RESULTS, help="where --save-results writes; default %(default)s"
    )
    group.addoption(
        "--records", type=Path, help="add each figure at once to the records of this folder of a GPU session"
    )
    group.addoption("--update-floors", action="store_true", help="set the floors of the guards from what is measured")


def pytest_configure(config: pytest.Config) -> None:
    records = config.getoption("--records")
    config.stash[_SESSION] = Session() if records is None else Session(keep=Folder(records, "benchmarks").append)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = getattr(metafunc.module, "SUITE", None)
    if suite is None or "suite" not in metafunc.fixturenames:
        return
    second = "provider" if "provider" in metafunc.fixturenames else "pair"
    values: list[Any] = []
    choices: list[tuple[Any, str]]
    for name, case in suite.cases.items():
        if not (case.gpu if ON_GPU else case.cpu):
            continue
        if second == "provider":
            choices = [(p, p) for p in suite.providers if p not in case.without]
        else:
            choices = [(pair, " over ".join(pair)) for pair in suite.guards if not set(pair) & set(case.without)]
        for value, label in choices:
            marks = [pytest.mark.full] if not ON_GPU and (case.full or value in suite.long) else []
            values.append(pytest.param(suite, name, value, id=f"{name}-{label}", marks=marks))
    metafunc.parametrize(("suite", "case", second), values)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long list runs only when `-m` asks for it."""
    if config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if not item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=long)


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[_SESSION]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    measured = config.stash[_SESSION]
    if not measured.records and not measured.speedups:
        return
    terminalreporter.section("m4 benchmarks")
    for line in measured.table():
        terminalreporter.write_line(line)
    if ON_GPU and measured.speedups and not FLOORS.exists():
        terminalreporter.write_line(
            f"NOT GUARDED: no floors are committed for this GPU ({FLOORS.name}), so speed-ups were only reported; "
            "`pytest benchmarks/ --update-floors` makes that file"
        )
    if config.getoption("--save-results"):
        terminalreporter.write_line(f"saved to {measured.save(config.getoption('--results-dir'))}")
