"""What an installation brings: requirements of wheels and editable installs, and a line where an extra is missing."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from m4.extras import MissingExtra, extra
from tests.runs import environment

REPOSITORY = Path(__file__).resolve().parents[1]
# Module → package, where the names differ.
PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image"}
METADATA = """\
Metadata-Version: 2.4
Name: m4kernels
Requires-Dist: torch>=2.10
Requires-Dist: m4kernels[data]; extra == "train"
Requires-Dist: pyyaml>=6.0; extra == "train"
Requires-Dist: pillow>=10.1; extra == "data"
Requires-Dist: triton>=3.6; platform_system == "Linux" and extra == "data"
Requires-Dist: ruff>=0.9; extra == "dev"

Requires-Dist: of the description; extra == "train"
"""


def backend():
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("backend", REPOSITORY / ".ci" / "backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_editable_install_requires_its_extras_and_those_they_are_made_of(monkeypatch):
    before, _, body = METADATA.partition("\n\n")
    found = backend().required(METADATA, ["train"])
    assert found.startswith(before)
    assert found.endswith(f"\n\n{body}")
    assert found[len(before) : -len(body) - 2].split("\n") == [
        "",
        "Requires-Dist: pyyaml>=6.0",
        "Requires-Dist: pillow>=10.1",
        'Requires-Dist: triton>=3.6; platform_system == "Linux"',
    ]
    monkeypatch.chdir(REPOSITORY)
    assert backend().editable_extras() == ["benchmarks"]


def test_all_that_is_imported_is_required():
    """m4kernels by itself needs torch and numpy; Triton and what makes its tables are for who asks for them."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

    def names(requirements):
        return {re.match(r"[\w-]+", one)[0].lower() for one in requirements}

    extras = {name: names(what) for name, what in project["optional-dependencies"].items()}
    core = names(project["dependencies"])
    assert core == {"torch", "numpy"}
    assert _imported("m4kernels") <= core | extras["triton"] | {"mpmath"}
    optional = {"transformers", "huggingface_hub", "wandb"}
    assert _imported("m4") <= core | extras["data"] | extras["train"] | optional | {"m4kernels"}
    assert _imported("m4/data") <= core | extras["data"] | optional | {"m4kernels"}


def _imported(package):
    found = set()
    for path in (REPOSITORY / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return {PACKAGES.get(name, name) for name in found - set(sys.stdlib_module_names) - {"m4", "m4kernels"}}


def test_a_missing_extra_is_named():
    said = r"^no_such_package is not installed, .*pip install 'm4kernels\[train\]'$"
    with pytest.raises(MissingExtra, match=said), extra("train"):
        import no_such_package  # noqa: F401
    with extra("train"):
        import math

    assert math.pi > 3


@pytest.mark.parametrize(
    ("command", "missing", "name"),
    [
        (["-m", "m4.data"], "tqdm", "train"),
        (["-m", "m4.train"], "yaml", "train"),
        (["-m", "m4", "evaluate"], "yaml", "train"),
    ],
)
def test_a_command_without_it_ends_with_one_line(tmp_path, command, missing, name):
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('No module', name={missing!r})")
    path = environment()["PYTHONPATH"] if "PYTHONPATH" in environment() else str(REPOSITORY)
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        env=environment() | {"PYTHONPATH": f"{tmp_path}:{path}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {missing} is not installed, which m4 needs: pip install 'm4kernels[{name}]'\n"


def test_the_smoke_test_of_wheels_passes_here():
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tests" / "smoke.py"],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")
