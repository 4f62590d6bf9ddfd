"""Where the time of training steps goes: seconds a step, those spent on its data, and model FLOP utilisation."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from m4.model.config import ModelConfig
from m4.model.flops import training_flop

T = TypeVar("T")


class StepMeter:
    """Adds up what happens between two calls of `figures`.

    Args:
        model: what is trained.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._peak: float | None = None
        self._begin()

    def start(self, peak: float) -> None:
        """Begin anew.

        Args:
            peak: FLOP a second that all devices of the run reach together.
        """
        self._peak = peak
        self._begin()

    def _begin(self) -> None:
        self._since, self._apart, self._data = time.perf_counter(), 0.0, 0.0
        self._steps, self._flop = 0, 0.0
        self._counted = True  # whether the targets of all these steps are known

    @contextmanager
    def data(self) -> Iterator[None]:
        """Around what makes the data of a step."""
        start = time.perf_counter()
        yield
        self._data += time.perf_counter() - start

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, made while they are asked for, as `data`."""
        left = iter(items)
        while True:
            with self.data():
                item = next(left, None)
            if item is None:
                return
            yield item

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Around what is no part of a step: evaluations and saves."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._apart += time.perf_counter() - start

    def step(self, valid_tokens: int, targets: Sequence[int] | None) -> None:
        """Count a step of all ranks.

        Args:
            valid_tokens: visible tokens and targets.
            targets: (M,) of each modality; None where that is not known.
        """
        self._steps += 1
        self._counted &= targets is not None
        if targets is not None:
            self._flop += training_flop(self._model, valid_tokens - sum(targets), targets)

    def figures(self) -> dict[str, Any]:
        """Of the steps since the last call: ``step_s``, ``data_wait_s`` (seconds a step) and ``mfu``."""
        seconds = time.perf_counter() - self._since - self._apart
        steps, data = max(self._steps, 1), self._data
        known = self._peak is not None and self._counted and seconds > 0
        mfu = self._flop / (seconds * self._peak) if known and self._peak else None
        self._begin()
        return {"step_s": seconds / steps, "data_wait_s": data / steps, "mfu": mfu}
