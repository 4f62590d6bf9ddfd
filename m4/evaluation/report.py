"""What an evaluation of a run says: evaluation-SPLIT.json and a table."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m4.batches.masked import fixed_batches
from m4.build import masking_spec
from m4.data.layout import read_meta
from m4.data.store import TokenStore
from m4.device import keep_freed_memory
from m4.evaluation.losses import evaluate, unigram_baselines
from m4.evaluation.next_moment import NextMoment
from m4.evaluation.ranks import TOP, TargetRanks
from m4.evaluation.table import next_lines
from m4.evaluation.unigram import Unigram
from m4.files import writable_file, write_atomically
from m4.generation.estimates import CodeValues
from m4.model import M4
from m4.run.console import show_progress
from m4.saved_run import SavedRun
from m4kernels import MaskedBatch

log = logging.getLogger(__name__)


def report_path(run_dir: Path, split: str) -> Path:
    """Where the evaluation of a split is written."""
    return run_dir / f"evaluation-{split}.json"


def evaluate_run(
    run: SavedRun, split: str | None = None, max_samples: int | None = None, futures: int = 0
) -> dict[str, Any]:
    """Evaluate a checkpoint of a run on a split; the result is also written to evaluation-SPLIT.json in its folder.

    On a CPU this process keeps freed memory from then on (`m4.device.keep_freed_memory`).

    Args:
        split: default the run's evaluation split.
        max_samples: evaluate the first of the split only; default all.
        futures: next poses to draw for every sample, of which the nearest counts; default none.
    """
    config = run.config
    split = run.split_name(split)
    path = writable_file(report_path(run.folder, split))
    store, train = run.open_split(split), run.open_split(config.data.train_split)
    if train.fingerprint != run.data_fingerprint:
        log.warning(
            "the split %s in %s is not what this run was trained on (other samples or tokens)",
            config.data.train_split,
            run.root,
        )
    next_moment = NextMoment(config, read_meta(run.root))
    for checked, name in ((store, split), (train, config.data.train_split)):
        next_moment.check_poses(checked, name)
    if run.device.type == "cpu":
        keep_freed_memory()
    log.info("evaluating %s on the split %s in %s", run.checkpoint, split, run.root)
    model = run.model()

    def batches() -> Iterator[MaskedBatch]:
        return fixed_batches(
            store,
            masking_spec(config),
            seed=config.eval_seed,
            batch_size=config.batch_size,
            max_samples=max_samples,
            device=run.device,
        )

    samples = min(len(store), max_samples or len(store))
    shown = show_progress(
        batches(), f"evaluating on {split}", samples, size=lambda batch: batch.decoder.segments.batch_size
    )
    ranks = TargetRanks(model, config, run.device)
    result = evaluate(model, ranks.watch(shown), config, run.device)
    baselines = unigram_baselines(train, config, batches())
    losses = result.per_modality
    report = {
        "run": str(run.folder),
        "checkpoint": run.checkpoint_name,
        "weights": "averaged" if run.averaged else "trained",
        "split": split,
        "split_samples": len(store),
        "data_root": str(run.root.resolve()),
        **asdict(result),
        "perplexity": {name: loss if loss is None else math.exp(loss) for name, loss in losses.items()},
        **{f"top{k}": ranks.accuracy(k) for k in TOP},
        "unigram": {name: _figures(baseline) for name, baseline in baselines.items()},
        "below_unigram": {
            name: loss is not None and loss < baselines[name].cross_entropy for name, loss in losses.items()
        },
        "next": _next_figures(next_moment, model, store, train, samples, run, futures),
    }
    try:
        write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
    except OSError:  # a disk that filled up meanwhile does not take minutes of work with it
        print(report_table(report))
        raise
    return report


def _next_figures(
    next_moment: NextMoment,
    model: M4,
    store: TokenStore,
    train: TokenStore,
    samples: int,
    run: SavedRun,
    futures: int,
) -> dict[str, Any]:
    """What is said of the next moment of the first rows of a split, and in the log what is not."""
    decode = next_moment.tokenizer()
    for what, why in next_moment.left_out.items():
        log.warning("left out, figures of the next %s: %s", what, why)
    if not next_moment.wanted:
        return {"samples": 0, "left_out": next_moment.left_out}
    values = CodeValues.of(next_moment.layout, next_moment.meta, run.device) if decode is not None else None
    prediction = next_moment.predict(model, store, samples, run.device, code_values=values)
    drawn = None
    if futures and next_moment.pose:
        drawn = next_moment.futures(model, store, samples, run.device, futures=futures)
    return next_moment.all_figures(prediction, train, decode, drawn)


def _figures(baseline: Unigram) -> dict[str, float | None]:
    """As JSON has them: what no target decides is null."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(baseline).items()}


def report_table(report: dict[str, Any]) -> str:
    """The report as text, one line a modality."""
    every = report["split_samples"]
    samples = f"{every}" if report["samples"] == every else f"the first {report['samples']} of {every}"
    averaged = " (averaged weights)" if report.get("weights") == "averaged" else ""
    lines = [
        f"{report['run']} {report['checkpoint']}{averaged}, split {report['split']}: {samples} samples, nats a token",
        f"{'modality':<14} {'targets':>8} {'model':>8} {'unigram':>8} {'gain':>8} {'perplexity':>10} {'top 1':>6} "
        f"{'top 5':>6}   {'training-set entropy':>20}",
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
            f" {report['perplexity'][name]:>10.4g} {report['top1'][name]:>6.1%} {report['top5'][name]:>6.1%}"
            f"   {unigram['entropy']:>20.4f}{verdict}"
        )
    lines.append(f"{'mean':<14} {'':>8} {report['loss']:>8.4f}")
    lines.append(
        "unigram: the training set's token frequencies on the same targets, mixed with the uniform "
        "distribution by the weight that suits these targets best"
    )
    lines += ["", *next_lines(report["next"])]
    return "\n".join(lines)
