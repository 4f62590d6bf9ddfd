"""The displacement histogram: a probability of every token, smoothed by the training set alone."""

import numpy as np
import pytest

from m4.evaluation.displacement import DisplacementHistogram

BINS = 40


def pairs(samples, joints=2, seed=0, step=1):
    """Reference and next tokens: joints that move by at most ``step`` bins, some hidden, hidden ones in bin 0."""
    random = np.random.default_rng(seed)
    here = random.integers(0, BINS, (samples, 3, joints))
    there = (here + random.integers(-step, step + 1, here.shape)).clip(0, BINS - 1)
    for rows in (here, there):
        rows[:, 2] = random.random((samples, joints)) < 0.8
        rows[:, :2] *= rows[:, 2:]
    return here.reshape(samples, -1), there.reshape(samples, -1)


@pytest.mark.parametrize("samples", [1, 2, 300])
def test_a_probability_of_every_token(samples):
    """Sums to 1 over all that can be, whatever was seen in training and wherever the joint was."""
    histogram = DisplacementHistogram(*pairs(samples), BINS)
    for joint in range(2):
        for start in (0, 7, BINS - 1):
            for visible in (0, 1):
                reference = np.array([[start, 5, start, 5, visible, visible]])
                reference[0, [joint, 2 + joint, 4 + joint]] = start, start, visible
                total = 0.0
                for then in (0, 1):
                    after = np.tile(reference, (BINS, 1))
                    after[:, joint] = np.arange(BINS)
                    after[:, 4 + joint] = then
                    p = np.exp(-histogram.nats(np.tile(reference, (BINS, 1)), after))
                    assert (p > 0).all()
                    assert p[:, joint].sum() == pytest.approx(1)
                    case = 2 * visible + then
                    assert p[:, joint] == pytest.approx(histogram.probabilities(case, 0, joint, start))
                    assert histogram.probabilities(case, 1, joint, start).sum() == pytest.approx(1)
                    total += p[0, 4 + joint]
                assert total == pytest.approx(1)


def test_visibility_is_counted():
    """Of a joint visible in 3 pairs and hidden after 1 of them: (1 + ½) / (3 + 1)."""
    here = np.array([[1, 1, 1], [2, 2, 1], [3, 3, 1], [4, 4, 0]])
    there = here.copy()
    there[0, 2] = 0
    nats = DisplacementHistogram(here, there, BINS).nats(np.array([[9, 9, 1]] * 2), np.array([[9, 9, 0], [9, 9, 1]]))
    assert np.exp(-nats[:, 2]) == pytest.approx([1.5 / 4, 2.5 / 4])


def test_exact_nats_of_two_samples():
    """Two training pairs that do not move. Left out, each is foretold by the other best by the narrowest window,
    likelihood 1; expectation maximisation gives it all the weight, the 11 others that of one value more among 12."""
    here = np.array([[20, 20, 1], [30, 30, 1]])
    histogram = DisplacementHistogram(here, here, BINS)
    reaches = [2**k - 1 for k in range(11)]
    weights = np.array([1, 3] + [1] * 10) / 14  # uniform, still, wider windows

    def expected(start, step):
        def weight(d):
            return weights[0] / BINS + sum(
                w * (abs(d) <= reach) / (2 * reach + 1) for w, reach in zip(weights[1:], reaches, strict=True)
            )

        return weight(step) / sum(weight(end - start) for end in range(BINS))

    for start, step in ((20, 0), (20, 1), (0, 5), (39, -39)):
        nats = histogram.nats(np.array([[start, 3, 1]]), np.array([[start + step, 3, 1]]))
        assert np.exp(-nats[0, 0]) == pytest.approx(expected(start, step), rel=1e-6)
        assert np.exp(-nats[0, 1]) == pytest.approx(expected(3, 0), rel=1e-6)


def test_it_learns_how_far_joints_move():
    here, there = pairs(2000, step=1)
    near, far = pairs(400, seed=1, step=1), pairs(400, seed=2, step=15)
    histogram = DisplacementHistogram(here, there, BINS)
    assert histogram.nats(*near).mean() < 1.2
    assert histogram.nats(*far).mean() > histogram.nats(*near).mean() + 0.5
    # On pairs it has not seen it does nearly as well as on its own: nothing is learnt by heart.
    assert histogram.nats(*near).mean() == pytest.approx(histogram.nats(here, there).mean(), abs=0.05)


def test_the_evaluated_pairs_change_nothing():
    histogram = DisplacementHistogram(*pairs(50), BINS)
    first, second = pairs(9, seed=3), pairs(9, seed=4)
    together = histogram.nats(*(np.concatenate(both) for both in zip(first, second, strict=True)))
    assert np.array_equal(together[:9], histogram.nats(*first))
    assert np.array_equal(together[9:], histogram.nats(*second))


def test_draws_follow_the_probabilities():
    """The share of 20,000 draws in each bin is its probability, within five standard deviations."""
    histogram = DisplacementHistogram(*pairs(200, step=3), BINS)
    reference = np.array([[20, 3, 0, 39, 1, 1]])  # joint 1 at the edges
    drawn = histogram.draw(reference, 20_000, seed=0)
    assert drawn.shape == (20_000, 1, 6)
    assert (drawn[..., 4:] == 1).all()
    for axis, joint in np.ndindex(2, 2):
        p = histogram.probabilities(3, axis, joint, reference[0, 2 * axis + joint])
        share = np.bincount(drawn[:, 0, 2 * axis + joint], minlength=BINS) / 20_000
        assert (np.abs(share - p) <= 5 * np.sqrt(p / 20_000) + 1e-4).all()
    across = np.corrcoef(drawn[:, 0, :2].T)[0, 1]
    assert abs(across) < 5 / np.sqrt(20_000)  # joints are drawn each on its own


def test_draws_are_those_of_the_seed_and_of_the_pair():
    histogram = DisplacementHistogram(*pairs(50), BINS)
    reference = pairs(9, seed=3)[0]
    drawn = histogram.draw(reference, 4, seed=1)
    assert np.array_equal(histogram.draw(reference, 4, seed=1), drawn)
    assert np.array_equal(histogram.draw(reference[:5], 4, seed=1), drawn[:, :5])
    assert not np.array_equal(histogram.draw(reference, 4, seed=2), drawn)
    assert not np.array_equal(drawn[0], drawn[1])
