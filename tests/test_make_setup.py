"""`make setup` in folders of any name, and where the virtual environment is half there; pip itself is a stand-in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = ["my projects", "it's (a&b); #1 100%", 'say "hi" `id` \\n', "a|b<c>*?[d]~!", "Übung:=@", "5 $ $5 $$"]
# Takes note of what it is asked; has no pip until ensurepip brought it.
VENV_PYTHON = """#!/bin/sh
here=$(dirname "$0")
echo "$*" >> "$here/log"
case "$*" in
*ensurepip*) [ ! -e "$here/no-ensurepip" ] || { echo "No module named ensurepip" >&2; exit 1; }; touch "$here/pip" ;;
"-m pip"*) [ -e "$here/pip" ] ;;
esac
"""
BASE_PYTHON = """#!/bin/sh
[ "$1 $2" = "-m venv" ] || exit 9
[ -z "$NO_VENV" ] || { echo "ensurepip is not available" >&2; exit 1; }
mkdir -p "$3/bin"
cp "$(dirname "$0")/venv-python" "$3/bin/python"
touch "$3/bin/pip"
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def checkout(root: Path) -> Path:
    for name in ("Makefile", ".ci/setup", "pyproject.toml", "setup.py", "constraints.txt", "m4kernels/_sources.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    (root / "csrc").mkdir()
    program(root / "a python" / "venv-python", VENV_PYTHON)
    program(root / "a python" / "python3", BASE_PYTHON)
    return root


def setup(
    root: Path, venv: str | None = None, python: str | None = None, **settings: str
) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV", "MAKEFLAGS")}
    environment["PYTHON"] = python or str(root / "a python" / "python3")
    if venv is not None:
        environment["VENV"] = venv
    return subprocess.run(["make", "setup"], cwd=root, env=environment | settings, capture_output=True, text=True)


def asked(root: Path, venv: str = ".venv") -> list[str]:
    """What the Python of the virtual environment was asked since the last time."""
    log = root / venv / "bin" / "log"
    lines = [line for line in log.read_text().splitlines() if line != "-m pip --version"]
    log.write_text("")
    return lines


INSTALLS = [
    "-m pip install --quiet --disable-pip-version-check -c constraints.txt torch",
    "-m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[dev]",
]


@pytest.mark.parametrize("name", NAMES)
def test_folders_may_have_any_name(tmp_path: Path, name: str) -> None:
    root = checkout(tmp_path / name)
    for venv in (None, "", name):
        done = setup(root, venv)
        assert done.returncode == 0, done.stderr
        assert asked(root, venv or ".venv") == (INSTALLS if venv != "" else [])  # set but empty: .venv again
    (root / "csrc" / "new.h").touch()
    os.utime(root / "csrc" / "new.h", (2**31, 2**31))
    assert setup(root).returncode == 0
    assert asked(root) == INSTALLS  # for there are newer sources


def test_python_may_be_a_command(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    done = setup(root, python="env UNUSED=1 './a python/python3'")
    assert done.returncode == 0, done.stderr
    assert asked(root) == INSTALLS


def test_a_virtual_environment_without_pip_gets_it(tmp_path: Path) -> None:
    """An interrupted `python -m venv` leaves one, and so does `uv venv`."""
    root = checkout(tmp_path)
    program(root / ".venv" / "bin" / "python", VENV_PYTHON)
    done = setup(root)
    assert done.returncode == 0, done.stderr
    assert asked(root) == ["-m ensurepip --upgrade", *INSTALLS]


def test_what_cannot_be_mended_is_told_in_a_line(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    done = setup(root, NO_VENV="1")
    assert done.returncode != 0
    assert "error: `" in done.stderr
    assert "failed: mend that (Debian, Ubuntu: apt install python3-venv), or name another Python" in done.stderr
    program(root / ".venv" / "bin" / "python", VENV_PYTHON)
    (root / ".venv" / "bin" / "no-ensurepip").touch()
    done = setup(root)
    assert done.returncode != 0
    assert "error: ./.venv has no pip" in done.stderr
    assert "apt install python3-venv" in done.stderr
    (root / ".venv" / "bin" / "python").unlink()
    (root / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    done = setup(root)
    assert done.returncode != 0
    assert "error: the Python that ./.venv was made with is gone: remove that folder" in done.stderr


def test_a_failed_install_leaves_no_stamp(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    failing = VENV_PYTHON.replace('"-m pip"*)', '*-e*) exit 1 ;;\n"-m pip"*)')
    program(root / "a python" / "venv-python", failing)
    assert setup(root).returncode != 0
    assert asked(root) == INSTALLS
    assert setup(root).returncode != 0
    assert asked(root) == INSTALLS


def test_a_real_virtual_environment_without_pip(tmp_path: Path) -> None:
    """The recovery, with Python's own modules; what it installs then is nothing."""
    root = checkout(tmp_path / "my projects")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=root, check=True)
    (root / ".venv" / ".installed").touch()
    done = setup(root)
    if "No module named ensurepip" in done.stderr:
        pytest.skip("this Python has no ensurepip")
    assert done.returncode == 0, done.stderr
    subprocess.run([root / ".venv" / "bin" / "python", "-m", "pip", "--version"], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["my $HOME", "a{b}"])
def test_environments_that_setuptools_cannot_take_are_refused_at_once(tmp_path: Path, name: str) -> None:
    root = checkout(tmp_path / name)
    done = setup(root)
    assert done.returncode != 0
    assert f"error: setuptools cannot install into {root}/" in done.stderr
    assert not (root / ".venv").exists()
    assert setup(root, str(tmp_path / "elsewhere")).returncode == 0
    assert asked(tmp_path, "elsewhere") == INSTALLS


@pytest.mark.parametrize(("compiler", "given"), [("c++", ""), ("g++", ""), ("clang++", ""), ("my c++", "my c++")])
def test_sanitize_takes_any_compiler(tmp_path: Path, compiler: str, given: str) -> None:
    program(tmp_path / "bin" / compiler, "#!/bin/sh\necho /libraries/$1\n")
    program(tmp_path / "venv" / "bin" / "python", '#!/bin/sh\necho "asked with $LD_PRELOAD"\n')
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    environment = {"PATH": str(tmp_path / "bin"), "VENV": "venv", "PYTHON": sys.executable}
    command = [shutil.which("make") or "make", "-o", "setup", "sanitize"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | ({"CXX": given} if given else {}), capture_output=True, text=True
    )
    libraries = " ".join(f"/libraries/-print-file-name={name}.so" for name in ("libasan", "libubsan"))
    assert f"asked with {libraries}" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "emulated", "folder"),
    [
        (["sanitize"], "0", "build/sanitized"),
        (["sanitize", "EMULATE=1"], "1", "build/sanitized-emulated"),
        (["emulate"], "1", "build/emulated"),
    ],
)
def test_the_tests_take_the_extension_that_was_built_for_them(
    tmp_path: Path, words: list[str], emulated: str, folder: str
) -> None:
    program(tmp_path / "bin" / "c++", "#!/bin/sh\necho\n")
    asking = '#!/bin/sh\necho "emulated=$M4KERNELS_EMULATE_AVX512 path=$PYTHONPATH" "$@"\n'
    program(tmp_path / "venv" / "bin" / "python", asking)
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    environment = {"PATH": str(tmp_path / "bin"), "VENV": "venv", "PYTHON": sys.executable}
    command = [shutil.which("make") or "make", "-o", "setup", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    builds, tests = (line for line in done.stdout.splitlines() if line.startswith("emulated="))
    assert builds.startswith(f"emulated={emulated} ")
    assert f"--build-lib {folder} " in builds
    assert f" path={folder} " in tests
    assert f"pythonpath={folder} " in tests
