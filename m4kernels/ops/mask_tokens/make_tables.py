"""Makes the integer tables of mask_tokens, which tables.py keeps.

Every entry is the true value rounded to the nearest integer, and the margin to a tie is checked, so the tables do not
depend on the machine, the C library or the version of mpmath: a table made on demand is the table that would have been
committed.
"""

from fractions import Fraction

import mpmath
import numpy as np

OCTAVES = 32  # v, the odd 33-bit number of a 32-bit word, has its leading bit at 0 to 31 in either tail
KNOTS_PER_OCTAVE = 64
KNOTS = OCTAVES * KNOTS_PER_OCTAVE + 1
GAMMA_FRACTION_BITS = 20  # log2 of the Gamma quantile, Q20 in int32 ...
GAMMA_FLOOR = -(2**31)  # ... so quantiles below 2**-2048 count as that; at alpha 0.01 they have probability 6.5e-7
EXP2_KNOTS = 1025
EXP2_BITS = 30  # 2**-f for f in [0, 1], Q30

_PRECISION = 192  # bits of the computation
_NEWTON_BITS = 80  # Newton's method ends with an error below 2**-80
_TIE_BITS = 40  # entries may come no closer to a tie than 2**-40


def _round(value: mpmath.mpf) -> int:
    """The nearest integer, once it is certain which."""
    nearest = int(mpmath.floor(value + 0.5))
    if abs(abs(value - nearest) - 0.5) < mpmath.mpf(2) ** -_TIE_BITS:
        raise ArithmeticError(f"mask_tokens: the table entry {value} is too close to a tie to be rounded safely")
    return nearest


class _LogQuantile:
    """y = ln x with P(alpha, x) = p, for a p that moves in small steps.

    With T(x) = sum over n of x^n / ((alpha + 1) ... (alpha + n)), a series of positive terms,
    P(alpha, x) = x^alpha e^-x T(x) / Gamma(alpha + 1), and so
        ln P = alpha y - x + ln T - ln Gamma(alpha + 1),   d ln P / dy = alpha / T,   x T' = alpha + (x - alpha) T.
    ln P is concave in y, so Newton's method rises to the root from any point below it.
    """

    def __init__(self, alpha: float, mp: mpmath.MPContext) -> None:
        self.mp = mp
        self.alpha = mp.mpf(alpha)
        self.alpha_fixed = int(Fraction(alpha) * 2**_PRECISION)  # exact: a float64 from 0.01 has at most 59 such bits
        self.log_gamma = mp.loggamma(self.alpha + 1)
        self.log_p = mp.log(mp.mpf(1) / 2)
        self.y = (self.log_p + self.log_gamma) / self.alpha  # a lower bound, as P <= x^alpha / Gamma(alpha + 1)
        self._newton()

    def _series(self, x: mpmath.mpf) -> mpmath.mpf:
        """T(x), in fixed point."""
        one = 1 << _PRECISION
        x_fixed = int(self.mp.ldexp(x, _PRECISION))
        divisor, term, total = self.alpha_fixed, one, one
        while term:
            divisor += one
            term = term * x_fixed // divisor
            total += term
        return self.mp.ldexp(self.mp.mpf(total), -_PRECISION)

    def _newton(self) -> None:
        mp, alpha = self.mp, self.alpha
        while True:
            x = mp.exp(self.y)
            t = self._series(x)
            step = (self.log_p - (alpha * self.y - x + mp.log(t) - self.log_gamma)) * t / alpha
            self.y += step
            # The error left is at most |f'' / 2 f'| step^2, and |f'' / f'| = |alpha - x - alpha / T| <= x + 2 alpha.
            if step == 0 or float(x + 2 * alpha + 1) * float(step) ** 2 < 2.0**-_NEWTON_BITS:
                break
        self.slope = t / alpha  # dy / d ln p
        self.curvature = self.slope * (alpha + (x - alpha) * t) / alpha  # d slope / d ln p

    def move_to(self, p: mpmath.mpf) -> mpmath.mpf:
        log_p = self.mp.log(p)
        h = log_p - self.log_p
        self.log_p = log_p
        self.y += h * (self.slope + h * self.curvature / 2)
        self._newton()
        return self.y


def make_gamma_table(alpha: float) -> np.ndarray:
    """log2 of the quantile function of Gamma(alpha) at the knots of `reference.log_gamma`.

    Entry [tail, 64 e + j] belongs to v = 2^e (1 + j / 64) and is round(2^20 log2 x), at least -2^31, where x is the
    quantile at v / 2^33 (tail 0) or 1 - v / 2^33 (tail 1).

    Args:
        alpha: shape of the Gamma distribution, taken as the exact value of the float64.

    Returns:
        int32 (2, KNOTS).
    """
    mp = mpmath.MPContext()
    mp.prec = _PRECISION
    to_q20 = mp.ldexp(1 / mp.log(2), GAMMA_FRACTION_BITS)
    table = np.empty((2, KNOTS), dtype=np.int32)
    for tail in (0, 1):
        quantile = _LogQuantile(alpha, mp)
        for k in reversed(range(KNOTS)):
            e, j = divmod(k, KNOTS_PER_OCTAVE)
            p = mp.ldexp(mp.mpf(KNOTS_PER_OCTAVE + j), e - 39)  # 39 = 33 + log2(64)
            y = quantile.move_to(p if tail == 0 else 1 - p)
            table[tail, k] = max(GAMMA_FLOOR, _round(y * to_q20))
    return table


def make_exp2_table() -> np.ndarray:
    """round(2^(30 - k / 1024)) for k = 0 ... 1024: int32 (EXP2_KNOTS,)."""
    mp = mpmath.MPContext()
    mp.prec = _PRECISION
    knots = [_round(mp.power(2, EXP2_BITS - mp.mpf(k) / (EXP2_KNOTS - 1))) for k in range(EXP2_KNOTS)]
    return np.array(knots, dtype=np.int32)
