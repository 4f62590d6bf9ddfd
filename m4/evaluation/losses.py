"""Cross-entropy of a model on a split under fixed masks, beside the training set's unigram distribution."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from m4.config import TrainConfig
from m4.data.store import TokenStore
from m4.device import autocast
from m4.distributed import World
from m4.evaluation.unigram import Unigram, count_tokens, unigram_baseline
from m4.model import M4
from m4kernels import MaskedBatch


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats a token. A modality without a target has loss None and counts as 0 in the mean."""

    loss: float  # mean over the modalities
    per_modality: dict[str, float | None]
    accuracy: dict[str, float | None]  # share of targets whose id is the likeliest
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
    world: World | None = None,
) -> Evaluation:
    """Mean cross-entropy over all targets of each modality (not a mean of batch means).

    Args:
        batches: the same on every rank.
        after_batch: called after each batch; lets a stop signal through.
        world: ranks that share the batches; all of them get the result, with the bits of one process.
    """
    world = world or World()
    modalities = config.modalities
    ones = torch.ones(len(modalities), dtype=torch.int64, device=device)
    sums = torch.zeros(len(modalities), dtype=torch.float64)
    counts, correct = (torch.zeros(len(modalities), dtype=torch.int64) for _ in range(2))
    samples = 0
    for turn in _turns(batches, world.size):
        batch = turn[min(world.rank, len(turn) - 1)]  # a rank without one of its own does the last again, for nothing
        with autocast(config.dtype, device):
            losses = model(batch, target_counts=ones, count_correct=True)  # denominators of one: sums instead of means
        segments = batch.decoder.segments
        right = losses.correct.long().cpu()
        found = (losses.per_modality.double().cpu(), segments.counts.sum(0).cpu(), right, segments.batch_size)
        for its_sums, its_counts, its_right, its_samples in world.gather(found)[: len(turn)]:
            sums += its_sums
            counts += its_counts
            correct += its_right
            samples += its_samples
        after_batch()
    means, shares = (
        [s / n if n else None for s, n in zip(some.tolist(), counts.tolist(), strict=True)] for some in (sums, correct)
    )
    return Evaluation(
        loss=sum(mean or 0.0 for mean in means) / len(modalities),
        per_modality=dict(zip(modalities, means, strict=True)),
        accuracy=dict(zip(modalities, shares, strict=True)),
        targets=dict(zip(modalities, counts.tolist(), strict=True)),
        samples=samples,
    )


def _turns(batches: Iterable[MaskedBatch], size: int) -> Iterator[list[MaskedBatch]]:
    """The batches by so many at a time; the last time perhaps fewer."""
    left = iter(batches)
    while turn := list(itertools.islice(left, size)):
        yield turn


def unigram_baselines(train: TokenStore, config: TrainConfig, batches: Iterable[MaskedBatch]) -> dict[str, Unigram]:
    """The unigram figures of the training set ``train`` on the very targets of ``batches``."""
    train_counts = count_tokens(train, config.vocab_sizes, config.max_seq_lens)
    target_counts = [np.zeros(size, dtype=np.int64) for size in config.vocab_sizes]
    for batch in batches:
        for m, counts in enumerate(target_counts):
            ids = batch.decoder.ids[batch.decoder.modalities == m].cpu().numpy()
            counts += np.bincount(ids, minlength=len(counts))
    baselines = [unigram_baseline(*pair) for pair in zip(train_counts, target_counts, strict=True)]
    return dict(zip(config.modalities, baselines, strict=True))
