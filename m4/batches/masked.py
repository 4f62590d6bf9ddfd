"""Rows of a token store as masked batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch

from m4.batches.mirror import Mirror
from m4.data.store import TokenStore
from m4kernels import MaskedBatch, MaskingSpec, mask_tokens

log = logging.getLogger(__name__)


def mask_rows(
    store: TokenStore,
    rows: np.ndarray,
    sample_ids: np.ndarray,
    spec: MaskingSpec,
    *,
    seed: int,
    device: torch.device,
    backend: str | None = None,
    mirror: Mirror | None = None,
) -> MaskedBatch:
    """Read rows (int64 (B,)) and draw the mask of each from (seed, sample id); sample_ids int64 (B,).

    mirror: mirrors the samples that it draws from their ids, if given.
    """
    tokens = store.batch(rows).to(device)
    if mirror is not None:
        tokens = mirror(tokens, torch.from_numpy(mirror.chosen(sample_ids)).to(device))
    ids = torch.from_numpy(np.ascontiguousarray(sample_ids)).to(device)
    return mask_tokens(tokens, spec, seed=seed, sample_ids=ids, backend=backend)


def fixed_batches(
    store: TokenStore,
    spec: MaskingSpec,
    *,
    seed: int,
    batch_size: int,
    max_samples: int | None,
    device: torch.device,
) -> Iterator[MaskedBatch]:
    """The first rows of a split, masked as a pure function of (seed, row): every evaluation sees the same batches."""
    rows = np.arange(len(store) if max_samples is None else min(max_samples, len(store)))
    for first in range(0, len(rows), batch_size):
        chosen = rows[first : first + batch_size]
        yield mask_rows(store, chosen, chosen, spec, seed=seed, device=device)
