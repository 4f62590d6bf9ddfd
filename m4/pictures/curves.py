"""Curves of a run."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from m4.errors import ConfigError
from m4.run.metrics import METRICS_FILE, read_metrics


def loss_curves(run_dir: Path) -> Figure:
    """One panel a modality and one for the mean: training and evaluation loss over counted tokens.

    If the run has an evaluation.json, the unigram cross-entropy it reports is drawn as a line.

    Raises:
        ConfigError: the run has no metrics yet.
    """
    lines = read_metrics(run_dir / METRICS_FILE)
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    if not train:
        raise ConfigError(f"{run_dir / METRICS_FILE}: holds no training step yet; train the run first")
    report = run_dir / "evaluation.json"
    unigram = json.loads(report.read_text())["unigram"] if report.exists() else {}
    names = list(train[0]["per_modality"])

    figure = Figure(figsize=(4 * (len(names) + 1), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names) + 1), ["mean", *names], strict=True):

        def value(line: dict, name: str = name) -> float | None:
            return line["loss"] if name == "mean" else line["per_modality"][name]

        axes.plot([line["tokens"] for line in train], [value(line) for line in train], lw=0.6, alpha=0.6, label="train")
        points = [(line["tokens"], value(line)) for line in evaluations if value(line) is not None]
        axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.5, label="eval") if points else None
        if name in unigram:
            axes.axhline(unigram[name]["cross_entropy"], color="k", ls="--", lw=1, label="unigram")
        axes.set_title(name)
        axes.set_xlabel("counted tokens (millions)")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("cross-entropy (nats a token)")
    figure.axes[-1].legend()
    return figure
