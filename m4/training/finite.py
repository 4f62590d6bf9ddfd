"""A run that diverged: what is not finite, and what to do about it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from m4.checkpoint import newest_whole
from m4.config import TrainConfig
from m4.model.weights import first_not_finite
from m4.training.guard import NotFinite

log = logging.getLogger(__name__)

NON_FINITE_FILE = "non_finite.jsonl"


def loss_that_is_not_finite(per_modality: list[float], modalities: list[str]) -> str | None:
    """ "the loss of NAME is nan", or None."""
    for name, loss in zip(modalities, per_modality, strict=True):
        if not math.isfinite(loss):
            return f"the loss of {name} is {loss}"
    return None


def gradient_that_is_not_finite(gradients: Mapping[str, torch.Tensor]) -> str | None:
    """Names the first of the parameters, or None."""
    name = first_not_finite(gradients.items())
    return name and f"the losses are finite but the gradient of {name} is not"


def state_that_is_not_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Names the weight or the moment of the optimiser, or None; asks the device twice, whatever their number."""
    name = first_not_finite(model.state_dict().items())
    if name is not None:
        return f"the weights of {name} are not finite"
    moments = (
        (f"{kind} of {name}", optimizer.state.get(parameter, {}).get(kind))
        for name, parameter in model.named_parameters()
        for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer")
    )
    name = first_not_finite((name, moment) for name, moment in moments if moment is not None)
    return name and f"the optimiser's {name} is not finite"


def why_not_finite(found: NotFinite, modalities: list[str]) -> str:
    """What of a step was not finite, in words."""
    return (
        loss_that_is_not_finite(found.losses, modalities)
        or f"the losses are finite but the gradient norm is {found.norm}"
    )


def note_not_finite(
    config: TrainConfig, step: int, found: NotFinite, ids: np.ndarray, rows: np.ndarray, pids: Sequence[str]
) -> None:
    """Add a line about a step that was not finite to ``non_finite.jsonl`` in the run directory, for inspection.

    Args:
        ids: int64 (S,), sample ids of the step: positions in the sample order, which decide the masks.
        rows: int64 (S,), their rows of the training split; pids: (S,), what the data calls them.
    """
    line = {
        "step": step,
        "reason": why_not_finite(found, config.modalities),
        "losses": {name: _number(loss) for name, loss in zip(config.modalities, found.losses, strict=True)},
        "grad_norm": _number(found.norm),
        "split": config.data.train_split,
        "sample_ids": ids.tolist(),
        "rows": rows.tolist(),
        "pids": list(pids),
    }
    path = config.run_dir / NON_FINITE_FILE
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:  # the lesser trouble
        log.error("%s: cannot be written: %s; the samples of step %d are rows %s", path, error.strerror, step, rows)


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else str(value)


def diverged(what: str, config: TrainConfig) -> ValueError:
    """The error that ends a run that diverged: what was found, what is kept, and how to go on."""
    newest = newest_whole(config.run_dir)
    if newest is None:
        kept, then = "there is no checkpoint yet", "it starts from the beginning"
    else:
        kept, then = f"the newest checkpoint is {newest[0]}", "these keys may change, and it resumes from there"
    return ValueError(
        f"{what}; nothing of it was saved; {kept}. Give the same command with {_remedies(config)}: {then}"
    )


def _remedies(config: TrainConfig) -> str:
    remedies = [f"a lower lr than {config.lr:g}", f"a longer token_warmup than {config.token_warmup:g}"]
    remedies.append("clip_grad=1" if config.clip_grad is None else f"a smaller clip_grad than {config.clip_grad:g}")
    remedies.append(f"skip_non_finite={config.skip_non_finite + 10} where single batches are at fault")
    if config.dtype != "fp32":
        remedies.append("dtype=fp32")
    return f"{', '.join(remedies[:-1])} or {remedies[-1]}"
