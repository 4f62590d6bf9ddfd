"""The training order: every row once an epoch, at any position, whatever was read before."""

import numpy as np
import pytest

from m4.batches.order import SampleOrder


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
def test_every_epoch_is_a_permutation(rows):
    order = SampleOrder(rows, seed=3)
    for epoch in range(3):
        seen = order.rows(np.arange(rows) + epoch * rows)
        assert sorted(seen) == list(range(rows))


def test_order_of_reading_does_not_matter():
    positions = np.arange(500)
    together = SampleOrder(37, seed=5).rows(positions)
    backwards = SampleOrder(37, seed=5)
    assert [backwards.rows(np.array([g]))[0] for g in positions[::-1]] == list(together[::-1])
    shuffled = np.random.default_rng(0).permutation(positions)
    np.testing.assert_array_equal(SampleOrder(37, seed=5).rows(shuffled), together[shuffled])


def test_a_batch_larger_than_the_data_and_a_far_position():
    order = SampleOrder(3, seed=0)
    far = 10**15
    np.testing.assert_array_equal(order.rows(np.arange(far, far + 20))[5:], order.rows(np.arange(far + 5, far + 20)))


def test_seeds_and_epochs_differ():
    first = SampleOrder(1000, seed=0)
    assert (first.rows(np.arange(1000)) != first.rows(np.arange(1000, 2000))).any()
    assert (first.rows(np.arange(1000)) != SampleOrder(1000, seed=1).rows(np.arange(1000))).any()


def test_golden_rows():
    """The order is part of what a checkpoint means: a change here breaks the resumption of every run."""
    assert SampleOrder(10, seed=0).rows(np.arange(10)).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_no_rows():
    with pytest.raises(ValueError, match="num_rows"):
        SampleOrder(0, seed=0)
