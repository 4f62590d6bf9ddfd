"""Curves of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

FIGURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", ".svg")

Line = Mapping[str, Any]


def loss_curves(train: Sequence[Line], evaluations: Sequence[Line], unigram: Mapping[str, float]) -> Figure:
    """One panel a modality and one for the mean: training and evaluation loss over counted tokens.

    Args:
        train, evaluations: lines with ``tokens`` (millions of counted tokens), ``loss`` and ``per_modality`` (name →
            loss, None for a modality without a target); at least one of training.
        unigram: name → cross-entropy of the training set's unigram distribution, drawn as a level.
    """
    names = list(train[0]["per_modality"])
    figure = Figure(figsize=(4 * (len(names) + 1), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names) + 1), ["mean", *names], strict=True):
        axes.plot(*_points(train, name), lw=0.6, alpha=0.6, label="train")
        if evaluations:
            axes.plot(*_points(evaluations, name), "o-", ms=3, lw=1.5, label="eval")
        if name in unigram:
            axes.axhline(unigram[name], color="k", ls="--", lw=1, label="unigram")
        axes.set_title(name)
        axes.set_xlabel("counted tokens (millions)")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("cross-entropy (nats a token)")
    figure.axes[-1].legend()
    return figure


def figure_bytes(figure: Figure, ending: str) -> bytes:
    """The content of a picture file with this ending, one of FIGURE_ENDINGS."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format=ending.lower().lstrip("."))
    return buffer.getvalue()


def _points(lines: Sequence[Line], name: str) -> tuple[list[float], list[float]]:
    """Tokens and losses of a modality, or of the mean; without the lines that have none."""
    losses = [line["loss"] if name == "mean" else line["per_modality"].get(name) for line in lines]
    return (
        [line["tokens"] for line, loss in zip(lines, losses, strict=True) if loss is not None],
        [loss for loss in losses if loss is not None],
    )
