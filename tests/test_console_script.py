"""The console script ``m4``: the commands of ``python -m m4.X``, by one name."""

import re
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import m4.__main__ as script
from tests.runs import REPOSITORY, environment

tomllib = pytest.importorskip("tomllib")  # of Python 3.11


def m4(*arguments: str, cwd=REPOSITORY) -> subprocess.CompletedProcess:
    """``m4 arguments`` as a shell runs it, by the entry point that pyproject.toml names."""
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    entry = EntryPoint("m4", scripts["m4"], "console_scripts")
    program = f"import sys; sys.argv[0] = '/somewhere/bin/m4'; from {entry.module} import {entry.attr}; {entry.attr}()"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment(), timeout=120)


def test_help_names_every_command_without_loading_one():
    done = m4("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in script.COMMANDS:
        assert re.search(rf"^  {name} +\w", done.stdout, re.MULTILINE)
    code = "import sys, m4.__main__ as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True).returncode == 0


def test_nothing_typed_is_a_mistake():
    done = m4()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: m4 COMMAND")


@pytest.mark.parametrize("name", list(script.COMMANDS))
def test_help_of_a_command_is_that_of_the_module(name):
    """Same options; only the name of the program differs."""
    module = {"kernels": "m4kernels"}.get(name, f"m4.{name}")
    done = m4(name, "--help")
    plain = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=REPOSITORY, capture_output=True, text=True, env=environment()
    )
    assert (done.returncode, done.stderr, plain.returncode) == (0, "", 0)
    assert done.stdout.startswith(f"usage: m4 {name} [-h]")
    assert plain.stdout.startswith(f"usage: python -m {module} [-h]")

    assert done.stdout.replace(f"m4 {name}", "").split() == plain.stdout.replace(f"python -m {module}", "").split()


def test_help_of_a_part_of_a_command():
    done = m4("data", "pack", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: m4 data pack [-h]")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["trian"],
            "error: m4: expected train, data, evaluate, generate, plots, kernels, got 'trian'; did you mean train?",
        ),
        (["--verbose"], "got '--verbose' (see m4 --help)"),
        (["generate"], "error: the following arguments are required: --run, --out (see m4 generate --help)"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, said):
    done = m4(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert said in done.stderr


def test_a_command_runs(tmp_path):
    """From any folder, with its own arguments and status."""
    done = m4("data", "synth", "--out", str(tmp_path / "videos"), "--videos", "1", "--frames", "2", cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"1 videos in {tmp_path / 'videos'}\n"


def test_version():
    from m4kernels import __version__

    assert m4("--version").stdout == f"m4 {__version__}\n"
