"""`python -m benchmarks.precision`: the losses of a recipe in bf16 beside those in fp32, step by step.

Trains the same samples under the same seed twice, in OUT/runs. OUT/precision.json has both losses of every step, the
largest difference in per cent, command and machine; OUT/precision.png is the picture. The status is 1 where a step's
losses differ by more than `--within` per cent.
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

DTYPES = ("fp32", "bf16")


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


def differences(fp32: list[float], bf16: list[float]) -> list[float]:
    """|bf16 - fp32| / fp32 of every step, in per cent.

    Raises:
        ConfigError: the runs have not the same number of steps.
    """
    if len(fp32) != len(bf16) or not fp32:
        raise ConfigError(f"the runs took {len(fp32)} and {len(bf16)} steps; remove the runs, and start again")
    return [100 * abs(half - full) / full for full, half in zip(fp32, bf16, strict=True)]


def picture(fp32: list[float], bf16: list[float], percent: list[float]) -> Figure:
    """Losses over steps, and their difference below."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = range(1, len(fp32) + 1)
    for name, values in zip(DTYPES, (fp32, bf16), strict=True):
        above.plot(steps, values, lw=1, label=name)
    above.set_ylabel("loss (nats a token)")
    above.legend()
    below.plot(steps, percent, lw=1, color="C3")
    below.set_ylabel("difference (%)")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def compare(path: Path, steps: int, out: Path, settings: list[str]) -> dict[str, Any]:
    """Train both, and say what they did.

    Raises:
        ConfigError: a setting cannot be run, or a run did not end well.
    """
    found = {}
    for dtype in DTYPES:
        ours = [f"dtype={dtype}", "log.every=1", f"stop_after_steps={steps}", f"output_dir={out / 'runs'}"]
        overrides = [*settings, *ours, f"run_name={dtype}"]
        config = resolve_paths(load_config(path, overrides)[0])
        status = execute([sys.executable, "-m", "m4.train", "--config", str(path), *overrides])
        if status:
            raise ConfigError(f"the run in {dtype} ended with status {status}; what it said is above")
        found[dtype] = losses(config.run_dir)
    percent = differences(found["fp32"], found["bf16"])
    return {"losses": found, "difference_percent": percent, "largest_percent": max(percent)}


def main() -> int:
    """Train, compare, write; 0 where all differences are within the bound."""
    arguments = _arguments()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    result = compare(arguments.config, arguments.steps, out, arguments.set)
    command = shlex.join([python_command(), "-m", "benchmarks.precision", *sys.argv[1:]])
    body = {"command": command, "environment": machine(), **result}
    write_atomically(out / "precision.json", (json.dumps(body, indent=1) + "\n").encode())
    fp32, bf16 = (result["losses"][dtype] for dtype in DTYPES)
    write_atomically(out / "precision.png", figure_bytes(picture(fp32, bf16, result["difference_percent"]), ".png"))
    largest = result["largest_percent"]
    mean = sum(result["difference_percent"]) / len(fp32)
    print(
        f"{len(fp32)} steps: bf16 is {mean:.2f} % off fp32 on average, {largest:.2f} % at most; last losses "
        f"{fp32[-1]:.4f} (fp32), {bf16[-1]:.4f} (bf16); {out / 'precision.png'}"
    )
    return int(not math.isfinite(largest) or largest > arguments.within)


def _arguments() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m benchmarks.precision", description="Train in fp32 and in bf16, and compare the losses."
    )
    parser.add_argument("--config", type=Path, required=True, help="the recipe, such as M4-tiny.yaml")
    parser.add_argument("--steps", type=whole(1), default=200, help="of each run (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the results")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of both runs")
    within = "per cent that losses may differ (default %(default)s)"
    parser.add_argument("--within", type=float, default=1.0, metavar="PERCENT", help=within)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
