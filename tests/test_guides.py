"""The guides do what they say: the op of docs/add-an-op.md, pasted into a copy of the package, passes its tests; links
lead somewhere; every room is named.

The compiled backend is left out, since building it takes minutes.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.targets import HAS_TRITON
from tests.runs import REPOSITORY
from tests.test_architecture import ROOMS

DOCS = REPOSITORY / "docs"
# A block under a file's name is the whole file; a block under "in `file`" is lines to add.
BLOCK = re.compile(r"^(in )?`([\w/.]+)`[^\n]*\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#:]+)(?:#[^)]*)?\)")


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


@pytest.mark.parametrize("path", [*REPOSITORY.glob("*.md"), *DOCS.glob("*.md")], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = [link for link in LINK.findall(CODE.sub("", path.read_text())) if not link.startswith("http")]
    assert [link for link in links if not (path.parent / link).exists()] == []
