"""The integer tables of mask_tokens: those of usual alphas are committed (tables.npz), others are made when asked.

`python -m m4kernels.ops.mask_tokens.tables` makes the committed ones anew.
"""

import functools
import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_FILE = Path(__file__).with_name("tables.npz")
COMMITTED_ALPHAS = (
    *(0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9),
    *(1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0, 10.0),
)
DIGEST = "dee1ddd1c32d36d93a52ca04fe0014fb77327f2ecece8b743094a8ac2f0e8859"
_log = logging.getLogger("m4kernels")


def digest(alphas: np.ndarray, gamma: np.ndarray, exp2: np.ndarray) -> str:
    """SHA-256 of the little-endian values."""
    parts = (alphas.astype("<f8"), gamma.astype("<i4"), exp2.astype("<i4"))
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def write(alphas: np.ndarray, gamma: np.ndarray, exp2: np.ndarray) -> None:
    """Write tables.npz. Second differences along the knots are small, so that they compress to a tenth."""
    curvature = np.diff(gamma.astype(np.int64), n=2, axis=-1).astype(np.int32)
    np.savez_compressed(_FILE, alphas=alphas, start=gamma[..., :2], curvature=curvature, exp2=exp2)


@functools.cache
def _committed() -> tuple[dict[float, np.ndarray], np.ndarray]:
    with np.load(_FILE) as file:
        start = file["start"].astype(np.int64)
        steps = np.concatenate([start[..., 1:] - start[..., :1], file["curvature"]], axis=-1).cumsum(-1)
        gamma = np.concatenate([start[..., :1], steps], axis=-1).cumsum(-1).astype(np.int32)
        alphas, exp2 = file["alphas"], file["exp2"]
    if digest(alphas, gamma, exp2) != DIGEST:
        raise RuntimeError(f"mask_tokens: {_FILE} is damaged or from another version; reinstall m4kernels")
    return dict(zip(alphas.tolist(), gamma, strict=True)), exp2


@functools.cache
def _gamma_table(alpha: float) -> np.ndarray:
    committed = _committed()[0].get(alpha)
    if committed is not None:
        return committed
    from m4kernels.ops.mask_tokens.make_tables import make_gamma_table

    _log.info("mask_tokens: making the table of alpha %g, once in this process, about a second", alpha)
    return make_gamma_table(alpha)


@functools.lru_cache(maxsize=64)
def gamma_tables(alphas: tuple[float, ...], device: torch.device) -> Tensor:
    """int32 (len(alphas), 2, KNOTS): log2 of the Gamma(alpha) quantiles, Q20; see `make_tables.make_gamma_table`."""
    return torch.from_numpy(np.stack([_gamma_table(alpha) for alpha in alphas])).to(device)


@functools.lru_cache(maxsize=64)
def exp2_table(device: torch.device) -> Tensor:
    """int32 (EXP2_KNOTS,): 2^-(k / 1024), Q30."""
    return torch.from_numpy(_committed()[1].copy()).to(device)


def main() -> None:
    """Rewrite the committed tables and print their digest."""
    from m4kernels.ops.mask_tokens.make_tables import make_exp2_table, make_gamma_table

    alphas = np.array(COMMITTED_ALPHAS, dtype=np.float64)
    gamma = np.stack([make_gamma_table(float(alpha)) for alpha in alphas])
    exp2 = make_exp2_table()
    write(alphas, gamma, exp2)
    print(f'DIGEST = "{digest(alphas, gamma, exp2)}"')


if __name__ == "__main__":
    main()
