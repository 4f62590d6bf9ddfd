"""Cross-entropy of a model on a split under fixed masks, beside the training set's unigram distribution."""

from __future__ import annotations

import argparse
from pathlib import Path

from m4.cli import run_command
from m4.errors import ConfigError
from m4.evaluation.report import evaluate_run, report_table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m m4.evaluate", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory, for example runs/M4-tiny")
    parser.add_argument("--split", help="split to evaluate (default: the run's evaluation split)")
    parser.add_argument("--device", help="cpu, cuda or auto (default: as the run was configured)")
    arguments = parser.parse_args()
    if not arguments.run.is_dir():
        raise ConfigError(f"--run: {arguments.run} is not a run directory")
    print(report_table(evaluate_run(arguments.run, arguments.split, arguments.device)))
    return 0


if __name__ == "__main__":
    run_command(main)
