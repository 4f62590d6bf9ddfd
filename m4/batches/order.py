"""The order of the training samples: which row of the store every position holds."""

from __future__ import annotations

import math

import numpy as np

from m4.config import ORDERS

# On six rows, where a permutation mixes worst, all 720 orders are within 4e-4 of equally likely (total variation,
# computed over all round functions); domains of other sizes are nearer.
ROUNDS = 24
_GAMMA, _FIRST, _SECOND = (
    np.uint64(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # of SplitMix64


class SampleOrder:
    """Position g holds row ``perm_e[g % N]`` of epoch ``e = g // N``: each epoch is a permutation of all N rows.

    The permutation is a pure function of (seed, epoch), in integer arithmetic that is the same on every machine, so a
    run resumes at any position and any number of ranks reads the same samples.

    Args:
        num_rows: N, at least 1.
        seed: at least 0.
        kind: one of ORDERS.
    Raises:
        ValueError: an argument that is none of these.
    """

    def __init__(self, num_rows: int, seed: int, kind: str = ORDERS[0]):
        if num_rows < 1:
            raise ValueError(f"num_rows: expected at least one row, got {num_rows}")
        if kind not in ORDERS:
            raise ValueError(f"kind: expected {' or '.join(ORDERS)}, got {kind!r}")
        self.num_rows, self.seed, self.kind = num_rows, seed, kind
        self._permutations: dict[int, np.ndarray] = {}

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows (int64, same shape) at positions (int64, any shape and order, at least 0)."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size == 0:
            return positions.copy()
        epochs, offsets = np.divmod(positions.ravel(), self.num_rows)
        different, which = np.unique(epochs, return_inverse=True)
        if self.kind == "sorted":
            rows = np.empty_like(offsets)
            for index, epoch in enumerate(different.tolist()):
                rows[which == index] = self._sorted(epoch)[offsets[which == index]]
        else:
            # (ROUNDS, 1) or (ROUNDS, positions): a batch of a small data set spans many epochs.
            keys = np.stack([_philox(self.seed, epoch, ROUNDS) for epoch in different.tolist()], axis=-1)
            keys = keys[:, which] if len(different) > 1 else keys
            rows = permuted(offsets.astype(np.uint64), self.num_rows, keys).astype(np.int64)
        return rows.reshape(positions.shape)

    def _sorted(self, epoch: int) -> np.ndarray:
        """The rows in the order of random words: NumPy promises these, but not those of ``Generator.permutation``."""
        if epoch not in self._permutations:
            words = _philox(self.seed, epoch, self.num_rows)
            # A batch may straddle two epochs; older ones are not needed again.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = np.argsort(words, kind="stable")
        return self._permutations[epoch]


def permuted(numbers: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a permutation of [0, size) takes each of ``numbers``, uint64 (n,); ``keys`` uint64 (ROUNDS, 1 or n).

    A Feistel network on the pairs (left, right) of Z_a × Z_b, a · b >= size, whose rounds add a random function of one
    half to the other; what lands outside goes through it again until it lands inside (cycle walking). Black, Rogaway,
    "Ciphers with Arbitrary Finite Domains", CT-RSA 2002. The function of round i is the word number ``right`` of
    SplitMix64 seeded with key i (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014),
    scaled to [0, a) by its upper 32 bits. a is even: with two odd halves only even permutations would come out.
    """
    a = math.isqrt(size - 1) + 1
    a += a % 2
    b = -(-size // a)
    if size > 1 << 62:
        raise ValueError(f"size: expected at most 2^62 rows, got {size}")
    result = np.empty_like(numbers)
    places, walking = np.arange(len(numbers)), numbers
    while len(places):
        walking = _network(walking, a, b, keys)
        inside = walking < size
        result[places[inside]] = walking[inside]
        places, walking = places[~inside], walking[~inside]
        keys = keys if keys.shape[1] == 1 else keys[:, ~inside]
    return result


def _network(numbers: np.ndarray, a: int, b: int, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(numbers, np.uint64(b))
    for i in range(0, ROUNDS, 2):
        left = _add(left, right, keys[i], np.uint64(a))
        right = _add(right, left, keys[i + 1], np.uint64(b))
    return left * np.uint64(b) + right


def _add(half: np.ndarray, other: np.ndarray, key: np.ndarray, modulus: np.uint64) -> np.ndarray:
    """half + function(other) modulo ``modulus``."""
    word = other * _GAMMA
    word += key
    word ^= word >> np.uint64(30)
    word *= _FIRST
    word ^= word >> np.uint64(27)
    word *= _SECOND
    word ^= word >> np.uint64(31)
    word >>= np.uint64(32)
    word *= modulus
    word >>= np.uint64(32)
    word += half
    return np.minimum(word, word - modulus)  # a difference below 0 wraps round to a large number


def _philox(seed: int, epoch: int, words: int) -> np.ndarray:
    """Raw Philox words, which NumPy promises for all versions and machines."""
    return np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(words)
