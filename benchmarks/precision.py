"""`python -m benchmarks.precision`: the losses of a recipe in bf16 beside those in fp32, step by step.

Trains the same samples under the same seed three times, in OUT/runs: in fp32, in bf16, and as a control in fp32 with a
learning rate that is CONTROL times as large: what any small change grows to, since training amplifies differences.
OUT/precision.json has the losses of every step, their differences from fp32 in per cent, command and machine;
OUT/precision.png is the picture. The status is 1 where a step's losses in bf16 and fp32 differ by more than `--within`
per cent.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.ablation import execute
from benchmarks.results import machine
from m4.arguments import CommandParser, whole
from m4.cli import python_command, run_command
from m4.config import load_config
from m4.errors import ConfigError
from m4.files import write_atomically
from m4.pictures.curves import figure_bytes
from m4.run.directory import resolve_paths
from m4.run.metrics import METRICS_FILE, read_metrics

CONTROL = 1 + 1e-4
RUNS = {"fp32": ("fp32", 1.0), "bf16": ("bf16", 1.0), "control": ("fp32", CONTROL)}  # dtype, times the learning rate


def losses(folder: Path) -> list[float]:
    """The loss of every step of a run.

    Raises:
        ConfigError: a step is missing, or its loss is not finite.
    """
    lines = [line for line in read_metrics(folder / METRICS_FILE) if line.get("kind") == "train"]
    found = [line["loss"] for line in lines]
    if [line["step"] for line in lines] != list(range(1, len(lines) + 1)) or None in found:
        raise ConfigError(f"{folder / METRICS_FILE} does not have a finite loss of every step; remove that run")
    return found


def differences(fp32: list[float], other: list[float]) -> list[float]:
    """|other - fp32| / fp32 of every step, in per cent.

    Raises:
        ConfigError: the runs have not the same number of steps.
    """
    if len(fp32) != len(other) or not fp32:
        raise ConfigError(f"the runs took {len(fp32)} and {len(other)} steps; remove the runs, and start again")
    return [100 * abs(loss - full) / full for full, loss in zip(fp32, other, strict=True)]


def picture(found: dict[str, list[float]], percent: dict[str, list[float]]) -> Figure:
    """Losses over steps, and their differences from those in fp32 below."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = range(1, len(found["fp32"]) + 1)
    for name in ("fp32", "bf16"):
        above.plot(steps, found[name], lw=1, label=name)
    above.set_ylabel("loss (nats a token)")
    said = {"bf16": "bf16", "control": f"fp32, learning rate x {CONTROL}"}
    for (name, values), color in zip(percent.items(), ("C3", "0.5"), strict=True):
        below.plot(steps, values, lw=1, color=color, label=said[name])
    below.set_ylabel("difference (%)")
    below.set_xlabel("step")
    largest = max(max(values) for values in percent.values())
    below.set_ylim(0, 1.4 * largest or 1)  # with room for the legend
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right", ncols=2)
    return figure


def compare(path: Path, steps: int, out: Path, settings: list[str]) -> dict[str, Any]:
    """Train them all; `losses` of every run, `difference_percent` of those that are not fp32 itself.

    Raises:
        ConfigError: a setting cannot be run, or a run did not end well.
    """
    lr = load_config(path, settings)[0].lr
    found = {}
    for name, (dtype, times) in RUNS.items():
        ours = [f"dtype={dtype}", f"lr={lr * times}", "log.every=1", f"stop_after_steps={steps}"]
        overrides = [*settings, *ours, f"output_dir={out / 'runs'}", f"run_name={name}"]
        config = resolve_paths(load_config(path, overrides)[0])
        status = execute([sys.executable, "-m", "m4.train", "--config", str(path), *overrides])
        if status:
            raise ConfigError(f"the run {name} ended with status {status}; what it said is above")
        found[name] = losses(config.run_dir)
    percent = {name: differences(found["fp32"], values) for name, values in found.items() if name != "fp32"}
    return {"losses": found, "difference_percent": percent}


def main() -> int:
    """Train, compare, write; 0 where all differences of bf16 are within the bound."""
    arguments = _arguments()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    result = compare(arguments.config, arguments.steps, out, arguments.set)
    command = shlex.join([python_command(), "-m", "benchmarks.precision", *sys.argv[1:]])
    body = {"command": command, "environment": machine(), **result}
    write_atomically(out / "precision.json", (json.dumps(body, indent=1) + "\n").encode())
    found, percent = result["losses"], result["difference_percent"]
    write_atomically(out / "precision.png", figure_bytes(picture(found, percent), ".png"))
    for name, values in percent.items():
        mean, largest, above = sum(values) / len(values), max(values), sum(value > arguments.within for value in values)
        print(
            f"{name}: {mean:.2f} % off fp32 in the mean of {len(values)} steps, {largest:.2f} % at most, {above} steps "
            f"above {arguments.within:g} %; last loss {found[name][-1]:.4f} (fp32 {found['fp32'][-1]:.4f})"
        )
    print(out / "precision.png")
    largest = max(percent["bf16"])
    return int(not math.isfinite(largest) or largest > arguments.within)


def _arguments() -> argparse.Namespace:
    description = "Train in fp32, in bf16 and for a control, and compare the losses."
    parser = CommandParser(prog="python -m benchmarks.precision", description=description)
    parser.add_argument("--config", type=Path, required=True, help="the recipe, such as M4-tiny.yaml")
    parser.add_argument("--steps", type=whole(1), default=200, help="of each run (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the results")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of both runs")
    within = "per cent that losses may differ (default %(default)s)"
    parser.add_argument("--within", type=float, default=1.0, metavar="PERCENT", help=within)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
