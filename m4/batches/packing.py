"""Batches of few shapes: how many packed tokens to allow for, and which samples go together so that they fit.

A captured training step knows micro-batches of a few sizes, and all of one step have the same. Masks are counter-based,
so the tokens of every sample of the coming step are known before it runs, and its samples can be dealt to micro-batches
evenly. Which samples make up a step does not change, and losses are normalised by the counts of the whole step, so the
update is that of the undealt step up to the order of summation.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from m4kernels import MaskingSpec, mask_tokens

# Tokens of GEMM tiles: capacities are multiples, so that no product has a ragged last tile.
GRANULE = 128
# Of the step's total. At three, one step in 370 (about 70 of the M4 recipe's 24,415) has more inputs or more targets
# and runs at a larger capacity of its own; at four, one in 16,000, for 2 % more tokens in every step.
SPREADS = 3.0
# Three sizes, in standard deviations above the mean: where totals are normal, steps that take the smallest that holds
# them leave 0.8 standard deviations empty in the mean, the least that three sizes can; the largest alone leaves 3.
SIZES = (-0.05, 1.15, SPREADS)
_DRAWS = 16384  # the mean of so many draws is within 0.4 tokens of the truth


def drawn_counts(spec: MaskingSpec, *, seed: int, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), int64 (S, M) each: the tokens of each modality that masking will give these samples.

    Args:
        spec: the masking rule.
        seed: the seed of the masks.
        sample_ids: int64 (S,).
    """
    tokens = torch.zeros(1, dtype=torch.uint16).expand(len(sample_ids), spec.num_tokens)  # what they are is no matter
    ids = torch.from_numpy(np.array(sample_ids, dtype=np.int64))
    batch = mask_tokens(
        tokens.contiguous(),
        spec,
        seed=seed,
        sample_ids=ids,
        backend="auto",  # on the host, whatever M4KERNELS_BACKEND names for the device
    )
    inputs, targets = (half.segments.counts.numpy().astype(np.int64) for half in (batch.encoder, batch.decoder))
    return inputs, targets


@dataclass(frozen=True)
class Capacities:
    """The sizes that micro-batches come in, in packed tokens."""

    inputs: tuple[int, ...]  # ascending
    targets: tuple[int, ...]

    @property
    def largest(self) -> tuple[int, int]:
        """Of inputs and of targets; nearly every step fits it."""
        return self.inputs[-1], self.targets[-1]

    def pairs(self) -> list[tuple[int, int]]:
        """Every size of the inputs with every size of the targets; the largest pair is the last."""
        return list(itertools.product(self.inputs, self.targets))

    def fitting(self, inputs: float, targets: float) -> tuple[int, int]:
        """The smallest sizes that hold so many tokens; beyond the largest, the next multiple of `GRANULE`."""
        return _at_least(inputs, self.inputs), _at_least(targets, self.targets)


def _at_least(tokens: float, sizes: tuple[int, ...]) -> int:
    return next((size for size in sizes if tokens <= size), round_up(tokens))


def fixed_capacities(
    spec: MaskingSpec, batch_size: int, micro_batches: int, spreads: tuple[float, ...] = SIZES
) -> Capacities:
    """The sizes of micro-batches whose samples are dealt evenly.

    The mean, and so many standard deviations (ascending) of the step's total, over its micro-batches; rounded up to
    `GRANULE`, at most what the spec's ranges allow. A function of its arguments only, so that a resumed run has the
    same shapes.
    """
    drawn = drawn_counts(spec, seed=0, sample_ids=np.arange(_DRAWS))
    samples = batch_size * micro_batches
    sides = []
    for counts, (_, most) in zip(drawn, (spec.input_tokens_range, spec.target_tokens_range), strict=True):
        tokens = counts.sum(1)
        totals = (samples * tokens.mean() + spread * tokens.std() * math.sqrt(samples) for spread in spreads)
        limit = batch_size * min(most, spec.num_tokens)
        sides.append(tuple(sorted({round_up(min(total / micro_batches, limit)) for total in totals})))
    return Capacities(*sides)


def round_up(tokens: float) -> int:
    """The next multiple of `GRANULE`, at least one."""
    return GRANULE * max(1, math.ceil(tokens / GRANULE))


def deal(tokens: np.ndarray, micro_batches: int, capacity: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Deal samples to micro-batches of one size so that the inputs and the targets of each fit a capacity.

    Largest first to the emptiest micro-batch; then, until all fit, exchanges of two samples between the fullest
    micro-batch and another, while that makes the fullest less full. "Full" is the larger of its shares of both
    capacities. Deterministic: ties go to the lowest index.

    Args:
        tokens: integer (S, 2), inputs and targets of each sample.
        micro_batches: their number A, a divisor of S.
        capacity: (inputs, targets) that a micro-batch should not exceed.

    Returns:
        int64 (A, S / A), indices of the samples, ascending within a micro-batch, every sample exactly once; and the
        capacity that holds them all: the given one, or where the samples are too many for it the next that does.

    Raises:
        ValueError: the samples cannot be divided so.
    """
    samples = len(tokens)
    if micro_batches < 1 or samples % micro_batches:
        raise ValueError(f"{samples} samples cannot be dealt to {micro_batches} micro-batches of one size")
    size = samples // micro_batches
    shares = tokens / np.array(capacity, dtype=np.float64)
    load = np.zeros((micro_batches, 2))
    dealt = np.empty((micro_batches, size), dtype=np.int64)
    filled = np.zeros(micro_batches, dtype=np.int64)
    for sample in np.argsort(-shares.sum(1), kind="stable"):
        after = (load + shares[sample]).max(1)
        after[filled == size] = np.inf
        to = int(after.argmin())
        dealt[to, filled[to]] = sample
        filled[to] += 1
        load[to] += shares[sample]
    while shares[dealt].sum(1).max(initial=0.0) > 1.0 and _exchange(dealt, shares):
        pass
    dealt.sort(axis=1)
    needed = tokens[dealt].sum(1).max(0, initial=0)
    fitting = [
        given if need <= given else round_up(need) for need, given in zip(needed.tolist(), capacity, strict=True)
    ]
    return dealt, (fitting[0], fitting[1])


def _exchange(dealt: np.ndarray, shares: np.ndarray) -> bool:
    """Exchange the two samples that relieve the fullest micro-batch most; False when nothing relieves it noticeably."""
    load = shares[dealt].sum(1)  # (A, 2)
    fullest = int(load.max(1).argmax())
    best, chosen = load[fullest].max() - 1e-4, None  # a token of 10,000: less is not worth another round
    fullest_shares = shares[dealt[fullest]]
    for other in range(len(dealt)):
        if other == fullest:
            continue
        change = shares[dealt[other]][None] - fullest_shares[:, None]  # (size, size, 2), what the fullest gains
        worse = np.maximum((load[fullest] + change).max(2), (load[other] - change).max(2))
        i, j = np.unravel_index(int(worse.argmin()), worse.shape)
        if worse[i, j] < best:
            best, chosen = worse[i, j], (other, i, j)
    if chosen is None:
        return False
    other, i, j = chosen
    dealt[fullest, i], dealt[other, j] = dealt[other, j], dealt[fullest, i]
    return True
