"""TensorBoard and Weights & Biases: started before any work, and left out when they fail during it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from m4.config import TrainConfig, config_to_dict
from m4.errors import ConfigError

log = logging.getLogger(__name__)


class Logger(Protocol):
    """Takes the figures of a run."""

    name: str

    def write(self, step: int, figures: dict[str, float]) -> None:
        """The figures of a step."""

    def close(self) -> None:
        """Flush and close."""

    def abandon(self) -> None:
        """It failed: leave it as it is, without waiting for anything."""


class TensorBoard:
    """Event files in the run directory."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path, resumed_step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is wanted

        # The writer's thread hands its error to the next call; without this it would also print a traceback.
        self._writer = SummaryWriter(str(run_dir), purge_step=resumed_step + 1)
        self._previous, threading.excepthook = threading.excepthook, self._thread_ended

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        try:
            self._writer.flush()  # raises what `close` would swallow
            self._writer.close()
        finally:
            self.abandon()

    def abandon(self) -> None:
        threading.excepthook = self._previous

    def _thread_ended(self, arguments: threading.ExceptHookArgs) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            self._previous(arguments)


class WeightsAndBiases:
    """A run of Weights & Biases, resumed under the same name."""

    name = "Weights & Biases"

    def __init__(self, run_dir: Path, config: TrainConfig):
        import wandb

        named = config.log.wandb_run_name
        self._run = wandb.init(
            project=config.log.wandb_project,
            entity=config.log.wandb_entity,
            name=config.run_name if named in (None, "auto") else named,
            id=config.run_name,
            resume="allow",
            dir=str(run_dir),
            config=config_to_dict(config),
        )

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()

    def abandon(self) -> None:
        pass


def open_loggers(run_dir: Path, config: TrainConfig, resumed_step: int) -> list[Logger]:
    """The loggers that the configuration asks for. Raises ConfigError with the remedy for one that does not start."""
    loggers: list[Logger] = []
    if config.log.tensorboard:
        loggers.append(
            _start(
                lambda: TensorBoard(run_dir, resumed_step),
                "log.tensorboard",
                "mend it (pip install --upgrade tensorboard)",
            )
        )
    if config.log.wandb:
        try:
            loggers.append(
                _start(
                    lambda: WeightsAndBiases(run_dir, config),
                    "log.wandb",
                    "pip install wandb, then wandb login (or WANDB_MODE=offline)",
                )
            )
        except BaseException:
            close_loggers(loggers)
            raise
    return loggers


def write_to_loggers(loggers: list[Logger], step: int, figures: dict[str, float]) -> None:
    """Write to each; one that fails is said once and taken off the list, for a run of hours is worth more."""
    for logger in list(loggers):
        try:
            logger.write(step, figures)
        except Exception as error:
            loggers.remove(logger)
            logger.abandon()
            log.warning(
                "%s failed at step %d (%s); training goes on without it, metrics.jsonl has every figure",
                logger.name,
                step,
                _reason(error),
            )


def close_loggers(loggers: list[Logger]) -> None:
    """Close each; what one could not write is said."""
    for logger in loggers:
        try:
            logger.close()
        except Exception as error:
            log.warning("%s may lack the last steps (%s); metrics.jsonl has every figure", logger.name, _reason(error))
    loggers.clear()


def _start(start: Callable[[], Logger], key: str, remedy: str) -> Logger:
    try:
        return start()
    except Exception as error:  # packages of others: whatever may be wrong with them is one line and a way on
        raise ConfigError(
            f"{key}: true, but it does not start: {_reason(error)}; {remedy}, or set {key}=false"
        ) from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def flat_figures(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """Numbers only; those of nested dicts as ``kind/key/inner``, however deep."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flat_figures(f"{kind}/{key}", value)
        elif isinstance(value, (int, float)):
            flat[f"{kind}/{key}"] = value
    return flat
