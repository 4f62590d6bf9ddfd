"""The strongest baseline that only copies: how far joints moved between the frames of the training set.

It is a probability of every token of the next pose given the reference pose, joint by joint, so that its nats compare
with a model's: P(visible' | visible), then P(x' | x, visible, visible') and the same of y. Where a joint is visible in
both frames, P(x' | x) is the histogram of the displacement x' − x over the training set; else what its hidden token is
depends on the data (a label outside the window, at the origin, or a guess), and the histogram of x' itself is mixed in.

A histogram is smoothed by mixing it with its running means over windows of several widths and with the uniform
distribution. Expectation maximisation finds the weights under which each training displacement is likeliest given all
others (leave one out), for every joint, axis and visibility on its own; nothing of an evaluation set is looked at.
What a displacement would carry off the scale is cut away: probabilities are normalised over the bins that exist.
"""

from __future__ import annotations

import numpy as np

_REACHES = tuple((1 << power) - 1 for power in range(11))  # bins to either side of a window: 0, 1, 3 … 1,023 (32 px)
_ROUNDS = 100  # of expectation maximisation
_VISIBLE_BOTH = 3  # of the four cases 2 · visible + visible'


class DisplacementHistogram:
    """P(next pose | reference pose) as the training set has it.

    Args:
        reference, following: integer (N, 3·J) tokens of the training set's pairs, rows x, y, visibility 0 or 1.
        bins: of x and y; their tokens are below it.
    """

    def __init__(self, reference: np.ndarray, following: np.ndarray, bins: int) -> None:
        self.bins = bins
        here, there = _rows(reference), _rows(following)
        joints = here.shape[2]
        case = 2 * here[:, 2] + there[:, 2]  # (N, J)
        counts = np.stack([(case == c).sum(0) for c in range(4)]).reshape(2, 2, joints)
        self._visibility = (counts + 0.5) / (counts.sum(1, keepdims=True) + 1)  # (visible, visible', J)
        # Of the step x' − x + bins − 1 the running sum, and of x' the share that does not depend on x.
        self._steps = np.zeros((4, 2, joints, 2 * bins))
        self._places = np.zeros((4, 2, joints, bins))
        for c in range(4):
            for joint in range(joints):
                chosen = case[:, joint] == c
                for axis in range(2):
                    start, end = here[chosen, axis, joint], there[chosen, axis, joint]
                    steps, places = _smoothed(start, end, bins, with_places=c != _VISIBLE_BOTH)
                    self._steps[c, axis, joint, 1:] = steps.cumsum()
                    self._places[c, axis, joint] = places

    def probabilities(self, case: int, axis: int, joint: int, start: int) -> np.ndarray:
        """float64 (bins,): of every bin that a joint may be in next, on an axis (0: x, 1: y) where it is in ``start``.

        case: 2 · visible + visible'.
        """
        steps = np.diff(self._steps[case, axis, joint])[self.bins - 1 - start : 2 * self.bins - 1 - start]
        weights = steps + self._places[case, axis, joint]
        return weights / weights.sum()

    def draw(self, reference: np.ndarray, futures: int, seed: int) -> np.ndarray:
        """Next poses drawn given each reference, every joint and axis on its own.

        Drawn is where a joint is if it stays visible, which all joints do that an error is taken of; its visibility is
        not drawn, but 1. A pair's draws do not depend on the pairs after it.

        Args:
            reference: integer (N, 3·J).
        Returns:
            int64 (futures, N, 3·J).
        """
        here = _rows(reference)
        chance = np.random.default_rng(seed).random((len(here), 2, here.shape[2], futures))
        drawn = np.ones((futures, *here.shape), dtype=np.int64)
        for n, axis, joint in np.ndindex(chance.shape[:3]):
            p = self.probabilities(_VISIBLE_BOTH, axis, joint, int(here[n, axis, joint]))
            drawn[:, n, axis, joint] = np.searchsorted(p.cumsum(), chance[n, axis, joint], side="right")
        return drawn.clip(max=self.bins - 1).reshape(futures, len(here), -1)

    def nats(self, reference: np.ndarray, following: np.ndarray) -> np.ndarray:
        """float64 (N, 3·J): −log P of every token of ``following`` given ``reference``, integer (N, 3·J) both."""
        here, there = _rows(reference), _rows(following)
        joint = np.arange(here.shape[2])
        case = 2 * here[:, 2] + there[:, 2]
        nats = np.empty(here.shape)
        nats[:, 2] = -np.log(self._visibility[here[:, 2], there[:, 2], joint])
        for axis in range(2):
            start, end = here[:, axis], there[:, axis]
            step = end - start + self.bins - 1

            def running(place: np.ndarray, axis: int = axis) -> np.ndarray:
                return self._steps[case, axis, joint, place]

            weight = running(step + 1) - running(step) + self._places[case, axis, joint, end]
            reachable = running(2 * self.bins - 1 - start) - running(self.bins - 1 - start)
            places = self._places.sum(-1)[case, axis, joint]
            nats[:, axis] = -np.log(weight / (reachable + places))
        return nats.reshape(len(nats), -1)


def _rows(tokens: np.ndarray) -> np.ndarray:
    """int64 (N, 3, J)."""
    return np.asarray(tokens, dtype=np.int64).reshape(len(tokens), 3, -1)


def _smoothed(start: np.ndarray, end: np.ndarray, bins: int, *, with_places: bool) -> tuple[np.ndarray, np.ndarray]:
    """The mixture for one joint and axis: weights (2·bins − 1,) of the steps end − start, and (bins,) of the ends.

    start, end: (n,) bins of the training set; n may be 0. with_places: mix the histogram of the ends in.
    """
    histograms = [(end - start + bins - 1, 2 * bins - 1)] + ([(end, bins)] if with_places else [])
    likelihoods, parts = [np.full(len(end), 1 / bins)], []
    for values, size in histograms:
        counts = np.bincount(values, minlength=size)
        running = np.concatenate([[0], counts.cumsum()])
        for reach in _REACHES:
            low, high = np.arange(size) - reach, np.arange(size) + reach + 1
            within = running[high.clip(max=size)] - running[low.clip(min=0)]
            width = 2 * reach + 1
            parts.append((size, within / (max(1, len(end)) * width)))
            likelihoods.append((within[values] - 1) / (max(1, len(end) - 1) * width))
    weights = _mixing_weights(np.stack(likelihoods, axis=1))
    steps, places = np.zeros(2 * bins - 1), np.full(bins, weights[0] / bins)
    for weight, (size, part) in zip(weights[1:], parts, strict=True):
        if size == bins:
            places += weight * part
        else:
            steps += weight * part
    return steps, places


def _mixing_weights(likelihoods: np.ndarray) -> np.ndarray:
    """float64 (K,) > 0 that sum to 1, under which values of likelihoods (n, K) by component are likeliest; as if each
    component had one value more, so that none is ruled out by a small sample."""
    count, components = likelihoods.shape
    if not count:
        return np.eye(components)[0]  # the uniform one; the others have nothing to be made of
    kinds, times = np.unique(likelihoods, axis=0, return_counts=True)
    weights = np.full(components, 1 / components)
    for _ in range(_ROUNDS):
        shares = weights * kinds
        weights = times @ (shares / shares.sum(1, keepdims=True)) / count
    return (weights * count + 1) / (count + components)
