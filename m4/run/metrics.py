"""The record of a run: metrics.jsonl, and its numbers in the other loggers."""

from __future__ import annotations

import io
import json
import logging
import os
from pathlib import Path
from typing import Any

from m4.config import TrainConfig
from m4.files import write_atomically
from m4.run.loggers import close_loggers, flat_figures, open_loggers, write_to_loggers

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends JSON lines. Those that cannot be written, on a full disk, wait in memory and go with the next ones."""

    def __init__(self, path: Path):
        self._path = path
        self._file = self._open()
        self._waiting = b""
        self._troubled = False

    def append(self, line: dict[str, Any]) -> None:
        """Write a line, now or later."""
        self._waiting += json.dumps(line).encode() + b"\n"
        try:
            self.flush()
        except OSError as error:
            if not self._troubled:
                log.warning("%s; lines wait in memory, at the latest until the next save", error)
            self._troubled = True
        else:
            if self._troubled:
                log.info("%s: can be written again, nothing is missing", self._path)
            self._troubled = False

    def flush(self) -> None:
        """Write what waits. Raises OSError naming the file."""
        try:
            if os.fstat(self._file.fileno()).st_nlink == 0:
                new = self._open()
                self._file.close()
                self._file = new
                log.warning("%s: was removed while this run wrote to it; a new one begins here", self._path)
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            reason = f"cannot be written: {error.strerror}; mend that and give the same command again to resume"
            raise OSError(error.errno, reason, str(self._path)) from error

    def _open(self) -> io.FileIO:
        return self._path.open("ab", buffering=0)  # says how many bytes it took

    def close(self) -> None:
        """Write what waits, or say how much is lost."""
        try:
            self.flush()
        except OSError as error:
            log.error("%s; %d lines since the last save are lost", error, self._waiting.count(b"\n"))
        finally:
            self._file.close()


class RunLog:
    """Writes one JSON object a line to ``metrics.jsonl`` and its numbers to the other loggers.

    Every line has ``kind`` (train or eval), ``step`` (finished optimiser steps) and ``tokens`` (millions of counted
    tokens). Lines after ``resumed_step`` (−1 for a fresh run) are dropped first: they are about to be written again.
    A logger that fails is left out; `metrics.jsonl` is whole at every checkpoint, or there is no checkpoint.

    Raises:
        ConfigError: a logger does not start.
        OSError: metrics.jsonl cannot be written.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, resumed_step: int):
        self._loggers = open_loggers(run_dir, config, resumed_step)
        try:
            truncate_metrics(run_dir / METRICS_FILE, resumed_step)
            self._file = MetricsFile(run_dir / METRICS_FILE)
        except BaseException:
            close_loggers(self._loggers)
            raise

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line; nested dicts of numbers become ``kind/key/inner`` in the other loggers."""
        self._file.append({"kind": kind, "step": step, **values})
        write_to_loggers(self._loggers, step, flat_figures(kind, values))

    def flush(self) -> None:
        """Make sure that every line is in ``metrics.jsonl``. Raises OSError naming it."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        close_loggers(self._loggers)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut short by a kill is left out. Raises ValueError naming a bad line."""
    # Cut at line feeds only: a name may hold other characters that `splitlines` cuts at.
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [_read_line(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after ``step``, at once or not at all."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        read = json.loads(line)
    except ValueError as error:
        reason = str(error)
    else:
        if isinstance(read, dict) and isinstance(read.get("step"), int):
            return read
        reason = "it has no step"
    raise ValueError(f"{where}: expected a JSON object with a step, got {line[:60]!r} ({reason}); delete that line")
