"""Distribution of mask_tokens' draws. Seeds are fixed, so nothing flakes: a bound of 5 standard errors, or a p-value of
1e-4, is met once and for all."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from m4kernels import MaskedBatch, MaskingSpec, mask_tokens
from m4kernels.cases import M4_INPUT_MEANS, M4_TARGET_MEANS
from m4kernels.cases import M4_MASKING as M4

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(spec: MaskingSpec, batch: int, seed: int = 0) -> MaskedBatch:
    tokens = torch.zeros(1, spec.num_tokens, dtype=torch.uint16).expand(batch, -1)
    return mask_tokens(tokens, spec, seed=seed, sample_ids=torch.arange(batch), backend="cpp")


def rule_in_numpy(rng: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """nano4M's budgets for M4, written with NumPy's Dirichlet: (inputs, targets) (samples, 4)."""

    def budgets(alphas: tuple[float, ...], low: int, high: int, available: np.ndarray) -> np.ndarray:
        n = rng.integers(low, high + 1, samples)
        shares = np.floor(rng.dirichlet(alphas, samples) * n[:, None]).astype(int)
        left = n - shares.sum(1)
        for i in range(len(alphas) - 1):
            extra = rng.dirichlet(alphas, samples).argmax(1)
            shares[np.arange(samples), extra] += left > i
        return np.minimum(shares, available)

    lens = np.array(M4.max_seq_lens)
    inputs = budgets(M4.input_alphas, *M4.input_tokens_range, lens)
    return inputs, budgets(M4.target_alphas, *M4.target_tokens_range, lens - inputs)


def test_budgets_follow_the_rule() -> None:
    batch = draw(M4, 100_000)
    expected = rule_in_numpy(np.random.default_rng(0), 100_000)
    halves = (batch.encoder, batch.decoder)
    for half, want, published in zip(halves, expected, (M4_INPUT_MEANS, M4_TARGET_MEANS), strict=True):
        counts = half.segments.counts.double().numpy()
        error = np.sqrt((counts.var(0) + want.var(0)) / 100_000)
        assert (np.abs(counts.mean(0) - want.mean(0)) < 5 * error).all()
        # The published means come from a run of unknown size; they agree to 3 % and half a token.
        assert np.allclose(counts.mean(0), published, rtol=0.03, atol=0.3)
        for m in range(4):  # whole distributions, not only means
            assert scipy.stats.ks_2samp(counts[:, m], want[:, m]).pvalue > 1e-4
    totals = (counts.sum(1) for counts in (halves[0].segments.counts, halves[1].segments.counts))
    for total, want in zip(totals, expected, strict=True):
        assert scipy.stats.ks_2samp(total.numpy(), want.sum(1)).pvalue > 1e-4


def test_sizes_are_uniform() -> None:
    # One long modality: nothing is clamped, so that the totals are n_in and n_out themselves.
    spec = MaskingSpec((100,), (1.0,), (1.0,), (3, 40), (10, 59))
    batch = draw(spec, 100_000)
    n_in, n_out = (half.segments.counts[:, 0].long() for half in (batch.encoder, batch.decoder))
    for n, (low, high) in ((n_in, spec.input_tokens_range), (n_out, spec.target_tokens_range)):
        observed = torch.bincount(n - low, minlength=high - low + 1)
        assert observed.shape == (high - low + 1,)
        assert scipy.stats.chisquare(observed).pvalue > 1e-4
    table = torch.zeros(38, 50).index_put_((n_in - 3, n_out - 10), torch.ones(100_000), accumulate=True)
    assert scipy.stats.chi2_contingency(table.numpy()).pvalue > 1e-4  # independent


def inclusion(half_positions: Tensor, sample: Tensor, batch: int, width: int) -> Tensor:
    """bool (batch, width): which positions are in."""
    grid = torch.zeros(batch, width, dtype=torch.bool)
    grid[sample, half_positions] = True
    return grid


def test_positions_are_a_uniform_random_subset() -> None:
    """Single and pairwise inclusion of 24 positions with 7 inputs and 9 targets."""
    width, samples = 24, 60_000
    batch = draw(MaskingSpec((width,), (1.0,), (1.0,), (7, 7), (9, 9)), samples)
    grids = [
        inclusion(half.positions, half.segments.sample_of_token(half.positions.shape[0]), samples, width).double()
        for half in (batch.encoder, batch.decoder)
    ]
    assert (grids[0] * grids[1]).sum() == 0
    for grid, k in zip(grids, (7, 9), strict=True):
        p = k / width
        pair = k * (k - 1) / (width * (width - 1))
        single = grid.mean(0)
        # The counts of a fixed-size subset have covariance p (1 - p) width / (width - 1) on their span.
        chi2 = (((single - p) ** 2) / (p * (1 - p))).sum() * samples * (width - 1) / width
        assert 1e-4 < scipy.stats.chi2.sf(chi2, width - 1) < 1 - 1e-4
        rows, columns = torch.triu_indices(width, width, 1)
        together = (grid.T @ grid / samples)[rows, columns]
        z = (together - pair) / (pair * (1 - pair) / samples) ** 0.5
        assert z.abs().max() < 4.5
        assert abs(z.square().mean() - 1) < 0.25
    cross = grids[0].T @ grids[1] / samples
    expected = 7 * 9 / (width * (width - 1))
    off = ~torch.eye(width, dtype=torch.bool)
    assert ((cross[off] - expected) / (expected * (1 - expected) / samples) ** 0.5).abs().max() < 4.5


@pytest.mark.parametrize("alphas", [(1.5, 1.5, 0.5, 0.5), (0.1, 0.2, 3.0), (5.0, 5.0), (0.05, 0.9, 40.0)])
def test_dirichlet_draws_against_torch(alphas: tuple[float, ...]) -> None:
    """With a budget of 250,000 tokens the shares are the Dirichlet draw to five digits: two-sample tests."""
    samples, budget = 40_000, 250_000
    spec = MaskingSpec((2**18,) * len(alphas), alphas, alphas, (budget, budget), (0, 0))
    counts = count_only(spec, samples).double() / budget
    torch.manual_seed(0)
    expected = torch.distributions.Dirichlet(torch.tensor(alphas, dtype=torch.float64)).sample((samples,))
    # Leftovers move a share by up to (M - 1) / budget; on a grid a hundred times coarser that is lost.
    counts, expected = (counts * 1000).round(), (expected * 1000).round()
    for m in range(len(alphas)):
        assert scipy.stats.ks_2samp(counts[:, m].numpy(), expected[:, m].numpy()).pvalue > 1e-4
    assert np.abs(np.corrcoef(counts.T) - np.corrcoef(expected.T)).max() < 5 * (2 / samples) ** 0.5
    winners = torch.stack([torch.bincount(x.argmax(1), minlength=len(alphas)) for x in (counts, expected)])
    assert scipy.stats.chi2_contingency(winners[:, winners.sum(0) > 20].numpy()).pvalue > 1e-4


def count_only(spec: MaskingSpec, samples: int) -> Tensor:
    """Input counts int64 (samples, M), without laying out the tokens."""
    from m4kernels.ops.mask_tokens import reference
    from m4kernels.ops.mask_tokens.plan import make_plan

    plan = make_plan(
        spec.max_seq_lens,
        spec.input_alphas,
        spec.target_alphas,
        spec.input_tokens_range + spec.target_tokens_range,
        torch.device("cpu"),
    )
    lengths = torch.tensor(spec.max_seq_lens).expand(samples, -1)
    return reference.draw_counts(reference.Draw(3, 0, torch.arange(samples)), plan, lengths)[0]


def test_leftovers_go_to_the_largest_fresh_draw() -> None:
    """With n_in = 1 nearly every token is a leftover, won by a modality as often as its Gamma draw is the largest."""
    alphas = (1.5, 0.5, 3.0)
    counts = draw(MaskingSpec((9, 9, 9), alphas, alphas, (1, 1), (0, 0)), 60_000).encoder.segments.counts
    assert (counts.sum(1) == 1).all()
    torch.manual_seed(1)
    gamma = torch.distributions.Gamma(torch.tensor(alphas), torch.ones(3)).sample((60_000,))
    both = torch.stack([counts.sum(0).long(), torch.bincount(gamma.argmax(1), minlength=3)])
    assert scipy.stats.chi2_contingency(both.numpy()).pvalue > 1e-4
