"""Who may import whom, and how long files and functions may grow: read from the sources, nothing is imported.

Imports inside functions and under TYPE_CHECKING count like any other: who reads a module has to know what they name.
"""

import ast
import graphlib
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.runs import REPOSITORY

# From the ground up: a module imports its own room and rooms of earlier rows, no others. A room is a module or a
# package; where two fit, the longer name is meant.
ROOMS = [
    ["m4kernels"],
    ["m4"],  # the package itself, which imports nothing
    ["m4.errors", "m4.extras"],
    ["m4.config_values", "m4.distributed", "m4.schedule"],
    [
        "m4.config_keys",
        "m4.checkpoint_files",
        "m4.config_yaml",
        "m4.bars",
        "m4.files",
        "m4.modalities",
        "m4.device",
        "m4.pictures",
    ],
    ["m4.data", "m4.poses"],
    ["m4.data.synthetic"],
    ["m4.data.preparation"],
    ["m4.data.inspection", "m4.data.sample_set"],
    ["m4.model"],
    ["m4.compat"],
    ["m4.config"],
    ["m4.same_run", "m4.build"],
    ["m4.checkpoint"],
    ["m4.batches", "m4.run"],
    ["m4.cli", "m4.arguments", "m4.saved_run"],
    ["m4.generation"],
    ["m4.evaluation"],
    ["m4.training"],
    ["m4.train", "m4.evaluate", "m4.generate", "m4.plots", "m4.data.__main__", "m4.__main__"],
]
# (module, module it must not reach by any chain of imports): what trains must not need what prepares.
APART = [
    (module, prepares)
    for module in ("m4.data.store", "m4.train")
    for prepares in ("m4.data.preparation", "m4.data.synthetic", "m4.data.inspection")
]
PICTURES_NEED = {"numpy", "PIL", "matplotlib"}
FILE_LINES, FUNCTION_LINES = 400, 80
# Longer on purpose: a kernel is one function to Triton, and these hold one loop over tiles each.
LONG_FUNCTIONS = {
    "m4kernels.ops.cross_modal_attention.triton_kernels.forward_kernel",
    "m4kernels.ops.cross_modal_attention.triton_kernels.grad_q_kernel",
    "m4kernels.ops.cross_modal_attention.triton_kernels.grad_kv_kernel",
    "m4kernels.ops.mask_tokens.triton_kernels.fill_kernel",
}
# Known faults of today, which others are mending; each goes when its mending comes.
BEING_MENDED = {
    ("m4kernels.ops.mask_tokens.make_tables", "m4kernels.ops.mask_tokens.tables"),
}
LONG_FUNCTIONS_BEING_MENDED: set[str] = set()


def sources_of(root: Path) -> dict[str, Path]:
    """Dotted name → file of every module of m4kernels and m4 below a folder; a package goes by its folder's name."""
    found = {}
    for path in sorted(path for package in ("m4", "m4kernels") for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """All that a module imports, by full names; ``from a import b`` is ``a.b`` where that is one of ``modules``."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{source}.{alias.name}" if f"{source}.{alias.name}" in modules else source)
    return found


def graph_of(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Module → the modules of ours that it imports."""
    return {
        name: {other for other in imports_of(name, path, modules) if other in modules} - {name}
        for name, path in modules.items()
    }


@cache
def sources() -> dict[str, Path]:
    return sources_of(REPOSITORY)


@cache
def graph() -> dict[str, set[str]]:
    return {
        name: {other for other in others if (name, other) not in BEING_MENDED}
        for name, others in graph_of(sources()).items()
    }


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def room_of(name: str) -> tuple[int, str]:
    """(row, room) of a module."""
    fitting = [
        (row, room)
        for row, rooms in enumerate(ROOMS)
        for room in rooms
        if (name == room if room == "m4" else inside(name, room))
    ]
    assert fitting, f"{name} is in no room: give it a place in ROOMS of {Path(__file__).name}"
    return max(fitting, key=lambda place: len(place[1]))


def upward(graph: dict[str, set[str]]) -> list[str]:
    """The imports that go up, or across to a room of the same row."""
    wrong = []
    for name, imported in graph.items():
        row, room = room_of(name)
        for other in imported:
            other_row, other_room = room_of(other)
            if other_room != room and other_row >= row:
                wrong.append(f"{name} imports {other}")
    return sorted(wrong)


def reached(graph: dict[str, set[str]], start: str) -> dict[str, list[str]]:
    """Every module that is imported with ``start``, packages of modules too → the chain that leads there."""
    chains = {start: [start]}
    waiting = [start]
    while waiting:
        name = waiting.pop(0)
        parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
        for other in sorted(((graph[name] | parents) & set(graph)) - set(chains)):
            chains[other] = [*chains[name], other]
            waiting.append(other)
    return chains


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports, [] where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def functions_of(name: str, path: Path) -> dict[str, int]:
    """module.function → its lines, with decorators, docstring and inner functions; the longest of one name."""
    lines: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            function = f"{name}.{node.name}"
            lines[function] = max(lines.get(function, 0), (node.end_lineno or first) - first + 1)
    return lines


def test_every_room_is_there():
    rooms = [room for row in ROOMS for room in row]
    assert len(set(rooms)) == len(rooms)
    assert [room for room in rooms if room not in sources()] == []


def test_imports_go_down():
    assert upward(graph()) == []


def test_no_circles():
    assert circle(graph()) == []


@pytest.mark.parametrize(("start", "room"), APART)
def test_training_does_not_reach_preparation(start, room):
    assert [" → ".join(chain) for name, chain in reached(graph(), start).items() if inside(name, room)] == []


def test_pictures_need_little():
    allowed = PICTURES_NEED | sys.stdlib_module_names
    for name, path in sources().items():
        if inside(name, "m4.pictures"):
            imported = {i for i in imports_of(name, path, sources()) if (name, i) not in BEING_MENDED}
            assert {i for i in imported if i.split(".")[0] not in allowed and not inside(i, "m4.pictures")} == set(), (
                name
            )


def test_no_name_of_the_standard_library():
    """Such a module shadows the library's for whoever runs a file of its folder."""
    assert [name for name in sources() if name.rpartition(".")[2] in sys.stdlib_module_names] == []


def test_files_are_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in sources().items()}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_functions_are_short():
    lengths: dict[str, int] = {}
    for name, path in sources().items():
        lengths |= functions_of(name, path)
    exceptions = LONG_FUNCTIONS | LONG_FUNCTIONS_BEING_MENDED
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES and name not in exceptions} == {}
    assert [name for name in LONG_FUNCTIONS if lengths.get(name, 0) <= FUNCTION_LINES] == []  # no longer needed


def package(root: Path, **files: str) -> dict[str, set[str]]:
    """The graph of a package m4 with these modules (``a__b`` is a/b.py)."""
    for name, text in {"__init__": "", **files}.items():
        path = root / "m4" / (name if name == "__init__" else name.replace("__", "/"))
        path = path.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return graph_of(sources_of(root))


def test_what_is_seen_of_imports(tmp_path):
    """Relative, in functions, for types only, of a package's module: all are seen."""
    seen = package(
        tmp_path,
        errors="import os.path, m4.files",
        files="def f():\n    from m4 import device\n    from m4.run import state",
        device="if TYPE_CHECKING:\n    from .errors import ConfigError",
        run__state="from ..files import x\nfrom .. import device",
    )
    assert seen == {
        "m4": set(),
        "m4.errors": {"m4.files"},
        "m4.files": {"m4.device", "m4.run.state"},
        "m4.device": {"m4.errors"},
        "m4.run.state": {"m4.files", "m4.device"},
    }
    assert set(circle(seen)) >= {"m4.errors", "m4.files", "m4.device"}
    assert upward(seen) == ["m4.errors imports m4.files", "m4.files imports m4.device", "m4.files imports m4.run.state"]
    assert reached(seen, "m4.run.state")["m4.errors"] == ["m4.run.state", "m4.device", "m4.errors"]


def test_what_counts_as_a_function(tmp_path):
    path = tmp_path / "file.py"
    path.write_text("class A:\n    @x\n    def f(self):\n        def g(): ...\n\n\nclass B:\n    def f(self): ...\n")
    assert functions_of("file", path) == {"file.f": 3, "file.g": 1}
