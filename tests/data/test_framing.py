"""Pixels and joints share one geometry: a dot at a joint lands on the joint's token."""

import numpy as np
import pytest
import torch
from PIL import Image

from m4.data.framing import FRAMINGS, frame_for
from m4.data.penn_action import read_label
from m4.errors import DataError
from m4kernels import dequantize_coords, quantize_coords

SIGMA = 1.6  # of a dot, frame pixels


def dot(height, width, x, y, sigma=SIGMA):
    """A smooth dot at continuous pixel position (x, y), uint8 (H, W)."""
    across = np.exp(-((np.arange(width) + 0.5 - x) ** 2) / (2 * sigma**2))
    down = np.exp(-((np.arange(height) + 0.5 - y) ** 2) / (2 * sigma**2))
    return Image.fromarray(np.round(255 * np.outer(down, across)).astype(np.uint8))


def centroid(image):
    weight = np.asarray(image, np.float64)
    middle = np.arange(256) + 0.5
    return np.array([(weight.sum(0) * middle).sum(), (weight.sum(1) * middle).sum()]) / weight.sum()


def registration_errors(size, x, y, visible, mode):
    """Distance (canvas pixels) between each visible joint's dot and its dequantised token."""
    framing = frame_for(size, x, y, visible, mode)
    xy = torch.from_numpy(np.stack([x, y], -1) - 0.5).float()
    scale, offset = torch.from_numpy(framing.scale), torch.from_numpy(framing.offset)
    tokens = quantize_coords(xy, torch.from_numpy(visible), scale, offset)
    joints, seen = (tensor.numpy() for tensor in dequantize_coords(tokens))
    errors = []
    edge = 4 * SIGMA * framing.scale + 2  # nearer than this the dot would be cut off
    for joint in np.flatnonzero(seen & ((joints > edge) & (joints < 256 - edge)).all(-1)):
        picture = framing.apply_image(dot(*size, x[joint] - 0.5, y[joint] - 0.5))
        errors.append(np.linalg.norm(centroid(picture) - joints[joint]))
    return errors


@pytest.mark.parametrize("mode", FRAMINGS)
def test_registration_on_real_labels(shared_dir, mode):
    errors = []
    paths = sorted((shared_dir / "penn_action/labels").glob("*.mat"))
    for number, path in enumerate(paths[::50]):
        label = read_label(path)
        frame = number % len(label)
        size = (label.height, label.width)
        errors += registration_errors(size, label.x[frame], label.y[frame], label.visible[frame], mode)
    assert len(errors) > 200
    assert np.mean(errors) <= 0.03
    assert np.max(errors) <= 0.1


@pytest.mark.parametrize("mode", FRAMINGS)
@pytest.mark.parametrize("size", [(271, 481), (481, 271), (255, 257), (353, 353), (204, 480), (999, 641), (231, 177)])
def test_registration_on_odd_sizes(size, mode):
    rng = np.random.default_rng(sum(size))
    x, y = rng.uniform(1, size[1] + 1, 13), rng.uniform(1, size[0] + 1, 13)
    errors = registration_errors(size, x, y, np.ones(13, bool), mode)
    assert len(errors) >= 3
    assert np.mean(errors) <= 0.1


@pytest.mark.parametrize("size", [(270, 480), (480, 270), (271, 481), (100, 100)])
@pytest.mark.parametrize("mode", ["subject", "center"])
def test_window_is_square_whole_and_inside(size, mode):
    height, width = size
    side = min(size)
    for joint in ((0.0, 0.0), (width, height), (width / 3, height / 3), (-500.0, 9e9)):
        x, y = np.full(13, joint[0] + 0.5), np.full(13, joint[1] + 0.5)
        left, top, right, bottom = frame_for(size, x, y, np.ones(13, bool), mode).box
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height
        assert right - left == pytest.approx(side)
        assert bottom - top == pytest.approx(side)


def test_subject_follows_the_visible_joints():
    visible = np.zeros(13, bool)
    visible[:2] = True
    x = np.full(13, 470.0)
    x[:2] = (150.5, 250.5)
    framing = frame_for((200, 480), x, np.full(13, 100.0), visible, "subject")
    assert framing.box == (100.0, 0.0, 300.0, 200.0)
    # Without a visible joint the window is in the middle.
    nobody = frame_for((200, 480), x, x, np.zeros(13, bool), "subject")
    assert nobody.box == frame_for((200, 480), x, x, visible, "center").box == (140.0, 0.0, 340.0, 200.0)
    unknown = frame_for((200, 480), np.full(13, np.nan), x, np.ones(13, bool), "subject")
    assert unknown.box == nobody.box


def test_scale_and_offset():
    framing = frame_for((270, 481), np.ones(13), np.ones(13), np.ones(13, bool), "center")
    assert framing.scale.dtype == framing.offset.dtype == np.float32
    np.testing.assert_allclose(framing.scale, 256 / 270, rtol=1e-6)
    np.testing.assert_allclose(framing.offset, [-(481 - 270) / 2 * 256 / 270, 0], rtol=1e-6)
    squash = frame_for((270, 481), np.ones(13), np.ones(13), np.ones(13, bool), "squash")
    np.testing.assert_allclose(squash.scale, [256 / 481, 256 / 270], rtol=1e-6)
    assert squash.apply_image(Image.new("RGB", (481, 270))).size == (256, 256)


def test_a_joint_outside_the_window_becomes_invisible():
    x, y = np.full(13, 240.0), np.full(13, 100.0)
    x[3] = 10.0
    framing = frame_for((200, 480), x, y, np.ones(13, bool), "center")
    xy = torch.from_numpy(np.stack([x, y], -1) - 0.5).float()
    tokens = quantize_coords(
        xy, torch.ones(13, dtype=torch.bool), torch.from_numpy(framing.scale), torch.from_numpy(framing.offset)
    )
    assert tokens[26:].tolist() == [1, 1, 1, 0] + [1] * 9


def test_errors():
    ones, seen = np.ones(13), np.ones(13, bool)
    with pytest.raises(DataError, match="expected subject or center or squash, found 'centre'"):
        frame_for((200, 300), ones, ones, seen, "centre")
    with pytest.raises(DataError, match="at least one pixel"):
        frame_for((0, 300), ones, ones, seen, "center")
    with pytest.raises(DataError, match="one shape"):
        frame_for((200, 300), ones, np.ones(12), seen, "center")
    with pytest.raises(DataError, match="300x200 pixels"):
        frame_for((200, 300), ones, ones, seen, "center").apply_image(Image.new("RGB", (200, 300)))
