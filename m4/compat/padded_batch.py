"""nano4M's padded batches as packed tokens, and packed results back in their slots.

The slots of a sample may stand in any order and padding anywhere, as nano4M allows. What a batch holds is checked where
it is read: its faults and its number of tokens are asked for together, so that a GPU is waited for once a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m4.compat.arguments import INTEGERS
from m4kernels import PackedTokens, Segments
from m4kernels.segments import IGNORE_INDEX


class Names(NamedTuple):
    """What the tensors of one side are called, in a batch and in errors."""

    tokens: str
    positions: str
    modalities: str
    pad_mask: str


class Bounds(NamedTuple):
    """Ids, positions and modalities are below these."""

    vocabulary: int
    positions: int
    modalities: int


@dataclass(frozen=True)
class Slots:
    """The valid tokens of one side of a padded batch, packed, and where they came from.

    Args:
        tokens: ordered by sample, modality, position; a decoder's ids are its targets, -100 where one is to be ignored.
        index: int64 (T,), the slot b * N + n that each was read from.
        shape: (B, N).
    """

    tokens: PackedTokens
    index: Tensor
    shape: tuple[int, int]

    def put_back(self, values: Tensor) -> Tensor:
        """(T, D) → (B, N, D), 0 in the slots that held no token."""
        samples, width = self.shape
        padded = values.new_zeros((samples * width, values.shape[1])).index_copy(0, self.index, values)
        return padded.unflatten(0, (samples, width))


def read_side(batch: Mapping[str, Any], names: Names) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(tokens, positions, modalities, pad mask or None) of a batch. Raises ValueError: it lacks one of the former."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"expected a padded batch, a dict of tensors, got a {type(batch).__name__}")
    missing = [name for name in names[:3] if name not in batch]
    if missing:
        raise ValueError(f"the batch lacks {', '.join(missing)}; it has {', '.join(map(str, batch)) or 'nothing'}")
    tokens, positions, modalities = (batch[name] for name in names[:3])
    return tokens, positions, modalities, batch.get(names.pad_mask)


def pack(
    names: Names,
    bounds: Bounds,
    tokens: Tensor | None,
    positions: Tensor,
    modalities: Tensor,
    pad_mask: Tensor | None,
    padding_idx: int | None = None,
) -> Slots:
    """The valid slots of one side of a padded batch.

    Args:
        names: what to call the tensors in errors.
        tokens: integer (B, N); None for queries without targets, whose ids are then 0.
        positions, modalities: integer (B, N).
        pad_mask: bool (B, N), True = valid; None: all are.
        padding_idx: of a decoder, the target that counts for nothing; it fills the padding.

    Raises:
        ValueError: a shape, dtype or value does not fit; the message names the tensor, and for a value the slot.
    """
    modalities = _checked(names.modalities, modalities, None)
    positions = _checked(names.positions, positions, modalities)
    ids = torch.zeros_like(modalities) if tokens is None else _checked(names.tokens, tokens, modalities)
    valid = torch.ones_like(modalities, dtype=torch.bool) if pad_mask is None else pad_mask
    if pad_mask is not None:
        _check_mask(names.pad_mask, pad_mask, modalities)
    ignored = torch.zeros_like(valid) if padding_idx is None else ids == padding_idx
    faults = {
        names.modalities: valid & _outside(modalities, bounds.modalities),
        names.positions: valid & _outside(positions, bounds.positions),
        names.tokens: valid & ~ignored & _outside(ids, bounds.vocabulary),
        names.pad_mask: ~valid & ~ignored if padding_idx is not None else torch.zeros_like(valid),
    }
    count, *wrong = torch.stack([mask.sum() for mask in (valid, *faults.values())]).tolist()
    if any(wrong):
        _raise_first(
            names, bounds, faults, {names.modalities: modalities, names.positions: positions, names.tokens: ids}
        )

    samples, width = valid.shape
    sample = torch.arange(samples, device=valid.device)[:, None]
    key = (sample * bounds.modalities + modalities) * bounds.positions + positions
    behind = samples * bounds.modalities * bounds.positions
    index = torch.where(valid, key, behind).flatten().argsort(stable=True)[:count]
    kinds = torch.arange(bounds.modalities, device=valid.device)
    counts = ((modalities.unsqueeze(-1) == kinds) & valid.unsqueeze(-1)).sum(1)
    ids = ids.masked_fill(ignored, IGNORE_INDEX)
    ids, positions, modalities = (values.flatten()[index] for values in (ids, positions, modalities))
    packed = PackedTokens(ids, positions, modalities, Segments.from_counts(counts, max_seqlen=width))
    return Slots(packed, index, (samples, width))


def _checked(name: str, values: Any, like: Tensor | None) -> Tensor:
    """values as int64."""
    if not isinstance(values, Tensor):
        raise ValueError(f"{name}: expected an integer tensor (B, N), got a {type(values).__name__}")
    if values.dim() != 2 or values.dtype not in INTEGERS:
        raise ValueError(f"{name}: expected an integer tensor (B, N), got {values.dtype} {tuple(values.shape)}")
    if like is not None:
        _check_like(name, values, like)
    return values.long()


def _check_mask(name: str, mask: Any, like: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = str(mask.dtype) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(f"{name}: expected a bool tensor (B, N), True where a token is valid, got {found}")
    _check_like(name, mask, like)


def _check_like(name: str, values: Tensor, like: Tensor) -> None:
    if values.shape != like.shape or values.device != like.device:
        raise ValueError(
            f"{name}: expected shape {tuple(like.shape)} on {like.device}, as the modalities beside it, got "
            f"{tuple(values.shape)} on {values.device}"
        )


def _outside(values: Tensor, limit: int) -> Tensor:
    return (values < 0) | (values >= limit)


def _raise_first(names: Names, bounds: Bounds, faults: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the first fault."""
    limits = {names.tokens: bounds.vocabulary, names.positions: bounds.positions, names.modalities: bounds.modalities}
    for name, mask in faults.items():
        found = mask.nonzero()
        if not len(found):
            continue
        sample, slot = found[0].tolist()
        if name == names.pad_mask:
            raise ValueError(
                f"{names.tokens}: {len(found)} slots that {name} leaves out hold a target, the first in sample "
                f"{sample}, slot {slot}; fill them with the padding id, so that they are not to be predicted"
            )
        raise ValueError(
            f"{name}: expected 0 to {limits[name] - 1} in every valid slot, got {int(values[name][sample, slot])} in "
            f"sample {sample}, slot {slot}"
        )
