"""Before a run: check its first batch end to end, and time it for an honest estimate of the whole."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from m4.batches.masked import host_backend, mask_rows
from m4.config import TrainConfig
from m4.data.store import TokenStore
from m4.device import autocast
from m4.modalities import RowLayout
from m4.model import M4
from m4kernels import MaskingSpec

# An empty decoder is a rare but right draw (about 1 in 7,000 under the M4 recipe); eight in a row are not.
_DRAWS = 8
_CPU_SAMPLES = 4


@dataclass(frozen=True)
class SmokeReport:
    """Seconds of forward and backward: ``fixed`` a pass, and ``per_sample``."""

    fixed: float
    per_sample: float

    def recipe_seconds(self, samples: int, batch_size: int) -> float:
        """Time of forward and backward over ``samples`` in passes of ``batch_size``."""
        return samples * self.per_sample + samples / batch_size * self.fixed


def smoke_test(
    model: M4,
    store: TokenStore,
    rows: np.ndarray,
    positions: np.ndarray,
    spec: MaskingSpec,
    config: TrainConfig,
    device: torch.device,
) -> SmokeReport:
    """Check the first batch, and run forward and backward on a few of its samples (the whole on a GPU).

    Leaves parameters as they are and no gradients behind.

    Args:
        rows, positions: int64 (B,), store rows of the batch and their positions in the training stream.
    Raises:
        ValueError: an id outside its vocabulary, a sample that never gets a target, a loss or gradient that is not
            finite; the message names the row, modality or parameter.
    """
    check_ids(store, rows, config)
    check_targets(store, rows, positions, spec, config)

    def seconds(samples: int, check: bool = False) -> float:
        _synchronize(device)
        start = time.perf_counter()
        batch = mask_rows(store, rows[:samples], positions[:samples], spec, seed=config.seed, device=device)
        with autocast(config.dtype, device):
            losses = model(batch)
        losses.total.backward()
        _synchronize(device)
        elapsed = time.perf_counter() - start
        if check:
            check_finite(losses.per_modality, model, config.modalities, "smoke test")
        model.zero_grad(set_to_none=True)
        return elapsed

    most = len(rows) if device.type == "cuda" else min(len(rows), _CPU_SAMPLES)
    seconds(most, check=True)  # not timed: the first pass also pays for allocations and kernel choice
    one, many = seconds(1), seconds(most)
    # What the first of many costs beyond the others is fixed; other work on the machine blurs it, hence the limits.
    per_sample = min(max((many - one) / max(1, most - 1), 0.5 * many / most), many / most)
    return SmokeReport(fixed=many - most * per_sample, per_sample=per_sample)


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
        batch = mask_rows(store, rows, ids, spec, seed=config.seed, device=cpu, backend=host_backend())
        has_target |= batch.decoder.segments.counts.sum(1) > 0
        if has_target.all():
            return
    row = int(rows[int((~has_target).nonzero()[0])])
    raise ValueError(
        f"training row {row} gets no target token in {_DRAWS} draws: check target_alphas and target_tokens_range"
    )


def check_finite(per_modality: torch.Tensor, model: M4, modalities: list[str], when: str) -> None:
    """Raise naming the modality whose loss, else the parameter whose gradient, is not finite."""
    for name, loss in zip(modalities, per_modality.tolist(), strict=True):
        if not np.isfinite(loss):
            raise ValueError(f"{when}: the loss of {name} is {loss}")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            raise ValueError(f"{when}: the losses are finite but the gradient of {name} is not")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
