"""What a run says of itself while it trains: losses on the evaluation split, and the next moment of a few samples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from m4.batches.masked import fixed_batches
from m4.build import Stores
from m4.config import TrainConfig
from m4.distributed import World
from m4.evaluation.losses import Evaluation, evaluate
from m4.evaluation.next_moment import next_moment_of
from m4.evaluation.table import next_line
from m4.model import M4
from m4.run.console import show_progress
from m4.training.exchange import Exchange
from m4kernels import MaskingSpec

log = logging.getLogger(__name__)


class RunEvaluator:
    """Evaluates models on the evaluation split of a run, always under the same masks.

    Args:
        after_batch: called after each batch; lets a stop signal through.
        world: ranks that share the batches; all of them get the figures.
        exchange: between them.
    """

    def __init__(
        self,
        config: TrainConfig,
        stores: Stores,
        spec: MaskingSpec,
        device: torch.device,
        after_batch: Callable[[], None],
        world: World,
        exchange: Exchange,
    ) -> None:
        self._config, self._store, self._spec, self._device = config, stores.evaluation, spec, device
        self.next_moment = next_moment_of(config, stores.meta, stores.evaluation)
        self._after_batch, self._world, self._exchange = after_batch, world, exchange

    def evaluate(self, model: M4, averaged: M4 | None = None) -> tuple[dict[str, Any], list[str]]:
        """The figures of a line of kind eval in metrics.jsonl, and lines that say them.

        Args:
            averaged: the same with averaged weights, whose losses are ``ema``.
        """
        model.eval()
        with self._exchange.evaluating():
            result = self._losses(model, "evaluating")
            figures, lines = asdict(result), [str(result)]
            if self.next_moment is not None:
                samples = min(len(self._store), self._config.eval_generate_samples)
                prediction = self.next_moment.predict(
                    model, self._store, samples, self._device, after_batch=self._after_batch
                )
                figures["next"] = self.next_moment.figures(prediction)
                lines.append(next_line(figures["next"]))
        model.train()
        if averaged is not None:
            result = self._losses(averaged, "evaluating averaged weights")
            figures["ema"] = {key: getattr(result, key) for key in ("loss", "per_modality", "accuracy")}
            lines.append(f"averaged weights: {result}")
        return figures, lines

    def _losses(self, model: M4, doing: str) -> Evaluation:
        config, store = self._config, self._store
        what = f"{doing} on {config.data.eval_split}"
        samples = min(len(store), config.eval_samples or len(store))
        log.info("%s: %d samples", what, samples)
        batches = fixed_batches(
            store,
            self._spec,
            seed=config.eval_seed,
            batch_size=config.batch_size,
            max_samples=samples,
            device=self._device,
        )
        shown = show_progress(batches, what, samples, size=lambda batch: batch.decoder.segments.batch_size)
        return evaluate(model, shown, config, self._device, after_batch=self._after_batch, world=self._world)
