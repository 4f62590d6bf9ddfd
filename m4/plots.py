"""Loss curves of a run, from its metrics.jsonl: ``python -m m4.plots --run runs/NAME [--out curve.png]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from m4.cli import run_command
from m4.errors import ConfigError
from m4.pictures.curves import loss_curves


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m m4.plots", description="Draw the loss curves of a run.")
    parser.add_argument("--run", type=Path, required=True, help="run directory, for example runs/M4-tiny")
    parser.add_argument("--out", type=Path, help="picture to write (default: loss.png in the run directory)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.run / "loss.png"
    if not arguments.run.is_dir():
        raise ConfigError(f"--run: {arguments.run} is not a run directory")
    figure = loss_curves(arguments.run)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    run_command(main)
