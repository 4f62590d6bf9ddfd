"""The integer tables of mask_tokens against mpmath and SciPy, and the draws made from them."""

import mpmath
import numpy as np
import pytest
import scipy.special
import torch

from m4kernels.ops.mask_tokens import make_tables, reference, tables

CPU = torch.device("cpu")


def test_committed_tables_are_what_the_generator_makes() -> None:
    """One small, one usual and one large alpha; all were made by the same program, and the digest guards the rest."""
    for alpha in (0.05, 1.5, 10.0):
        committed = tables.gamma_tables((alpha,), CPU)[0]
        assert torch.equal(committed, torch.from_numpy(make_tables.make_gamma_table(alpha)))
    assert torch.equal(tables.exp2_table(CPU), torch.from_numpy(make_tables.make_exp2_table()))


def test_damaged_tables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "DIGEST", "0" * 64)
    with pytest.raises(RuntimeError, match=r"tables.npz is damaged or from another version; reinstall"):
        tables._committed.__wrapped__()


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.5, 1.0, 1.5, 10.0, 100.0, 1000.0])
def test_knots_are_correctly_rounded(alpha: float) -> None:
    """At the exact rounding boundaries below and above an entry, mpmath's own incomplete Gamma function lies on the
    right sides of the knot's probability."""
    table = tables.gamma_tables((alpha,), CPU)[0]
    mp = mpmath.MPContext()
    mp.prec = 160
    for k in (0, 1, 63, 64, 700, 1500, 1983, 2000, 2047, 2048):
        v = mp.ldexp(mp.mpf(64 + k % 64), k // 64 - 6)
        for tail in (0, 1):
            entry = int(table[tail, k])
            if entry == make_tables.GAMMA_FLOOR:
                continue
            low, high = (mp.power(2, mp.mpf(entry + half) / 2**20) for half in (-0.5, 0.5))
            bounds = {"a": 0, "b": None} if tail == 0 else {"a": None, "b": mp.inf}

            def probability(x: mpmath.mpf, bounds: dict = bounds) -> mpmath.mpf:
                ends = {name: x if end is None else end for name, end in bounds.items()}
                return mp.gammainc(alpha, **ends, regularized=True)

            p_low, p_high = sorted((probability(low), probability(high)))
            assert p_low < v / 2**33 < p_high


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.5, 1.0, 1.5, 5.0, 137.5])
def test_draws_follow_the_gamma_distribution(alpha: float) -> None:
    """The error of the distribution function is at most 2e-5, also within the tails relative to their probability."""
    g = torch.Generator().manual_seed(0)
    near_zero = torch.arange(2000)
    words = torch.cat([near_zero, 2**32 - 1 - near_zero, torch.randint(0, 2**32, (50_000,), generator=g)])
    draws = reference.log_gamma_draw(words, tables.gamma_tables((alpha,), CPU)[0]).double().numpy() / 2**20
    v = 2 * words.numpy() + 1
    lower = v < 2**32
    x = np.exp2(draws)
    p = np.where(lower, scipy.special.gammainc(alpha, x), scipy.special.gammaincc(alpha, x))
    wanted = np.where(lower, v, 2**33 - v) / 2**33
    measurable = x > 1e-300
    assert (np.abs(p - wanted) / wanted)[measurable].max() < 1e-4
    assert np.abs(p - wanted)[measurable].max() < 2e-5
    order = np.argsort(words.numpy())
    assert (np.diff(draws[order]) >= 0).all()  # monotonic, across octaves and tails too


def test_an_alpha_without_a_committed_table_is_served() -> None:
    alpha = 0.123456789
    assert alpha not in tables.COMMITTED_ALPHAS
    table = tables.gamma_tables((alpha,), CPU)[0].numpy()
    k = np.arange(0, make_tables.KNOTS, 7)
    v = np.ldexp(64.0 + k % 64, k // 64 - 6) / 2**33
    assert np.abs(np.log2(scipy.special.gammainccinv(alpha, v)) * 2**20 - table[1, k]).max() < 0.51
    assert np.abs(np.log2(scipy.special.gammaincinv(alpha, v)) * 2**20 - table[0, k]).max() < 0.51
