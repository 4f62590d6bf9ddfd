"""Arguments of the commands, checked before any work: each mistake is one line that names the argument."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from m4.config_values import shortened, shown
from m4.device import DEVICE_NAMES
from m4.errors import ConfigError
from m4.files import writable_file


class CommandParser(argparse.ArgumentParser):
    """argparse, whose mistakes are raised as ConfigError instead of printed below the usage.

    prog: ``python -m m4.NAME``; where the console script runs the command (`m4.__main__`) its help says ``m4 NAME``.
    """

    def __init__(self, *, prog: str | None = None, **options: Any) -> None:
        script = (prog or "").replace("python -m m4.", "m4 ")
        super().__init__(prog=script if script == sys.argv[0] else prog, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def whole(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """A ``type`` for argparse: a whole number in lowest … highest."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {shown(text)}") from None
        if value < lowest or (highest is not None and value > highest):
            raise argparse.ArgumentTypeError(f"expected {_span(lowest, highest)}, got {shortened(text)}")
        return value

    return parse


def number(lowest: float, highest: float | None = None) -> Callable[[str], float]:
    """A ``type`` for argparse: a finite number in lowest … highest."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {shown(text)}") from None
        if not math.isfinite(value) or value < lowest or (highest is not None and value > highest):
            expected = f"a finite number, {_span(lowest, highest)}"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {shortened(text)}")
        return value

    return parse


def _span(lowest: float, highest: float | None) -> str:
    return f"at least {lowest}" if highest is None else f"{lowest} … {highest}"


def run_directory(text: str) -> Path:
    """A ``type`` for argparse: the folder of a run, with checkpoints or metrics in it."""
    path = Path(text)
    expected = "expected a run directory such as runs/M4-tiny"
    if not text or not os.path.exists(path):
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}, which is not there")
    if not os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{expected}, got the file {text}")
    for folder in (path, path / "checkpoints"):
        if os.path.exists(folder) and not os.access(folder, os.R_OK | os.X_OK):
            raise argparse.ArgumentTypeError(f"{expected}, got {text}: {folder} may not be read (permissions)")
    if not any((path / name).exists() for name in ("checkpoints", "metrics.jsonl", "config.yaml")):
        inside = sorted(str(entry) for entry in path.iterdir() if (entry / "checkpoints").is_dir())
        hint = f"; perhaps one of {', '.join(inside[:5])}" if inside else ""
        raise argparse.ArgumentTypeError(f"{expected}, got {text}, which holds no run{hint}")
    return path


def existing_folder(text: str) -> Path:
    """A ``type`` for argparse: a folder that is there and can be read."""
    path = Path(text)
    if not text or not os.path.isdir(path):
        found = "not there" if not text or not os.path.exists(path) else "a file"
        raise argparse.ArgumentTypeError(f"expected a folder, got {text!r}, which is {found}")
    if not os.access(path, os.R_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"expected a folder, got {text}, which may not be read (permissions)")
    return path


def check_picture_path(argument: str, path: Path, endings: Sequence[str]) -> None:
    """Make sure that a picture can be written to ``path``, whose folder is made if need be.

    Raises:
        ConfigError: naming ``argument``; the ending is none of ``endings``, the path is a folder, or not writable.
    """
    if os.path.isdir(path):
        raise ConfigError(f"{argument}: expected a file to write, got the folder {path}")
    if path.suffix.lower() not in endings:
        raise ConfigError(f"{argument}: expected a name that ends in {', '.join(endings)}, got {str(path)!r}")
    try:
        writable_file(path)
    except OSError as error:
        raise ConfigError(f"{argument}: {path} cannot be written: {error.strerror}") from error


def add_saved_run(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that reads a run: which, which of its checkpoints, on what data, where."""
    parser.add_argument("--run", type=run_directory, required=True, help="run directory, for example runs/M4-tiny")
    which = "checkpoint folder, or best: of lowest evaluation loss (default: the run's newest)"
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help=which)
    parser.add_argument("--data", type=existing_folder, metavar="ROOT", help="data root (default: the run's own)")
    parser.add_argument("--split", help="split of the data (default: the run's evaluation split)")
    parser.add_argument("--device", help=f"{DEVICE_NAMES} (default: as the run was configured)")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of a run with ema above 0")
