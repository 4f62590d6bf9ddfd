"""Cross-entropy of a model on a split under fixed masks, beside the training set's unigram distribution."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m4.batches import fixed_batches
from m4.build import autocast, build_model, data_root, masking_spec, open_split, pick_device
from m4.checkpoint import load_run, load_weights
from m4.cli import run_command
from m4.config import ConfigError, TrainConfig
from m4.data.files import write_atomically
from m4.model import M4
from m4.unigram import Unigram, count_tokens, unigram_baseline
from m4kernels import MaskedBatch


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats a token. A modality without a target has loss None and counts as 0 in the mean."""

    loss: float  # mean over the modalities
    per_modality: dict[str, float | None]
    targets: dict[str, int]  # number of target tokens
    samples: int

    def __str__(self) -> str:
        losses = "  ".join(f"{name} {'none' if x is None else f'{x:.4f}'}" for name, x in self.per_modality.items())
        return f"loss {self.loss:.4f}  ({losses}; {self.samples} samples)"


@torch.no_grad()
def evaluate(
    model: M4,
    batches: Iterable[MaskedBatch],
    config: TrainConfig,
    device: torch.device,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Mean cross-entropy over all targets of each modality (not a mean of batch means).

    Args:
        after_batch: called after each batch; lets a stop signal through.
    """
    modalities = config.modalities
    ones = torch.ones(len(modalities), dtype=torch.int64, device=device)
    sums = torch.zeros(len(modalities), dtype=torch.float64)
    counts = torch.zeros(len(modalities), dtype=torch.int64)
    samples = 0
    for batch in batches:
        with autocast(config, device):
            losses = model(batch, target_counts=ones)  # denominators of one: sums instead of means
        sums += losses.per_modality.double().cpu()
        counts += batch.decoder.segments.counts.sum(0).cpu()
        samples += len(batch.decoder.segments.counts)
        after_batch()
    means = [s / n if n else None for s, n in zip(sums.tolist(), counts.tolist(), strict=True)]
    return Evaluation(
        loss=sum(mean or 0.0 for mean in means) / len(modalities),
        per_modality=dict(zip(modalities, means, strict=True)),
        targets=dict(zip(modalities, counts.tolist(), strict=True)),
        samples=samples,
    )


def unigram_baselines(config: TrainConfig, root: Path, batches: Iterable[MaskedBatch]) -> dict[str, Unigram]:
    """The training set's unigram figures on the very targets of ``batches``."""
    train = open_split(config, root, config.data.train_split)
    train_counts = count_tokens(train, config.vocab_sizes, config.max_seq_lens)
    target_counts = [np.zeros(size, dtype=np.int64) for size in config.vocab_sizes]
    for batch in batches:
        for m, counts in enumerate(target_counts):
            ids = batch.decoder.ids[batch.decoder.modalities == m].cpu().numpy()
            counts += np.bincount(ids, minlength=len(counts))
    baselines = [unigram_baseline(*pair) for pair in zip(train_counts, target_counts, strict=True)]
    return dict(zip(config.modalities, baselines, strict=True))


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m m4.evaluate", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory, for example runs/M4-tiny")
    parser.add_argument("--split", help="split to evaluate (default: the run's evaluation split)")
    parser.add_argument("--device", help="cpu, cuda or auto (default: as the run was configured)")
    arguments = parser.parse_args()
    if not arguments.run.is_dir():
        raise ConfigError(f"--run: {arguments.run} is not a run directory")
    print(report_table(evaluate_run(arguments.run, arguments.split, arguments.device)))
    return 0


if __name__ == "__main__":
    run_command(main)
