"""The baseline every trained model must beat: the training set's unigram distribution of each modality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m4.data.store import TokenStore

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Unigram:
    """Figures of one modality, in nats a token."""

    entropy: float  # of the training set's distribution: what it costs to code the training set itself
    cross_entropy: float  # on the evaluation targets, smoothed with the weight that suits them best
    uniform_weight: float  # that weight: p = (1 − w) · counts / total + w / vocabulary


def count_tokens(store: TokenStore, vocab_sizes: list[int], max_seq_lens: list[int]) -> list[np.ndarray]:
    """How often each id occurs in a split: one int64 (vocab_sizes[m],) array a modality."""
    counts = [np.zeros(size, dtype=np.int64) for size in vocab_sizes]
    ends = np.cumsum(max_seq_lens)
    for first in range(0, len(store), _ROWS_AT_ONCE):
        rows = np.asarray(store.tokens[first : first + _ROWS_AT_ONCE])
        for m, (end, length) in enumerate(zip(ends, max_seq_lens, strict=True)):
            counts[m] += np.bincount(rows[:, end - length : end].ravel(), minlength=len(counts[m]))
    return counts


def unigram_baseline(train_counts: np.ndarray, target_counts: np.ndarray) -> Unigram:
    """Entropy of the training counts, and their cross-entropy on the targets under the best uniform smoothing.

    Args:
        train_counts, target_counts: int (V,) occurrences of each id in the training set and among the targets.
    """
    from scipy.optimize import minimize_scalar  # here: its import takes half a second, and training needs it not

    p = train_counts / max(1, train_counts.sum())
    seen = p[p > 0]
    entropy = float(-(seen * np.log(seen)).sum())
    ids = np.flatnonzero(target_counts)
    if len(ids) == 0:
        return Unigram(entropy, float("nan"), float("nan"))
    share = target_counts[ids] / target_counts.sum()

    def cross_entropy(weight: float) -> float:
        return float(-(share * np.log((1 - weight) * p[ids] + weight / len(p))).sum())

    # Convex in the weight, so a bounded search finds the one that flatters the baseline most.
    best = minimize_scalar(cross_entropy, bounds=(1e-9, 1.0), method="bounded", options={"xatol": 1e-6})
    weight = min((best.x, 1e-9, 1.0), key=cross_entropy)
    return Unigram(entropy, cross_entropy(weight), float(weight))
