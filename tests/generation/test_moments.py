"""Rows of tokens as pictures: which runs can be drawn, and what is on them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from m4.data.tokenizers import make_tokenizer
from m4.errors import ConfigError
from m4.generation.inputs import Inputs, row_array
from m4.generation.moments import Painter, check_drawable, shifted
from m4.generation.results import Filled
from m4.modalities import RowLayout
from m4.pictures.sheets import Moment
from m4kernels import quantize_coords

OURS = ("tok_rgb", "coords", "tok_rgb_next", "coords_next")


@pytest.mark.parametrize(
    ("names", "lengths", "message"),
    [
        (("depth",), (39,), "--out: nothing of depth can be drawn"),
        (OURS, (256, 39, 64, 39), "--run: runs/a has 64 tokens of tok_rgb_next a sample, a picture needs 256"),
        (OURS, (256, 6, 256, 39), "--run: runs/a has 6 tokens of coords a sample, a picture needs 39"),
    ],
)
def test_runs_that_cannot_be_drawn(names, lengths, message):
    with pytest.raises(ConfigError, match=rf"{message}.*\.npz"):
        check_drawable(RowLayout(names, lengths, (9,) * len(names)), names, Path("runs/a"))


def result_of(names, given=OURS[:2], wanted=OURS[2:], truth=True):
    """Two samples of random poses on one image, in a row of this order."""
    generator = torch.Generator().manual_seed(0)
    tokenizer = make_tokenizer("fsq")
    grey = np.full((2, 256, 256, 3), 90, np.uint8)
    images = torch.from_numpy(tokenizer.encode(grey)).flatten(1)
    xy, visible = 256 * torch.rand(4, 13, 2, generator=generator), torch.rand(4, 13, generator=generator) < 0.8
    poses = quantize_coords(xy, visible)
    tokens = {"tok_rgb": images, "coords": poses[:2], "tok_rgb_next": images, "coords_next": poses[2:]}
    tokens["depth"] = torch.zeros(2, 5, dtype=torch.int64)
    layout = RowLayout(tuple(names), tuple(tokens[name].shape[1] for name in names), (65536,) * len(names))
    check_drawable(layout, [*given, *wanted], Path("runs/a"))
    row = row_array(torch.cat([tokens[name] for name in names], dim=1))
    inputs = Inputs(["a", "b"], torch.arange(2), row, np.arange(2) if truth else None)
    return Filled(Painter(layout, {}, tokenizer), inputs, given, wanted, row)


def test_picture_does_not_depend_on_the_order_of_the_row():
    """Of a row in another order, with a modality of the user's own in it."""
    orders = OURS, ("coords_next", "depth", "tok_rgb_next", "coords", "tok_rgb")
    pictures = [np.asarray(result_of(names).picture()) for names in orders]
    np.testing.assert_array_equal(*pictures)
    assert pictures[0].std() > 0


@pytest.mark.parametrize(
    ("given", "wanted", "truth", "columns", "frames"),
    [
        (("tok_rgb", "coords"), ("tok_rgb_next", "coords_next"), True, 3, 2),
        (("tok_rgb",), ("tok_rgb_next", "coords_next"), False, 2, 2),
        (("coords",), ("tok_rgb",), True, 2, 1),
        (("tok_rgb_next",), ("tok_rgb", "coords"), True, 3, 2),
        ((), ("coords_next",), True, 2, 1),
    ],
)
def test_what_is_drawn(given, wanted, truth, columns, frames):
    result = result_of(OURS, given, wanted, truth)
    assert result.picture().size == (columns * 262 + 6, 22 + 2 * 262 + 6)
    shown = list(result.frames())
    assert len(shown) == frames
    assert {frame.size for frame in shown} == {((1 + truth) * 262 + 6, 22 + 2 * 262 + 6)}


def test_only_visible_joints_are_drawn():
    xy, visible = np.tile(np.arange(10.0, 140, 10)[:, None], 2), np.zeros(13, bool)
    image = np.zeros((256, 256, 3), np.uint8)
    nothing = np.asarray(Moment(image, xy, visible).drawn())
    assert not nothing.any()
    visible[4] = True
    drawn = np.array(Moment(image, xy, visible).drawn())
    assert drawn[48:52, 48:52].any()
    drawn[40:61, 40:61] = 0
    assert not drawn.any()


def test_shifted():
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    moved = shifted(image, np.array([2.2, -1.4]))
    np.testing.assert_array_equal(moved[:3, 2:], image[1:, :3])
    assert (moved[3] == 128).all()
    assert (moved[:, :2] == 128).all()
    assert (shifted(image, np.array([0.0, 9.0])) == 128).all()
    np.testing.assert_array_equal(shifted(image, np.array([0.1, -0.1])), image)
