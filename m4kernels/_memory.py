"""Memory for large results on the CPU, used again once nobody holds the result that had it.

glibc maps every block above 32 MiB anew and unmaps it when it is freed, so the system hands out, zeroes and takes back
page after page, which costs several times what writing the result does (benchmarks/NOTES.md, "The rest of a CPU step").
"""

import math
import threading

import torch
from torch import Tensor, UntypedStorage
from torch.utils import deterministic

# Bytes. Smaller blocks glibc keeps itself. Larger ones would be a lot to hold on to: what is kept is at most MOST of
# LARGEST bytes, and M4's step has two gradients of 160 MiB, three where it accumulates.
SMALLEST = 2**25
LARGEST = 3 * 2**27
MOST = 3

_kept: list[UntypedStorage] = []  # the last that were handed out, the newest last
_lock = threading.Lock()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.empty(shape, dtype=dtype)`, a large one in the memory of an earlier one if that is free and fits."""
    size = math.prod(shape) * dtype.itemsize
    if not SMALLEST <= size <= LARGEST:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        free = [storage for storage in _kept if _is_free(storage)]
        storage = min((one for one in free if one.nbytes() >= size), key=lambda one: one.nbytes(), default=None)
        if storage is None:  # free ones are for results of a size that is asked for no more
            result = torch.empty(shape, dtype=dtype)
            held = [one for one in _kept if not any(one is x for x in free)]
            _kept[:] = [*held[-MOST + 1 :], result.untyped_storage()]
            return result
        result = torch.empty(0, dtype=dtype).set_(storage, 0, shape, _contiguous(shape))
        _kept[:] = [*(one for one in _kept if one is not storage), storage]
    if torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        result.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max)  # as torch.empty does
    return result


def release() -> None:
    """Give back what is kept and free, and forget the rest."""
    with _lock:
        _kept.clear()


def _is_free(storage: UntypedStorage) -> bool:
    """Whether only `_kept` holds it; one that other processes may see never is."""
    return torch._C._storage_Use_Count(storage._cdata) == 1 and not storage.is_shared()


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
