"""The stages of a session, and how long each may take: on a GPU 540 seconds in all, without one their rehearsal.

The order is that of what is worth most if the machine is taken away: how fast the card is, whether the kernels run at
all and are right, the training step and what it is made of, then its parts, then proofs, then everything else.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu.folder import RECORDS, Folder, records_of
from benchmarks.gpu.runner import Stage
from benchmarks.measure import believe

SECONDS = 540.0
# Name of a stage that is a function of ours → module and function.
FUNCTIONS = {
    "speed": "speed.run",
    "every op": "ops.run",
    "step": "steps.forms",
    "compiled step": "steps.compiled",
    "kernel table": "steps.tables",
    "products": "products.run",
    "peers": "peers.run",
    "sweeps": "sweeps.run",
    "training": "training.run",
    "memcheck": "tools.memcheck",
    "racecheck": "tools.racecheck",
    "counters": "tools.counters",
}
OFFLINE = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_ROOT_USER_ACTION": "ignore"}
TEST_SECONDS = 40  # that one test may take
WORKERS = 12  # processes of tests; each holds a context of its own on the GPU
STEP_TESTS = "tests/training/test_step.py"
LONG = "training_step and not ompiled and not Flex and not generation and not frame"  # measured elsewhere, or little


def run_function(name: str, folder: Path) -> int:
    """Run a stage that is a function of ours; 1 if a part of it failed."""
    module, function = FUNCTIONS[name].split(".")
    found: Callable[[Folder], None] = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    records = Folder(folder, name)
    believe_what_is_known(folder)
    found(records)
    for failure in records.failures:
        print(f"FAILED: {failure}")
    return 1 if records.failures else 0


def believe_what_is_known(folder: Path) -> None:
    """How fast the machine is at best, as an earlier stage of the session measured it."""
    known = [r for r in records_of(folder) if "products_gigaflops" in r] if (folder / RECORDS).exists() else []
    if known:
        rates = {name: rate * 1e9 for name, rate in known[-1]["products_gigaflops"].items()}
        believe(known[-1]["copy_gigabytes_per_second"] * 1e9, rates)


def build_stages(python: str, seconds: float) -> list[Stage]:
    """With CUDA; where that fails, with whatever can be built; then without."""
    pip = (python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", ".")
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    # Without nvcc, or with one that does not take the sources, Triton's kernels and those of the CPU still run.
    without = Stage("build without CUDA", pip, seconds, environment={"M4KERNELS_CUDA": "0", **OFFLINE})
    settings = {"M4KERNELS_CUDA": "1", "M4KERNELS_CUDA_ARCHS": arch, **OFFLINE}
    return [Stage("build", pip, seconds, environment=settings, otherwise=without)]


def test_command(python: str, out: Path, *selected: str) -> tuple[str, ...]:
    """pytest over tests, on many processes where pytest-xdist is."""
    command: tuple[str, ...] = (python, "-m", "pytest", "-p", "no:cacheprovider")
    command += ("-p", "benchmarks.gpu.pytest_records")
    command += ("--records", str(out), "-q", "-rfE", "--continue-on-collection-errors")
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ("-o", f"timeout={TEST_SECONDS}")
    if importlib.util.find_spec("xdist") is not None and workers() > 1:
        command += ("-n", str(workers()))
    return (*command, *selected)


def workers() -> int:
    return min(WORKERS, max(1, (os.cpu_count() or 1) - 2))


def stages_of(gpu: bool, out: Path, python: str = sys.executable) -> list[Stage]:
    """The session."""

    def ours(name: str, seconds: float, most: float = 0.0, optional: bool = False, **environment: str) -> Stage:
        command = (python, "-m", "benchmarks.gpu", "--stage", name, "--out", str(out))
        return Stage(name, command, seconds, most, environment, optional)

    report = Stage("report", (python, "-m", "m4kernels"), 15)
    bench = (python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "benchmarks", "--records", str(out))
    threads = {"OMP_NUM_THREADS": "2"}
    if not gpu:
        return rehearsal(ours, report, out, python, bench)
    return [
        ours("speed", 20, 30),
        *build_stages(python, 60),
        replace(report, seconds=12, most=20),
        ours("every op", 60, 90),
        ours("step", 45, 75),
        ours("compiled step", 45, 110),
        ours("kernel table", 25, 40),
        ours("products", 18, 35),
        ours("peers", 40, 75),
        ours("sweeps", 26, 60, optional=True),
        Stage("tests", test_command(python, out, "-m", "cuda", "tests"), 80, 140, threads),
        ours("training", 25, 50),
        ours("memcheck", 40, 90),
        ours("counters", 20, 60),
        ours("racecheck", 12, 60, optional=True),
        # In turns with the peer, as ratios are compared; what they say that was not said before.
        Stage("speed-ups", (*bench, "-k", f"guard and not {LONG}"), 12, 150, optional=True),
    ]


def rehearsal(ours: Callable[..., Stage], report: Stage, out: Path, python: str, bench: tuple[str, ...]) -> list[Stage]:
    """The same stages with small inputs; tests are collected in whole, so that a broken import or mark shows."""
    dry = (python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--dry-run", "-e", ".")
    uncompiled = {"TORCHDYNAMO_DISABLE": "1"}  # compiling takes a minute of a CPU, and is tested elsewhere
    small = "test_time and (sample or small) and cpp and not training_step"
    return [
        ours("speed", 60),
        Stage("build", dry, 120, environment=OFFLINE),
        replace(report, seconds=60),
        ours("every op", 120),
        ours("step", 120),
        ours("compiled step", 120, **uncompiled),
        ours("kernel table", 60),
        ours("products", 60),
        ours("peers", 120, **uncompiled),
        ours("sweeps", 60),
        Stage("tests", test_command(python, out, "-m", "cuda", "tests"), 240),
        Stage("step tests", test_command(python, out, STEP_TESTS, "-k", "recorded or nothing_reads"), 120),
        ours("training", 120),
        ours("memcheck", 60),
        ours("counters", 60),
        ours("racecheck", 60),
        Stage("speed-ups", (*bench, "-k", small), 240),
    ]
