"""The order of the training samples: which row of the store every position holds."""

from __future__ import annotations

import numpy as np


class SampleOrder:
    """Position g holds row ``perm_e[g % N]`` of epoch ``e = g // N``: each epoch is a permutation of all N rows.

    The permutation is a pure function of (seed, epoch), so a run resumes at any position and any number of ranks
    reads the same samples. It sorts raw Philox words: NumPy promises their values for all versions and machines,
    which it does not for ``Generator.permutation``.
    """

    def __init__(self, num_rows: int, seed: int):
        if num_rows < 1:
            raise ValueError(f"num_rows: expected at least one row, got {num_rows}")
        self.num_rows = num_rows
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows (int64, same shape) at positions (int64, any shape and order, at least 0)."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.num_rows)
        rows = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = self._permutation(int(epoch))[offsets[epochs == epoch]]
        return rows

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            words = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(self.num_rows)
            # A batch may straddle two epochs; older ones are not needed again.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = np.argsort(words, kind="stable")
        return self._permutations[epoch]
