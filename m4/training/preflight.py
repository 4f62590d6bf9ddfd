"""Before a run: check its first batch end to end, and time it for an honest estimate of the whole."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from m4.batches.masked import mask_rows
from m4.batches.mirror import Mirror
from m4.batches.order import SampleOrder
from m4.batches.packing import drawn_counts
from m4.config import TrainConfig
from m4.data.store import TokenStore
from m4.device import TRAINING_DTYPES, autocast, total_memory
from m4.errors import ConfigError
from m4.modalities import RowLayout
from m4.model import M4
from m4.schedule import Schedule
from m4.training.exchange import Exchange
from m4.training.finite import gradient_that_is_not_finite, loss_that_is_not_finite
from m4kernels import MaskingSpec

# An empty decoder is a rare but right draw (about 1 in 7,000 under the M4 recipe); eight in a row are not.
_DRAWS = 8
_FEW = 4  # samples for a check, and on a CPU for the smoke test


@dataclass(frozen=True)
class SmokeReport:
    """Seconds of forward and backward: ``fixed`` a pass, and ``per_sample``."""

    fixed: float
    per_sample: float

    def recipe_seconds(self, samples: int, batch_size: int) -> float:
        """Time of forward and backward over ``samples`` in passes of ``batch_size``."""
        return samples * self.per_sample + samples / batch_size * self.fixed


class Probe:
    """Forward and backward of a few samples, beside the training step: they leave parameters and gradients as they are.

    Args:
        model: it runs as it is, not compiled.
        order: which rows of the store are trained on, by position.
        mirror: as in `m4.batches.train.TrainBatches`.
        exchange: between the ranks, all of which run the same samples.
    """

    def __init__(
        self,
        model: M4,
        store: TokenStore,
        order: SampleOrder,
        spec: MaskingSpec,
        config: TrainConfig,
        device: torch.device,
        mirror: Mirror | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self._exchange = exchange or Exchange()
        self._model, self._store, self._order, self._mirror = model, store, order, mirror
        self._spec, self._config, self._device = spec, config, device

    def divergence(self, position: int, samples: int = _FEW) -> str | None:
        """What is not finite, loss or gradient, in the samples at a position; None where all is well."""
        losses, gradients = self._pass(position, min(samples, self._config.batch_size))
        found = loss_that_is_not_finite(losses.tolist(), self._config.modalities)
        return found or gradient_that_is_not_finite(gradients)

    def smoke_test(self, position: int) -> SmokeReport:
        """Check the batch at a position and run a few of its samples (the whole on a GPU).

        Raises:
            ValueError: an id outside its vocabulary, a sample that never gets a target, a loss or gradient that is not
                finite; the message names the row, modality or parameter.
        """
        positions = np.arange(self._config.batch_size) + position
        rows = self._order.rows(positions)
        check_ids(self._store, rows, self._config)
        check_targets(self._store, rows, positions, self._spec, self._config)
        most = len(rows) if self._device.type == "cuda" else min(len(rows), _FEW)
        found = self.divergence(position, most)  # not timed: it also pays for allocations and kernel choice
        if found is not None:
            raise ValueError(f"smoke test: {found}")
        one, many = self._seconds(position, 1), self._seconds(position, most)
        # What the first of many costs beyond the others is fixed; other work on the machine blurs it, hence the limits.
        per_sample = min(max((many - one) / max(1, most - 1), 0.5 * many / most), many / most)
        return SmokeReport(fixed=many - most * per_sample, per_sample=per_sample)

    def _pass(self, position: int, samples: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Losses (M,) and the gradient of each parameter by name."""
        positions = np.arange(samples) + position
        rows = self._order.rows(positions)
        batch = mask_rows(
            self._store,
            rows,
            positions,
            self._spec,
            seed=self._config.seed,
            device=self._device,
            mirror=self._mirror,
        )
        named = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        with self._exchange.backward(last=True):
            with autocast(self._config.dtype, self._device):
                losses = self._model(batch)
            gradients = self._exchange.gradients(losses.total, list(named.values()))
        held = {name: g for name, g in zip(named, gradients, strict=True) if g is not None}
        return losses.per_modality.detach(), held

    def _seconds(self, position: int, samples: int) -> float:
        _synchronize(self._device)
        start = time.perf_counter()
        self._pass(position, samples)
        _synchronize(self._device)
        return time.perf_counter() - start


def check_memory(config: TrainConfig, schedule: Schedule, spec: MaskingSpec, device: torch.device) -> None:
    """Raise ConfigError where a step needs more memory than there is, by an estimate that is far below the truth.

    Counted are weights, gradients and two moments of the matrices; the input of every block, which the backward pass
    needs; and the masked ids, positions and modalities of a step's samples.
    """
    model = config.model
    inputs, targets = (counts.sum(1).mean() for counts in drawn_counts(spec, seed=0, sample_ids=np.arange(256)))
    matrices = 4 * model.dim**2 * (model.enc_depth + model.dec_depth) + max(config.vocab_sizes) * model.dim
    forward = (
        (inputs * model.enc_depth + targets * model.dec_depth) * model.dim * TRAINING_DTYPES[config.dtype].itemsize
    )
    samples = schedule.samples_per_step
    needed = {
        "model": ("the model with its optimiser", matrices * 16.0),
        "batch_size": (f"a forward pass of {config.batch_size:,} samples", config.batch_size * forward),
        "global_batch_size": (f"the tokens of the {samples:,} samples of a step", samples * (inputs + targets) * 12),
    }
    there = total_memory(device)
    if sum(amount for _, amount in needed.values()) > there:
        key, (most, amount) = max(needed.items(), key=lambda part: part[1][1])
        if key == "batch_size" and forward > there:  # one sample has no room either
            key = "model"
        raise ConfigError(
            f"{key}: too large for the memory here: {most} needs at least {amount / 1e9:,.1f} GB, {device} has "
            f"{there / 1e9:,.1f} GB in all; lower {key}"
        )


def check_ids(store: TokenStore, rows: np.ndarray, config: TrainConfig) -> None:
    """Raise if a token of these rows is outside the vocabulary of its modality."""
    tokens = store.batch(rows)
    for m, (name, span) in enumerate(zip(config.modalities, RowLayout.of(config).spans, strict=True)):
        ids = tokens[:, span]
        wrong = (ids < 0) | (ids >= config.vocab_sizes[m])
        if wrong.any():
            row, position = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"training row {int(rows[row])}, {name} position {position}: expected an id below "
                f"{config.vocab_sizes[m]} (vocab_sizes), got {int(ids[row, position])}"
            )


def check_targets(
    store: TokenStore, rows: np.ndarray, positions: np.ndarray, spec: MaskingSpec, config: TrainConfig
) -> None:
    """Raise if a sample gets no target in any of several independent draws of its mask."""
    has_target = torch.zeros(len(rows), dtype=torch.bool)
    for draw in range(_DRAWS):
        ids = positions + (draw << 48)
        cpu = torch.device("cpu")
        batch = mask_rows(store, rows, ids, spec, seed=config.seed, device=cpu, backend="auto")
        has_target |= batch.decoder.segments.counts.sum(1) > 0
        if has_target.all():
            return
    row = int(rows[int((~has_target).nonzero()[0])])
    raise ValueError(
        f"training row {row} gets no target token in {_DRAWS} draws: check target_alphas and target_tokens_range"
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
