"""The training order: every row once an epoch, at any position, whatever was read before, as if drawn at random."""

import math
import tracemalloc
from itertools import pairwise, permutations

import numpy as np
import pytest

from m4.batches.order import ORDERS, ROUNDS, SampleOrder, permuted


def keys_of(seeds: int) -> np.ndarray:
    """The keys of the first epoch of so many seeds, (ROUNDS, seeds)."""
    keys = [np.random.Philox(key=np.array([s, 0], np.uint64)).random_raw(ROUNDS) for s in range(seeds)]
    return np.stack(keys, axis=-1)


def orders_of(size: int, seeds: int) -> np.ndarray:
    """The first epoch of ``size`` rows for so many seeds, (seeds, size)."""
    numbers = np.tile(np.arange(size, dtype=np.uint64), seeds)
    return permuted(numbers, size, np.repeat(keys_of(seeds), size, axis=1)).reshape(seeds, size).astype(int)


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
def test_every_epoch_is_a_permutation(rows, kind):
    order = SampleOrder(rows, seed=3, kind=kind)
    for epoch in range(3):
        seen = order.rows(np.arange(rows) + epoch * rows)
        assert seen.dtype == np.int64
        assert sorted(seen) == list(range(rows))


def test_every_number_of_rows():
    for rows in [*range(1, 300), *range(300, 4200, 41), 4095, 4096, 4097]:
        seen = SampleOrder(rows, seed=rows).rows(np.arange(rows))
        assert np.bincount(seen, minlength=rows).tolist() == [1] * rows


@pytest.mark.parametrize("kind", ORDERS)
def test_order_of_reading_does_not_matter(kind):
    positions = np.arange(500)
    together = SampleOrder(37, 5, kind).rows(positions)
    backwards = SampleOrder(37, 5, kind)
    assert [backwards.rows(np.array([g]))[0] for g in positions[::-1]] == list(together[::-1])
    shuffled = np.random.default_rng(0).permutation(positions)
    np.testing.assert_array_equal(SampleOrder(37, 5, kind).rows(shuffled), together[shuffled])
    np.testing.assert_array_equal(SampleOrder(37, 5, kind).rows(positions.reshape(50, 10)), together.reshape(50, 10))
    assert SampleOrder(37, 5, kind).rows(np.zeros((0, 3), int)).shape == (0, 3)


@pytest.mark.parametrize("kind", ORDERS)
def test_a_batch_larger_than_the_data_and_a_far_position(kind):
    order = SampleOrder(3, 0, kind)
    far = 10**15
    np.testing.assert_array_equal(order.rows(np.arange(far, far + 20))[5:], order.rows(np.arange(far + 5, far + 20)))


@pytest.mark.parametrize("kind", ORDERS)
def test_seeds_and_epochs_differ(kind):
    first = SampleOrder(1000, 0, kind)
    assert (first.rows(np.arange(1000)) != first.rows(np.arange(1000, 2000))).any()
    assert (first.rows(np.arange(1000)) != SampleOrder(1000, 1, kind).rows(np.arange(1000))).any()


def test_golden_rows():
    """The order is part of what a checkpoint means: a change here breaks the resumption of every run."""
    assert SampleOrder(10, seed=0).rows(np.arange(10)).tolist() == [2, 4, 5, 8, 3, 7, 1, 9, 6, 0]
    assert SampleOrder(10, 0, "sorted").rows(np.arange(10)).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def plain(position: int, rows: int, seed: int) -> int:
    """The order in Python's own integers."""
    epoch, number = divmod(position, rows)
    keys = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(ROUNDS).tolist()
    a = next(a for a in range(2, 2**32, 2) if a * a >= rows) if rows < 10**6 else 31_624
    b = -(-rows // a)
    while True:
        halves, sizes = list(divmod(number, b)), (a, b)
        for index, key in enumerate(keys):
            word = (halves[1 - index % 2] * 0x9E3779B97F4A7C15 + key) % 2**64  # SplitMix64
            word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
            word ^= word >> 31
            size = sizes[index % 2]
            halves[index % 2] = (halves[index % 2] + ((word >> 32) * size >> 32)) % size
        number = halves[0] * b + halves[1]
        if number < rows:
            return number


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 101, 4097, 10**9])
def test_integer_arithmetic_as_it_is_described(rows):
    positions = [0, 1, rows - 1, rows, 5 * rows + rows // 2, 10**17, 10**17 + 1]
    assert SampleOrder(rows, seed=7).rows(np.array(positions)).tolist() == [plain(p, rows, 7) for p in positions]


@pytest.mark.parametrize("rows", [10**9, 2**62])
def test_more_rows_than_memory(rows):
    """No two of many positions share a row, and a batch needs no memory to speak of."""
    positions = 200_000
    seen = SampleOrder(rows, seed=1).rows(np.arange(positions) * (rows // positions))
    assert seen.min() >= 0
    assert seen.max() < rows
    assert len(np.unique(seen)) == positions
    # Spread evenly: counts of 1,000 stretches of the rows.
    counts, expected = np.bincount(seen // -(-rows // 1000), minlength=1000), positions / 1000
    assert_like_chi_square(((counts - expected) ** 2 / expected).sum(), 999)
    tracemalloc.start()
    SampleOrder(rows, seed=1).rows(np.arange(512))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def assert_like_chi_square(statistic: float, freedom: int):
    """Within five standard deviations (of the normal approximation to the cube root) of its distribution."""
    spread = math.sqrt(2 / (9 * freedom))
    assert abs((statistic / freedom) ** (1 / 3) - (1 - spread**2)) < 5 * spread


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6])
def test_all_orders_are_equally_likely(rows):
    """Six rows is where the rounds mix slowest: eight of them fail here by far."""
    seeds = 30_000
    numbers = {order: index for index, order in enumerate(permutations(range(rows)))}
    counts = np.bincount([numbers[tuple(order)] for order in orders_of(rows, seeds).tolist()], minlength=len(numbers))
    expected = seeds / len(numbers)
    assert_like_chi_square(((counts - expected) ** 2 / expected).sum(), len(numbers) - 1)


@pytest.mark.parametrize("rows", [9, 25, 60])
def test_all_rows_are_equally_likely_at_all_positions(rows):
    seeds = 5_000
    found = orders_of(rows, seeds)
    for apart in (0, 1):  # a position's row, and the distance to the row of the next position
        value = found if apart == 0 else (np.roll(found, -1, axis=1) - found) % rows
        counts = np.stack([np.bincount(column, minlength=rows) for column in value.T])[:, apart:]
        expected = seeds / (rows - apart)
        # Sums of rows (and of columns, for a permutation) are fixed.
        freedom = (rows - 1) ** 2 if apart == 0 else rows * (rows - 2)
        scale = (rows - 1) / rows if apart == 0 else (rows - 2) / (rows - 1)
        statistic = ((counts - expected) ** 2 / expected).sum()
        if apart == 0:
            assert_like_chi_square(statistic * scale, freedom)
        else:  # distances of one order depend on each other: a wider bound, which structure exceeds by far
            assert 0.8 < statistic / freedom < 1.25


def structure(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Figures of two orders of N rows that are near 0 for independent ones, in standard deviations."""
    rows = len(first)
    shifts = np.bincount((second - first) % rows, minlength=rows)
    place = np.empty(rows, int)
    place[second] = np.arange(rows)
    neighbours = np.abs(np.diff(place[first])) == 1  # side by side in both: 2 expected
    return {
        "correlation": np.corrcoef(first, second)[0, 1] * math.sqrt(rows - 1),
        "same place": (first == second).sum() - 1.0,
        "one shift": shifts.max() - 5.5,  # the largest of 1,000 Poisson(1) counts is mostly 5 or 6
        "neighbours": (neighbours.sum() - 2.0) / math.sqrt(2),
        "runs": ((np.abs(np.diff(second)) == 1).sum() - 2.0) / math.sqrt(2),
    }


def test_consecutive_epochs_have_nothing_in_common():
    rows, epochs = 1000, 200
    order = SampleOrder(rows, seed=11).rows(np.arange(rows * epochs)).reshape(epochs, rows)
    figures = [structure(one, other) for one, other in pairwise(order)]
    for name in figures[0]:
        values = np.array([figure[name] for figure in figures])
        assert abs(values.mean()) < (0.6 if name == "one shift" else 5 / math.sqrt(epochs)), name
        assert np.abs(values).max() < 7, name
    # And would be seen if they had: an order turned by some places, one that shifts every row, one read backwards.
    for other in (np.roll(order[0], 5), (order[0] + 7) % rows, order[0][::-1]):
        assert max(map(abs, structure(order[0], other).values())) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0), "num_rows"), ((5, 0, "random"), "kind: expected feistel or sorted, got 'random'")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleOrder(*arguments)
