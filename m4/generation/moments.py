"""Tokens as pictures: reference, true next and predicted next moment side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from m4.config import TrainConfig
from m4.data.tokenizers import ImageTokenizer
from m4.errors import ConfigError
from m4.modalities import NEXT, REFERENCE, TABLE, RowLayout, data_vocab_size
from m4.pictures.sheets import Moment, prediction_panel
from m4kernels import dequantize_coords


def check_moments(layout: RowLayout, run_dir: Path) -> None:
    """Raise ConfigError unless rows hold the images and joints of a reference and a next moment, whole."""
    missing = [name for name in (*REFERENCE, *NEXT) if name not in layout.modalities]
    if missing:
        raise ConfigError(f"--run: {run_dir} was trained without {', '.join(missing)}; there is nothing to draw")
    for name in (*REFERENCE, *NEXT):
        if layout[name] != TABLE[name]:
            raise ConfigError(
                f"--run: {run_dir} has {layout[name].length} tokens of {name} a sample, "
                f"a picture needs {TABLE[name].length}; there is nothing to draw"
            )


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
    layout = RowLayout.of(config)
    image, pose = names
    image_ids, pose_ids = (tokens[:, layout.span(name)].cpu() for name in names)
    images = tokenizer.decode(image_ids.unflatten(1, layout[image].shape).numpy())
    xy, visible = dequantize_coords(pose_ids.contiguous(), bins=data_vocab_size(pose, meta))
    return [Moment(*moment) for moment in zip(images, xy.numpy(), visible.numpy(), strict=True)]
