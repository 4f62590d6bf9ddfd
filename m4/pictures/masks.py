"""Which tokens a model sees, which it predicts, and which may look at which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Of tokens that are unused, input, target: told apart by colour-blind eyes and in grey.
_STATES = (("unused", "#e6e6e6"), ("input", "#3b6fb6"), ("target", "#f2a03d"))
_BLOCKED, _ALLOWED = "#f4f4f2", "#3b6fb6"


def mask_layouts(samples: Sequence[Mapping[str, np.ndarray]]) -> Figure:
    """A row a sample, a panel a modality: each token a cell, coloured by what it is.

    Args:
        samples: name of a modality → integer (rows, columns), 0 unused, 1 input, 2 target.
    """
    names = list(samples[0])
    widths = [max(0.6, min(2.0, shape[1] / shape[0])) for shape in (samples[0][name].shape for name in names)]
    figure = Figure(figsize=(1.8 * sum(widths) + 0.6, 1.9 * len(samples) + 0.8), layout="constrained")
    places = figure.subplots(len(samples), len(names), squeeze=False, width_ratios=widths)
    colours = ListedColormap([colour for _, colour in _STATES])
    for number, (sample, row) in enumerate(zip(samples, places, strict=True)):
        for name, axes in zip(names, row, strict=True):
            states = np.asarray(sample[name])
            axes.pcolormesh(states[::-1], cmap=colours, vmin=-0.5, vmax=2.5, edgecolors="white", linewidth=0.4)
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
            seen, asked = int((states == 1).sum()), int((states == 2).sum())
            axes.set_xlabel(f"{seen} input, {asked} target", fontsize=8)
            if number == 0:
                axes.set_title(name, fontsize=10)
        row[0].set_ylabel(f"sample {number}", fontsize=9)
    handles = [Patch(color=colour, label=label) for label, colour in _STATES]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def attention_patterns(names: Sequence[str], panels: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Figure:
    """A panel an attention: which query may look at which key, token by token, modality by modality.

    Args:
        names: M modalities.
        panels: title → (tokens of each modality among the queries, integer (M,), the same of the keys, bool (M, M),
            whether a modality's queries may look at a modality's keys).
    """
    figure = Figure(figsize=(4.6 * len(panels), 5.4), layout="constrained")
    for axes, (title, (queries, keys, allow)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        pairs = np.repeat(np.repeat(allow, queries, axis=0), keys, axis=1)
        if pairs.size:
            axes.imshow(pairs, cmap=ListedColormap([_BLOCKED, _ALLOWED]), vmin=0, vmax=1, interpolation="nearest")
        share = f"{pairs.mean():.0%} of" if pairs.size else "no"
        axes.set_title(f"{title}\n{len(pairs)} x {pairs.shape[1]}: {share} pairs", fontsize=10)
        axes.set_xlabel("keys")
        axes.set_ylabel("queries")
        for counts, set_ticks, line in (
            (keys, axes.set_xticks, axes.axvline),
            (queries, axes.set_yticks, axes.axhline),
        ):
            ends = np.cumsum(counts)
            present = np.flatnonzero(counts)
            set_ticks((ends - np.asarray(counts) / 2 - 0.5)[present], [names[m] for m in present.tolist()], fontsize=8)
            for end in ends[:-1]:
                line(end - 0.5, color="white", lw=1.2)
        axes.tick_params(axis="x", rotation=60)
    return figure


def schedule_curve(tokens: Sequence[float], rates: Sequence[float], marks: Mapping[str, Sequence[float]]) -> Figure:
    """The learning rate over counted tokens (millions), with marks where something is due (what → counted tokens)."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, rates, lw=1.6)
    for number, (what, places) in enumerate(marks.items()):
        height = -0.04 * (number + 1) * max(rates)
        axes.plot(places, np.full(len(places), height), "|", ms=8, color=f"C{number + 1}", label=what)
    axes.axhline(0, color="k", lw=0.6)
    axes.set_xlabel("counted tokens (millions)")
    axes.set_ylabel("learning rate")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    return figure
