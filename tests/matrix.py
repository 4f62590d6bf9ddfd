"""`python -m tests.matrix`: the tests in fresh virtual environments, with the oldest and with the newest versions.

- oldest: of every direct dependency the series that pyproject's range begins with, at its last patch;
- newest: what pip brings.

Each environment gets a copy of the working tree, so that the extension built here stays as it is. Printed at the end,
as Markdown: a row for each environment with its versions and how many tests passed, failed and were skipped. The exit
status is 1 where a test failed or an environment could not be made. Arguments that are not its own go to pytest.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ("oldest", "newest")
SHOWN = ("torch", "triton", "numpy", "scipy", "scikit-image", "pillow", "tensorboard", "matplotlib", "pytest")


def floors(requirements: Iterable[str]) -> list[str]:
    """Constraints such as "numpy==1.26.*": where the range of each requirement that holds here begins."""
    found = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate():
            found += [f"{requirement.name}=={s.version}.*" for s in requirement.specifier if s.operator == ">="]
    return found


def requirements_of(project: Path, extra: str = "dev") -> list[str]:
    """Of the package and of an extra, as pyproject.toml names them, with the extras that this is made of."""
    table = tomllib.loads((project / "pyproject.toml").read_text())["project"]

    def of_extra(name: str) -> Iterator[str]:
        for requirement in table["optional-dependencies"][name]:
            inner = Requirement(requirement)
            if inner.name == table["name"]:
                for one in sorted(inner.extras):
                    yield from of_extra(one)
            else:
                yield requirement

    return [*table["dependencies"], *of_extra(extra)]


def copy_working_tree(to: Path) -> None:
    """What git tracks, as it stands, and beside it a link to the real data that some tests read."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, to / name)
    if (REPOSITORY.parent / "shared").is_dir():
        (to.parent / "shared").symlink_to(REPOSITORY.parent / "shared")


def make(environment: str, folder: Path, python: str) -> Path:
    """A fresh virtual environment with the package in it; its Python.

    Raises:
        subprocess.CalledProcessError: pip found no versions that fit together, or the extension does not compile.
    """
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "source"
    copy_working_tree(source)
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    own = folder / "venv" / "bin" / "python"
    command = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", ".[dev]"]
    if environment == "oldest":
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(floors(requirements_of(source))) + "\n")
        command += ["-c", constraints]
    subprocess.run(command, cwd=source, check=True)
    return own


def versions(python: Path) -> dict[str, str]:
    """Of the packages in an environment, and "python"."""
    command = [python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    own = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
    return {"python": own} | {package["name"].lower(): package["version"] for package in listed}


def run_tests(python: Path, folder: Path, arguments: Sequence[str]) -> dict[str, str]:
    """Passed, failed and skipped tests, minutes, and the exit status of pytest."""
    report, begin = folder / "report.xml", time.monotonic()
    command = [python, "-m", "pytest", "-q", "-o", "timeout=1200", f"--junitxml={report}", *arguments]
    status = subprocess.run(command, cwd=folder / "source").returncode
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    if report.exists():
        suite = next(ElementTree.parse(report).iter("testsuite"))
        counts = {name: int(suite.get(name, "0")) for name in counts}
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": str(counts["tests"] - failed - counts["skipped"]),
        "failed": str(failed),
        "skipped": str(counts["skipped"]),
        "minutes": f"{(time.monotonic() - begin) / 60:.0f}",
        "status": str(status),
    }


def table(rows: Sequence[dict[str, str]]) -> str:
    """As Markdown."""
    columns = ("environment", "python", *SHOWN, "passed", "failed", "skipped", "minutes")
    lines = [columns, ("---",) * len(columns), *(tuple(row.get(name, "-") for name in columns) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ENVIRONMENTS, help="one environment; default both")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "matrix", help="where they are made anew")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments; default this one")
    options, tests = parser.parse_known_args(arguments)
    os.environ.pop("PYTHONPATH", None)
    rows, broken = [], False
    for environment in [options.only] if options.only else ENVIRONMENTS:
        folder = options.folder.resolve() / environment
        try:
            python = make(environment, folder, options.python)
        except subprocess.CalledProcessError as error:
            print(f"{environment}: {' '.join(map(str, error.cmd))} failed; see above", file=sys.stderr)
            rows, broken = [*rows, {"environment": f"{environment}: not made"}], True
            continue
        rows.append({"environment": environment} | versions(python) | run_tests(python, folder, tests))
        broken |= rows[-1]["status"] != "0"
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
