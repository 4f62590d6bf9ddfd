"""Tokens as pictures: reference, true next and predicted next moment side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m4.config import TrainConfig
from m4.data.tokenizers import ImageTokenizer, make_tokenizer
from m4.errors import ConfigError
from m4.pictures.sheets import Moment, prediction_panel
from m4kernels import dequantize_coords

REFERENCE, NEXT = ("tok_rgb", "coords"), ("tok_rgb_next", "coords_next")


def read_meta(root: Path) -> dict[str, Any]:
    """What the data's meta.json says about its tokenizer and vocabularies.

    Raises:
        ConfigError: there is none, or it is not of prepared data.
    """
    path = root / "meta.json"
    if not path.is_file():
        raise ConfigError(f"{path}: not there; pictures need data made by python -m m4.data prepare")
    meta = json.loads(path.read_text())
    missing = [key for key in ("options", "modalities") if key not in meta]
    if missing:
        raise ConfigError(f"{path}: lacks {', '.join(missing)}; prepare the data again")
    return meta


def id_limits(meta: dict[str, Any], config: TrainConfig) -> Tensor:
    """int64 (L,): ids at each position are below it; codes and bins as in the data, visibility 0 or 1."""
    limits = []
    for name, vocabulary, length in zip(config.modalities, config.vocab_sizes, config.max_seq_lens, strict=True):
        limit = torch.full((length,), min(vocabulary, meta["modalities"][name]["vocab_size"]))
        if name.startswith("coords"):
            limit[-length // 3 :] = 2
        limits.append(limit)
    return torch.cat(limits)


def joint_positions(config: TrainConfig) -> Tensor:
    """bool (L,): where a token is a joint's quantised x or y."""
    marks = []
    for name, length in zip(config.modalities, config.max_seq_lens, strict=True):
        marks.append((torch.arange(length) < length - length // 3) & name.startswith("coords"))
    return torch.cat(marks)


def tokenizer_of(meta: dict[str, Any], cosmos_dir: Path | None) -> ImageTokenizer:
    """The image tokenizer that the data was prepared with."""
    return make_tokenizer(meta["options"]["tokenizer"], cosmos_dir)


def prediction_picture(
    true: Tensor, predicted: Tensor, meta: dict[str, Any], config: TrainConfig, tokenizer: ImageTokenizer
) -> Image.Image:
    """One row a sample.

    Args:
        true, predicted: int64 (B, L) tokens; of ``predicted`` only the next frame and skeleton are shown.
    """
    columns = [(true, REFERENCE), (true, NEXT), (predicted, NEXT)]
    moments = [_moments(tokens, names, meta, config, tokenizer) for tokens, names in columns]
    return prediction_panel(list(zip(*moments, strict=True)))


def _moments(
    tokens: Tensor, names: tuple[str, str], meta: dict[str, Any], config: TrainConfig, tokenizer: ImageTokenizer
) -> list[Moment]:
    starts = np.cumsum([0, *config.max_seq_lens])
    image_ids, pose_ids = (
        tokens[:, starts[m] : starts[m + 1]].cpu() for m in (config.modalities.index(name) for name in names)
    )
    images = tokenizer.decode(image_ids.view(-1, 16, 16).numpy())
    xy, visible = dequantize_coords(pose_ids.contiguous(), bins=meta["modalities"][names[1]]["vocab_size"])
    return [Moment(*moment) for moment in zip(images, xy.numpy(), visible.numpy(), strict=True)]
