"""Curves of a run."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

FIGURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", ".svg")

Line = Mapping[str, Any]


def loss_curves(train: Sequence[Line], evaluations: Sequence[Line], unigram: Mapping[str, float]) -> Figure:
    """One panel a modality and one for the mean: training and evaluation loss over counted tokens.

    A modality that never had a target has no panel. Where evaluations say how far the next pose is off, a panel of it,
    beside copying the reference pose.

    Args:
        train, evaluations: lines with ``tokens`` (millions of counted tokens), ``loss`` and ``per_modality`` (name →
            loss, None for a modality without a target: a gap in its curve); at least one of training. Evaluations may
            have ``next``, with pose → error_px and pose → copy → error_px (pixels or None).
        unigram: name → cross-entropy of the training set's unigram distribution, drawn as a level.
    """
    lines = [*train, *evaluations]
    names = [
        name for name in train[0]["per_modality"] if any(line["per_modality"].get(name) is not None for line in lines)
    ]
    poses = [line for line in evaluations if "pose" in line.get("next", {})]
    panels = len(names) + 1 + bool(poses)
    figure = Figure(figsize=(4 * panels, 3.4), layout="constrained")
    places = figure.subplots(1, panels)
    for axes, name in zip(places, ["mean", *names], strict=False):
        axes.plot(*_points(train, name), lw=0.6, alpha=0.6, label="train")
        if evaluations:
            axes.plot(*_points(evaluations, name), "o-", ms=3, lw=1.5, label="eval")
        if name in unigram:
            axes.axhline(unigram[name], color="k", ls="--", lw=1, label="unigram")
        _dress(axes, name)
    places[0].set_ylabel("cross-entropy (nats a token)")
    places[len(names)].legend()
    if poses:
        _pose_errors(places[-1], poses)
    return figure


def _pose_errors(axes: Axes, lines: Sequence[Line]) -> None:
    poses = [line["next"]["pose"] for line in lines]
    axes.plot(*_curve(lines, [pose["error_px"] for pose in poses]), "o-", ms=3, lw=1.5, color="C1", label="predicted")
    copied = [pose["copy"]["error_px"] for pose in poses]
    axes.plot(*_curve(lines, copied), color="k", ls="--", lw=1, label="copying the reference")
    axes.set_ylim(bottom=0, top=1.1 * axes.get_ylim()[1])
    axes.set_ylabel("error (pixels)")
    axes.legend(loc="lower right")  # errors seldom come near 0
    _dress(axes, "next pose")


def variant_curves(variants: Mapping[str, Sequence[Sequence[Line]]], loss: str) -> Figure | None:
    """Error of the next pose and a loss over training samples: a colour a variant, a line a run of it.

    Args:
        variants: label → runs → lines with ``samples`` (trained on so far), ``error_px`` and ``copy_px`` (of the next
            pose, pixels) and ``loss``; None where there is none, which is a gap.
        loss: the modality of the losses.
    Returns:
        None where no line has any of these.
    """
    possible = (("error_px", "next pose", "error (pixels)"), ("loss", loss, "cross-entropy (nats a token)"))
    everything = [line for runs in variants.values() for run in runs for line in run]
    panels = [panel for panel in possible if any(line[panel[0]] is not None for line in everything)]
    if not panels:
        return None
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, (key, title, unit) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (label, runs) in enumerate(variants.items()):
            for place, run in enumerate(runs):
                values = [math.nan if line[key] is None else line[key] for line in run]
                (drawn,) = axes.plot([line["samples"] for line in run], values, "o-", ms=3, lw=1.2, color=f"C{number}")
                drawn.set_label("_" if place else label)  # one entry of the legend a variant
        copied = [line["copy_px"] for line in everything if line["copy_px"] is not None]
        if key == "error_px" and copied:
            axes.axhline(copied[-1], color="k", ls="--", lw=1, label="copying the reference")
            axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        axes.legend()
        _dress(axes, title, "training samples")
    return figure


def _dress(axes: Axes, title: str, across: str = "counted tokens (millions)") -> None:
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.grid(alpha=0.3)


def figure_bytes(figure: Figure, ending: str) -> bytes:
    """The content of a picture file with this ending, one of FIGURE_ENDINGS."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format=ending.lower().lstrip("."))
    return buffer.getvalue()


def _points(lines: Sequence[Line], name: str) -> tuple[list[float], list[float]]:
    """Tokens and losses of a modality, or of the mean."""
    return _curve(lines, [line["loss"] if name == "mean" else line["per_modality"].get(name) for line in lines])


def _curve(lines: Sequence[Line], values: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """Tokens and values to plot: a value that is not there is a gap. Nothing where none is there."""
    if all(value is None for value in values):
        return [], []
    return [line["tokens"] for line in lines], [math.nan if value is None else value for value in values]
