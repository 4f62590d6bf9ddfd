"""Training samples mirrored left to right: which of them, and what becomes of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m4.config import TrainConfig
from m4.data.store import TokenStore
from m4.data.tokenizers import mirrored_codes
from m4.errors import ConfigError
from m4.modalities import (
    NUM_JOINTS,
    TABLE,
    VISIBILITIES,
    Modality,
    RowLayout,
    data_vocab_size,
    mirror_image,
    mirror_joints,
)
from m4kernels.ops.mask_tokens.reference import LOW32, philox4x32_10

_PURPOSE = 255 << 24  # of the random word, in its counter; masks use the first few purposes
_OFF = "set data.mirror=false"


class Mirror:
    """Mirrors the samples of a run that (seed, sample id) choose, one in two.

    Args:
        config: of the run.
        meta: what meta.json says of the data, {} where there is none.
        store: what is trained on, whose tokens are checked here once.
        device: where tokens are mirrored; nothing there waits for it.
    Raises:
        ConfigError, DataError: naming data.mirror and the modality whose mirror image is not known, or not in the run's
            vocabulary.
    """

    def __init__(self, config: TrainConfig, meta: Mapping[str, Any], store: TokenStore, device: torch.device) -> None:
        self._seed = config.seed
        layout = RowLayout.of(config)
        self._lengths = list(layout.max_seq_lens)
        self._parts: list[Callable[[Tensor], Tensor]] = []  # one a modality: int64 (B, length) → mirrored
        for modality, known, span in zip(layout.described, layout.vocab_sizes, layout.spans, strict=True):
            make = {"image": _image, "joints": _joints}.get(modality.kind, _unknown)
            self._parts.append(make(modality, known, store.tokens[:, span], meta, device))

    @classmethod
    def of(cls, config: TrainConfig, meta: Mapping[str, Any], store: TokenStore, device: torch.device) -> Mirror | None:
        """What ``data.mirror`` asks for."""
        return cls(config, meta, store, device) if config.data.mirror else None

    def chosen(self, sample_ids: np.ndarray) -> np.ndarray:
        """bool, the shape of sample_ids (int64): whether each is mirrored, with probability 1/2.

        The lowest bit of the first word of the Philox4x32-10 block with the seed as key and the counter
        (255 · 2^24, 0, sample id bits 0-31, sample id bits 32-63).
        """
        ids = torch.from_numpy(np.array(sample_ids, dtype=np.int64))
        zero = torch.zeros_like(ids)
        counter = (zero + _PURPOSE, zero, ids & LOW32, (ids >> 32) & LOW32)
        words = philox4x32_10(counter, (self._seed & LOW32, (self._seed >> 32) & LOW32))
        return (words[0] & 1).bool().numpy()

    def __call__(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """The rows tokens (B, L), uint16 or int64, with those ``chosen`` (bool (B,)) mirrored."""
        whole = tokens.view(torch.int16).long() & 0xFFFF if tokens.dtype == torch.uint16 else tokens
        parts = zip(self._parts, whole.split(self._lengths, dim=1), strict=True)
        mirrored = torch.cat([mirror(part) for mirror, part in parts], dim=1)
        result = torch.where(chosen[:, None], mirrored, whole)
        return result.to(torch.int16).view(torch.uint16) if tokens.dtype == torch.uint16 else result


def _image(
    modality: Modality, known: int, tokens: np.ndarray, meta: Mapping[str, Any], device: torch.device
) -> Callable[[Tensor], Tensor]:
    codes = mirrored_codes(meta)
    _check_ids(modality, known, tokens, len(codes), "codes")
    on_device = torch.from_numpy(codes).to(device)
    return lambda part: mirror_image(part, on_device)


def _joints(
    modality: Modality, known: int, tokens: np.ndarray, meta: Mapping[str, Any], device: torch.device
) -> Callable[[Tensor], Tensor]:
    joints = modality.shape[1]
    if joints != NUM_JOINTS:
        raise ConfigError(f"data.mirror: expected {NUM_JOINTS} joints in {modality.name}, got {joints}; {_OFF}")
    bins = data_vocab_size(modality.name, meta)
    _check_ids(modality, known, tokens[:, modality.coordinates], bins, "bins")
    if int(tokens[:, modality.visibility].max(initial=0)) >= VISIBILITIES:
        raise ConfigError(f"data.mirror: visibility in {modality.name} is not 0 or 1 everywhere; {_OFF}")
    return lambda part: mirror_joints(part, bins)


def _unknown(
    modality: Modality, known: int, tokens: np.ndarray, meta: Mapping[str, Any], device: torch.device
) -> Callable[[Tensor], Tensor]:
    name = modality.name
    why = f"nothing says how the tokens of {name} are mirrored"
    if name in TABLE and TABLE[name].kind == "text":
        why = f"{name} may say left and right, which cannot be mirrored"
    raise ConfigError(f"data.mirror: {why}; {_OFF}, or train without {name}")


def _check_ids(modality: Modality, known: int, tokens: np.ndarray, ids: int, what: str) -> None:
    """Raise ConfigError unless the data's ids are those that can be mirrored, and the run knows them all."""
    if known < ids:
        raise ConfigError(
            f"data.mirror: vocab_sizes of {modality.name} is {known}, its mirrored tokens have {ids} {what}; set it to "
            f"{ids} or more, or {_OFF}"
        )
    largest = int(tokens.max(initial=0))
    if largest >= ids:
        raise ConfigError(
            f"data.mirror: expected {modality.name} to be in {ids} {what}, got {largest}; prepare the data again, or "
            f"{_OFF}"
        )
