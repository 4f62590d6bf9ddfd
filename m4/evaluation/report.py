"""What an evaluation of a run says: evaluation.json and a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m4.batches.masked import fixed_batches
from m4.build import build_model, data_root, masking_spec, open_split
from m4.checkpoint import load_run, load_weights
from m4.device import pick_device
from m4.evaluation.losses import evaluate, unigram_baselines
from m4.files import write_atomically
from m4kernels import MaskedBatch


def evaluate_run(run_dir: Path, split: str | None, device_name: str | None) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run on a whole split; the result is also written to evaluation.json."""
    config, checkpoint = load_run(run_dir)
    device = pick_device(device_name or config.device)
    root = data_root(config)
    split = split or config.data.eval_split
    store = open_split(config, root, split)
    model = build_model(config, device).eval()
    load_weights(checkpoint, model)

    def batches() -> Iterator[MaskedBatch]:
        return fixed_batches(
            store,
            masking_spec(config),
            seed=config.eval_seed,
            batch_size=config.batch_size,
            max_samples=None,
            device=device,
        )

    result = evaluate(model, batches(), config, device)
    baselines = unigram_baselines(config, root, batches())
    losses = result.per_modality
    report = {
        "run": str(run_dir),
        "checkpoint": checkpoint.name,
        "split": split,
        **asdict(result),
        "unigram": {name: asdict(figures) for name, figures in baselines.items()},
        "below_unigram": {
            name: loss is not None and loss < baselines[name].cross_entropy for name, loss in losses.items()
        },
    }
    write_atomically(run_dir / "evaluation.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def report_table(report: dict[str, Any]) -> str:
    """The report as text, one line a modality."""
    lines = [
        f"{report['run']} {report['checkpoint']}, split {report['split']}: {report['samples']} samples, nats a token",
        f"{'modality':<14} {'targets':>8} {'model':>8} {'unigram':>8} {'gain':>8}   {'training-set entropy':>20}",
    ]
    for name, loss in report["per_modality"].items():
        unigram = report["unigram"][name]
        if loss is None:
            lines.append(f"{name:<14} {0:>8}  no target in this split")
            continue
        gain = unigram["cross_entropy"] - loss
        verdict = "" if gain > 0 else "  NOT below the unigram baseline"
        lines.append(
            f"{name:<14} {report['targets'][name]:>8} {loss:>8.4f} {unigram['cross_entropy']:>8.4f} {gain:>+8.4f}"
            f"   {unigram['entropy']:>20.4f}{verdict}"
        )
    lines.append(f"{'mean':<14} {'':>8} {report['loss']:>8.4f}")
    lines.append(
        "unigram: the training set's token frequencies on the same targets, mixed with the uniform "
        "distribution by the weight that suits these targets best"
    )
    return "\n".join(lines)
