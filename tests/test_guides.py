"""The guides do what they say: the op of docs/add-an-op.md, pasted into a copy of the package, passes its tests; every
room is named.

The compiled backend is left out, since building it takes minutes.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.ops.targets import HAS_TRITON
from tests.runs import REPOSITORY
from tests.test_architecture import ROOMS

DOCS = REPOSITORY / "docs"
# A block under a file's name is the whole file; a block under "in `file`" is lines to add.
BLOCK = re.compile(r"^(in )?`([\w/.]+)`[^\n]*\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(guide: str) -> list[tuple[bool, str, str]]:
    """(whether it is lines to add, file, text) of every block of a guide."""
    return [(bool(added), name, text) for added, name, text in BLOCK.findall((DOCS / guide).read_text())]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the op's tests need, without the extension, with the op of the guide."""
    root = tmp_path_factory.mktemp("guide") / "repository"
    ours = shutil.ignore_patterns("_C*", "__pycache__")
    for folder in ("m4kernels", "tests/ops"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=ours)
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    op = root / "m4kernels/ops/token_shift"
    op.mkdir()
    (op / "__init__.py").touch()
    for added, name, text in blocks("add-an-op.md"):
        if name.startswith("csrc/") or name == "tests/ops/test_repeats.py":
            continue
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.read_text() + text if added else text)
    return root


def run(scratch: Path, *command: str) -> str:
    """What a command says in the copy, where it must succeed."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(scratch), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], cwd=scratch, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_op_of_the_guide_passes_its_tests(scratch: Path) -> None:
    said = run(scratch, "-m", "pytest", "-q", "-k", "not cpp and not threads", "tests/ops/test_token_shift.py")
    passed = int(re.findall(r"(\d+) passed", said)[0])
    assert passed >= (55 if HAS_TRITON else 30), said


def test_the_report_lists_the_op_of_the_guide(scratch: Path) -> None:
    said = run(scratch, "-m", "m4kernels")
    assert re.search(r"^token_shift\n  cuda +no: this op has no such backend yet$", said, re.MULTILINE), said
    assert re.search(r"^  reference +yes$", said.split("token_shift")[1], re.MULTILINE), said


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of csrc/ with the files and lines of both guides."""
    root = tmp_path_factory.mktemp("sources")
    shutil.copytree(REPOSITORY / "csrc", root / "csrc")
    shutil.copy(REPOSITORY / ".clang-format", root)
    for added, name, text in blocks("add-an-op.md") + blocks("add-a-backend.md"):
        path = root / name
        if added and name == "csrc/common/bind.h":
            path.write_text(path.read_text().replace("\n}  // namespace m4k\n", f"{text}\n}}  // namespace m4k\n"))
        elif name.startswith("csrc/") and not added:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return root


def test_kernels_of_the_guides_compile(sources: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    pybind11 = pytest.importorskip("pybind11")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler with OpenMP")
    files = sorted(str(path) for path in (sources / "csrc/token_shift").glob("*.cpp"))
    assert len(files) == 4
    flags = "-std=c++20 -fopenmp -fsyntax-only -Wall -Wextra -Werror -Wno-psabi -Icsrc"
    defined = "-DM4K_X86=0 -DM4K_CUDA=1 -DM4K_SIMD_PORTABLE"
    folders = [f"-I{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    done = subprocess.run(
        [compiler, *flags.split(), *defined.split(), *folders, *files], cwd=sources, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_kernels_of_the_guides_are_formatted(sources: Path) -> None:
    pytest.importorskip("clang_format")
    files = [str(path) for path in (sources / "csrc/token_shift").iterdir()]
    program = "from clang_format import clang_format; clang_format()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--dry-run", "--Werror", *files], cwd=sources, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_code_of_the_guides_is_formatted(tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    for guide in ("add-an-op.md", "add-a-backend.md"):
        for added, name, text in blocks(guide):
            if name.endswith(".py") and not added:
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    ours = ("--config", "lint.isort.known-first-party=['benchmarks', 'm4kernels', 'tests']")
    for command in (("check", *ours), ("format", "--check")):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("guide", ["add-an-op.md", "add-a-backend.md"])
def test_lines_are_added_to_files_that_are_there(guide: str) -> None:
    new = {name for added, name, _ in blocks("add-an-op.md") if not added}
    assert [name for added, name, _ in blocks(guide) if added and not (REPOSITORY / name).is_file()] == []
    assert [name for name in new if (REPOSITORY / name).exists()] == []  # the example stays out of the repository


def test_architecture_names_every_room() -> None:
    table = (DOCS / "architecture.md").read_text().split("| room |")[1].split("\n\n")[0]
    named = re.findall(r"`([\w/]+)`", "\n".join(row.split("|")[1] for row in table.splitlines()[1:]))
    rooms = [room.removeprefix("m4.") for row in ROOMS for room in row if room.startswith("m4.")]
    assert sorted(name.rstrip("/").replace("/", ".") for name in named) == sorted(rooms)
