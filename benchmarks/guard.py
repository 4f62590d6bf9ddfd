"""Guards: a kernel must stay faster than a baseline by the factor that `floors.yaml` commits to."""

import re
from pathlib import Path

import torch
import yaml

from benchmarks.device import ON_GPU
from benchmarks.measure import Run, alternate


def floors_file() -> Path:
    """`floors.yaml` for CPUs; each GPU has a file of its own, `floors-<name>.yaml`, once it was measured."""
    if not ON_GPU:
        return Path(__file__).with_name("floors.yaml")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return Path(__file__).with_name(f"floors-{name}.yaml")


FLOORS = floors_file()
HEADER = """\
# Speed-up over a baseline (baseline's time / kernel's time, medians, measured in turns in one process) below which
# `pytest benchmarks/` fails. To update: `pytest benchmarks/ -k <op> --update-floors`, then commit with the reason.
"""
# Floors are set this far below what is measured: the spread of the ratio on a busy machine.
MARGIN = 0.75


class GuardError(AssertionError):
    """A kernel fell below its floor."""


def load(path: Path = FLOORS) -> dict[str, float]:
    """Floors by name; empty when the file does not exist."""
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def save(floors: dict[str, float], path: Path = FLOORS) -> None:
    path.write_text(HEADER + yaml.safe_dump(floors, sort_keys=True))


def speedup(kernel: Run, baseline: Run, *, seconds: float, clock: bool = True) -> float:
    """Baseline's median time over the kernel's; `clock` as in `measure.alternate`."""
    medians = alternate({"kernel": kernel, "baseline": baseline}, seconds=seconds, clock=clock)
    return medians["baseline"] / medians["kernel"]


def check(
    name: str,
    kernel: Run,
    baseline: Run,
    *,
    path: Path = FLOORS,
    update: bool = False,
    seconds: float = 1.0,
    clock: bool = True,
    on_gpu: bool = ON_GPU,
) -> float:
    """Measure the speed-up and hold it against its floor; measured once more, for longer, before it counts as fallen.

    Args:
        name: of the floor, "op/case/kernel over baseline".
        kernel, baseline: do the same work.
        path: the file of the floors.
        update: set the floor from the measurement instead.
        seconds: of measuring.
        clock: as in `measure.alternate`.
        on_gpu: a GPU whose file does not exist has no floors yet: the speed-up is only reported.

    Returns:
        The speed-up.

    Raises:
        GuardError: the floor is missing, or the speed-up is below it.
    """
    measured = speedup(kernel, baseline, seconds=seconds, clock=clock)
    floors = load(path)
    if update:
        floors[name] = float(f"{measured * MARGIN:.2g}")
        save(floors, path)
        return measured
    how = f"`pytest benchmarks/ -k {name.split('/')[0]} --update-floors`, then commit {path.name} with the reason"
    if on_gpu and not path.exists():
        return measured
    if name not in floors:
        raise GuardError(f"{name}: no floor in {path.name} (measured {measured:.2f}x). Set it: {how}")
    if measured < floors[name]:
        measured = speedup(kernel, baseline, seconds=3 * seconds, clock=clock)
    if measured < floors[name]:
        raise GuardError(
            f"{name}: measured {measured:.2f}x, floor {floors[name]}x. The kernel became slower, or the baseline "
            f"faster; if that is meant, update the floor: {how}"
        )
    return measured
