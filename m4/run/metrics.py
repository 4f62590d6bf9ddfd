"""The record of a run: metrics.jsonl, TensorBoard events, Weights & Biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m4.config import TrainConfig, config_to_dict
from m4.errors import ConfigError
from m4.files import write_atomically

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Writes one JSON object a line to ``metrics.jsonl`` and its numbers to the other loggers.

    Every line has ``kind`` (train or eval), ``step`` (finished optimiser steps) and ``tokens`` (millions of counted
    tokens). Lines after ``resumed_step`` (−1 for a fresh run) are dropped first: they are about to be written again.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, resumed_step: int):
        self._path = run_dir / METRICS_FILE
        truncate_metrics(self._path, resumed_step)
        self._file = self._path.open("a")
        self._tensorboard = None
        self._wandb = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is wanted

            self._tensorboard = SummaryWriter(str(run_dir), purge_step=resumed_step + 1)
        if config.log.wandb:
            self._wandb = _start_wandb(run_dir, config)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line; nested dicts of numbers become ``kind/key/inner`` in the other loggers."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        flat = {}
        for key, value in values.items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            flat.update({f"{kind}/{key}/{name}".rstrip("/"): v for name, v in inner if isinstance(v, (int, float))})
        if self._tensorboard is not None:
            for name, value in flat.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


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


def _start_wandb(run_dir: Path, config: TrainConfig) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("log.wandb: true needs the package wandb: pip install wandb, or log.wandb=false") from None
    name = config.run_name if config.log.wandb_run_name in (None, "auto") else config.log.wandb_run_name
    return wandb.init(
        project=config.log.wandb_project,
        entity=config.log.wandb_entity,
        name=name,
        id=config.run_name,
        resume="allow",
        dir=str(run_dir),
        config=config_to_dict(config),
    )
