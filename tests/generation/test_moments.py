"""Predictions as pictures: which runs can be drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch

from m4.config import TrainConfig
from m4.data.tokenizers import make_tokenizer
from m4.errors import ConfigError
from m4.generation.moments import check_moments, prediction_picture
from m4.modalities import RowLayout
from m4kernels import quantize_coords

OURS = ("tok_rgb", "coords", "tok_rgb_next", "coords_next")


@pytest.mark.parametrize(
    ("names", "lengths", "message"),
    [
        (("coords", "coords_next"), (39, 39), "was trained without tok_rgb, tok_rgb_next"),
        (OURS, (256, 39, 64, 39), "has 64 tokens of tok_rgb_next a sample, a picture needs 256"),
        (OURS, (256, 6, 256, 39), "has 6 tokens of coords a sample, a picture needs 39"),
    ],
)
def test_runs_that_cannot_be_drawn(names, lengths, message):
    with pytest.raises(ConfigError, match=f"--run: runs/a {message}; there is nothing to draw"):
        check_moments(RowLayout(names, lengths, (9,) * len(names)), Path("runs/a"))


def test_picture_does_not_depend_on_the_order_of_the_row():
    """Of a row in another order, with a modality of the user's own in it."""
    generator = torch.Generator().manual_seed(0)
    tokenizer = make_tokenizer("fsq")
    images = torch.from_numpy(tokenizer.encode(np.full((2, 256, 256, 3), 90, np.uint8))).flatten(1)
    xy, visible = 256 * torch.rand(4, 13, 2, generator=generator), torch.rand(4, 13, generator=generator) < 0.8
    poses = quantize_coords(xy, visible)
    tokens = {"tok_rgb": images, "coords": poses[:2], "tok_rgb_next": images, "coords_next": poses[2:]}
    tokens["depth"] = torch.zeros(2, 5, dtype=torch.int64)
    pictures = []
    for names in (OURS, ("coords_next", "depth", "tok_rgb_next", "coords", "tok_rgb")):
        config = TrainConfig(
            modalities=list(names),
            max_seq_lens=[tokens[name].shape[1] for name in names],
            vocab_sizes=[65536] * len(names),
            input_alphas=[1.0] * len(names),
            target_alphas=[1.0] * len(names),
        )
        check_moments(RowLayout.of(config), Path("runs/a"))
        row = torch.cat([tokens[name] for name in names], dim=1)
        pictures.append(np.asarray(prediction_picture(row, row, {}, config, tokenizer)))
    np.testing.assert_array_equal(*pictures)
    assert pictures[0].std() > 0
