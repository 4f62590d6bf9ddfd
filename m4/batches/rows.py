"""Rows of a token store on a device."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from m4.data.store import TokenStore

log = logging.getLogger(__name__)

_RESIDENT_SHARE = 0.2  # of a GPU's free memory that the token store may take


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device, without waiting for it: through pinned memory, which torch keeps until the
    copy is done."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class TokenRows:
    """The rows of a store on a device: the whole store lies there if it has room, else rows are sent as needed.

    Args:
        store: the packed tokens.
        device: where rows are wanted.
        resident: keep the store on the device; default where it takes at most a fifth of a GPU's free memory.
    """

    def __init__(self, store: TokenStore, device: torch.device, *, resident: bool | None = None) -> None:
        self._store, self._device = store, device
        if resident is None:
            resident = False
            if device.type == "cuda":
                free = torch.cuda.mem_get_info(device)[0]
                resident = store.tokens.nbytes <= _RESIDENT_SHARE * free
                placement = (
                    "resident on the GPU" if resident else f"sent in batches ({free / 1e9:.1f} GB are free there)"
                )
                log.info("tokens: %.1f MB, %s", store.tokens.nbytes / 1e6, placement)
        # As int16, which every indexing kernel of torch takes; the bits are those of the uint16 tokens.
        self._table = torch.from_numpy(np.array(store.tokens).view(np.int16)).to(device) if resident else None

    def tokens(self, rows: np.ndarray, rows_on_device: Tensor) -> Tensor:
        """uint16 (B, L) on the device, of rows int64 (B,) given on the host and on the device."""
        if self._table is None:
            return send(self._store.tokens[rows].view(np.int16), self._device).view(torch.uint16)
        return self._table.index_select(0, rows_on_device).view(torch.uint16)
