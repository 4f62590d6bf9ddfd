"""Capacities and the dealing of samples to micro-batches."""

import numpy as np
import pytest
import torch

from m4.batches.packing import GRANULE, Capacities, deal, drawn_counts, fixed_capacities, round_up
from m4kernels import MaskingSpec, mask_tokens
from m4kernels.cases import M4_MASKING as M4


def m4_tokens(first: int, samples: int) -> np.ndarray:
    """(samples, 2) inputs and targets under the M4 recipe."""
    drawn = drawn_counts(M4, seed=0, sample_ids=np.arange(first, first + samples))
    return np.stack([counts.sum(1) for counts in drawn], axis=1)


def test_drawn_counts_are_those_of_the_masks(monkeypatch):
    monkeypatch.setenv("M4KERNELS_BACKEND", "triton")  # of the device; counts are drawn on the host all the same
    ids = np.array([5, 2**40, 0])
    inputs, targets = drawn_counts(M4, seed=3, sample_ids=ids)
    tokens = torch.randint(0, 100, (3, M4.num_tokens))
    batch = mask_tokens(tokens, M4, seed=3, sample_ids=torch.from_numpy(ids), backend="reference")
    np.testing.assert_array_equal(inputs, batch.encoder.segments.counts)
    np.testing.assert_array_equal(targets, batch.decoder.segments.counts)


@pytest.mark.parametrize("seed", range(30))
def test_dealing_is_a_partition_that_fits(seed):
    """Any lengths, many of them extreme: every sample once, equal sizes, nothing beyond the returned capacity."""
    random = np.random.default_rng(seed)
    groups, size = int(random.integers(1, 7)), int(random.integers(1, 20))
    tokens = random.integers(0, random.choice([2, 10, 300]), (groups * size, 2))
    tokens[random.random(len(tokens)) < 0.2] = 0
    capacity = round_up(random.integers(1, 2000)), round_up(random.integers(1, 2000))
    dealt, fitting = deal(tokens, groups, capacity)
    assert dealt.shape == (groups, size)
    np.testing.assert_array_equal(np.sort(dealt.ravel()), np.arange(groups * size))
    assert (tokens[dealt].sum(1) <= fitting).all()
    for given, got in zip(capacity, fitting, strict=True):
        assert got == given or (got > given and got % GRANULE == 0)
    again, fitting_again = deal(tokens.copy(), groups, capacity)
    np.testing.assert_array_equal(dealt, again)
    assert fitting == fitting_again


def test_dealing_fits_wherever_the_totals_nearly_do():
    """With 0.5 % of room and many samples, dealing never needs a larger capacity; stream order does."""
    in_order = 0
    for seed in range(12):
        tokens = m4_tokens(1000 * seed, 480)
        need = np.ceil(tokens.sum(0) / 5 * 1.005).astype(int)
        _, fitting = deal(tokens, 5, (int(need[0]), int(need[1])))
        assert fitting == tuple(need)
        in_order += bool((tokens.reshape(5, 96, 2).sum(1) > need).any())
    assert in_order == 12


def test_dealing_refuses_what_cannot_be_divided():
    with pytest.raises(ValueError, match="10 samples cannot be dealt to 4"):
        deal(np.ones((10, 2)), 4, (128, 128))


def test_capacities_of_the_recipe():
    """The largest close to the mean, wide enough for nearly all steps; the same on every call."""
    capacities = fixed_capacities(M4, 96, 5)
    assert capacities == fixed_capacities(M4, 96, 5)
    assert all(c % GRANULE == 0 for side in (capacities.inputs, capacities.targets) for c in side)
    tokens = m4_tokens(10**6, 480 * 20).reshape(20, 480, 2)
    mean = tokens.sum((0, 1)) / (20 * 5)
    assert (capacities.largest < 1.09 * mean).all()
    assert sum(deal(step, 5, capacities.largest)[1] != capacities.largest for step in tokens) <= 1
    # Never more than the ranges allow, whatever the spread.
    narrow = MaskingSpec((10, 10), (1.0, 1.0), (1.0, 1.0), (10, 10), (4, 4))
    assert fixed_capacities(narrow, 64, 1) == Capacities((640,), (256,))


@pytest.mark.parametrize("micro_batches", [1, 5])
def test_steps_that_take_the_smallest_size_leave_little_empty(micro_batches):
    """Less than half of what the largest size alone leaves, in the mean of 60 steps."""
    capacities = fixed_capacities(M4, 96, micro_batches)
    tokens = m4_tokens(2 * 10**6, 60 * 96 * micro_batches).reshape(60, 96 * micro_batches, 2)
    totals = tokens.sum(1) / micro_batches
    empty = np.array([capacities.fitting(*total) for total in totals]) - totals
    assert (empty >= 0).all()
    alone = np.array(capacities.largest) - totals
    assert (empty.mean(0) < 0.5 * alone.mean(0)).all()
    assert len(capacities.pairs()) == 9


def test_fitting_sizes():
    capacities = Capacities((128, 256), (128, 512))
    assert capacities.largest == (256, 512)
    assert capacities.pairs() == [(128, 128), (128, 512), (256, 128), (256, 512)]
    assert capacities.fitting(128, 129) == (128, 512)
    assert capacities.fitting(128.5, 0) == (256, 128)
    assert capacities.fitting(257, 1000) == (384, 1024)
