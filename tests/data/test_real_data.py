"""The whole way on real material: real frames, and frames rendered from real label files."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from m4.data.framing import FRAMINGS, frame_for
from m4.data.inspection.dataset_statistics import read_all
from m4.data.inspection.sheet import compare_with_frames
from m4.data.penn_action import Label, read_label, write_label
from m4.data.preparation.pairs import find_pairs
from m4.data.preparation.prepare import prepare
from m4.data.preparation.tokenize_video import joint_tokens
from m4.data.synthetic.clips import SynthOptions
from m4.data.synthetic.synth import synthesize
from m4.data.tokenizers import make_tokenizer
from m4.modalities import BINS, MIRRORED_JOINTS, NO_POSITION, mirror_joints
from m4kernels import dequantize_coords, quantize_coords

SIGMA = 3.0  # frame pixels: wide against the resampling kernel, so that its shape does not matter


def test_real_frames_through_selection_and_fsq(shared_dir, tmp_path):
    """A video of 150 real frames becomes samples of 25 dB, in pairs that scikit-image would choose."""
    frames = sorted((shared_dir / "real_frames/swing").glob("*.jpg"))
    root, out = tmp_path / "penn", tmp_path / "out"
    (root / "frames/0001").mkdir(parents=True)
    (root / "labels").mkdir()
    for path in frames:
        (root / "frames/0001" / path.name).symlink_to(path)
    width, height = Image.open(frames[0]).size
    joints = np.full((len(frames), 13), 150.0)
    seen = np.ones_like(joints, bool)
    label = Label(joints, joints, seen, height, width, "golf_swing", "front", True)
    write_label(root / "labels/0001.mat", label)
    summary = prepare(root, out, progress=False)
    pairs = list(find_pairs(np.asarray(Image.open(path).convert("RGB").convert("L")) for path in frames))
    with open(out / "pairs.csv", newline="") as file:
        rows = [(int(row["reference_frame"]), int(row["successor_frame"])) for row in csv.DictReader(file)]
    assert rows == [(a + 1, b + 1) for a, b in pairs]
    assert summary.pairs == len(pairs) > 10
    line, joints_line = compare_with_frames(out, read_all(out), root, 20, make_tokenizer("fsq"))
    assert float(line.split("PSNR ")[1].split()[0]) >= 25
    assert joints_line.startswith("joints of ")


def test_real_labels_through_the_whole_pipeline(shared_dir, tmp_path):
    """A seeded choice of the real label files, frames rendered from them; `prepare` says that nothing was left out."""
    labels = shared_dir / "penn_action/labels"
    names = synthesize(tmp_path / "penn", SynthOptions(videos=24, seed=5, frames=(2, 5)), labels, progress=False)
    summary = prepare(tmp_path / "penn", tmp_path / "out", progress=False)
    assert not summary.bad
    assert summary.videos == len(names) == 24
    assert summary.pairs >= 24
    _, joints = compare_with_frames(
        tmp_path / "out", read_all(tmp_path / "out"), tmp_path / "penn", 12, make_tokenizer("fsq")
    )
    assert joints == "joints of 12 samples: those of the labels, in the window of the frames"


def gaussian(size, x, y, sigma_x, sigma_y):
    """Smooth dot at continuous (x, y) of a picture of ``size`` (height, width), and its parts along x and y."""
    place_x, place_y = np.arange(size[1]) + 0.5 - x, np.arange(size[0]) + 0.5 - y
    across, down = np.exp(-(place_x**2) / (2 * sigma_x**2)), np.exp(-(place_y**2) / (2 * sigma_y**2))
    return np.outer(down, across), place_x[None] / sigma_x, place_y[:, None] / sigma_y


def displacement(picture, x, y, sigma):
    """By how much the dot in ``picture`` lies beside (x, y): least squares over place, size and brightness.

    A dot cut off by the border has no meaningful centroid, but it has a best fit.
    """
    sigma_x, sigma_y = np.maximum(sigma, 0.8)
    offset = np.zeros(2)
    for _ in range(8):
        dot, ux, uy = gaussian((256, 256), x + offset[0], y + offset[1], sigma_x, sigma_y)
        parts = [dot, dot * ux / sigma_x, dot * uy / sigma_y, dot * ux**2 / sigma_x, dot * uy**2 / sigma_y]
        near = dot > 1e-3
        basis = np.stack([part[near] for part in parts], 1)
        amplitude, *rest = np.linalg.lstsq(basis, picture[near], rcond=None)[0]
        step = np.array(rest) / amplitude
        offset += step[:2]
        sigma_x, sigma_y = sigma_x + step[2], sigma_y + step[3]
    return offset


def registration(size, x, y, visible, mode, limit):
    """Displacements (px) of dots at visible joints from their tokens; ``limit``: only those so near the border."""
    framing = frame_for(size, x, y, visible, mode)
    xy = torch.from_numpy(np.stack([x, y], -1) - 0.5).float()
    scale, offset = torch.from_numpy(framing.scale), torch.from_numpy(framing.offset)
    joints, seen = dequantize_coords(quantize_coords(xy, torch.from_numpy(visible), scale, offset))
    found = []
    for joint in torch.nonzero(seen).ravel().tolist():
        place = joints[joint].numpy().astype(float)
        if min(*place, *(256 - place)) > limit:
            continue
        dot, _, _ = gaussian(size, x[joint] - 0.5, y[joint] - 0.5, SIGMA, SIGMA)
        frame = Image.fromarray(np.round(255 * dot).astype(np.uint8))
        picture = np.asarray(framing.apply_image(frame), np.float64) / 255
        found.append(np.linalg.norm(displacement(picture, *place, SIGMA * framing.scale)))
    return found


@pytest.mark.parametrize("mode", FRAMINGS)
def test_joints_at_the_border_of_the_window(shared_dir, mode):
    """Joints of real labels within 6 pixels of the window's border, where a dot is cut off."""
    errors = []
    for path in sorted((shared_dir / "penn_action/labels").glob("*.mat"))[::4]:
        label = read_label(path)
        size = (label.height, label.width)
        # Of every label the frame with a joint nearest to the edge of the frame.
        room = np.minimum.reduce([label.x, label.y, size[1] + 1 - label.x, size[0] + 1 - label.y])
        frame = int(np.where(label.visible & (room > 0.5), room, np.inf).min(1).argmin())
        errors += registration(size, label.x[frame], label.y[frame], label.visible[frame], mode, limit=6)
    assert len(errors) >= 5
    assert np.mean(errors) <= 0.1


@pytest.mark.parametrize("mode", FRAMINGS)
@pytest.mark.parametrize("size", [(271, 481), (481, 271), (353, 353)])
def test_joints_at_the_border_of_odd_frames(size, mode):
    """On the edges of the frame itself, in its corners, and a pixel inside."""
    height, width = size
    side = min(size)
    low_x, low_y = (width - side) / 2, (height - side) / 2
    if mode == "squash":
        low_x, low_y, right, bottom = 0, 0, width, height
    else:
        right, bottom = low_x + side, low_y + side
    x = np.array(
        [low_x, low_x + 1, right - 0.01, right - 1, (low_x + right) / 2, (low_x + right) / 2, low_x, right - 1]
    )
    y = np.array([low_y, bottom - 1, bottom - 0.01, low_y + 2, low_y, bottom - 0.01, (low_y + bottom) / 2, low_y + 90])
    errors = registration(size, x + 0.5, y + 0.5, np.ones(8, bool), mode, limit=256)
    assert len(errors) == 8
    assert np.mean(errors) <= 0.1


def _mirrored(label: Label) -> Label:
    """The label of the mirrored video; hidden joints without a position stay at the origin."""
    nowhere = ~label.visible & (label.x - 0.5 <= NO_POSITION) & (label.y - 0.5 <= NO_POSITION)
    order = list(MIRRORED_JOINTS)
    x = np.where(nowhere, label.x, label.width + 1 - label.x)
    return replace(label, x=x[:, order], y=label.y[:, order], visible=label.visible[:, order])


@pytest.mark.parametrize("mode", FRAMINGS)
def test_mirrored_tokens_are_those_of_the_mirrored_label(shared_dir, mode):
    """Of real labels with their hidden joints, at the origin or guessed: all but a few within a bin, for rounding."""
    hidden = off = total = 0
    for path in sorted((shared_dir / "penn_action/labels").glob("*.mat"))[::40]:
        label = read_label(path)
        turned = _mirrored(label)
        for frame in range(0, len(label), 12):
            tokens = []
            for some in (label, turned):
                place = some.x[frame], some.y[frame], some.visible[frame]
                framing = frame_for((some.height, some.width), *place, mode)
                tokens.append(torch.from_numpy(joint_tokens(some, frame, framing).astype(np.int64)).flatten())
            mirrored = mirror_joints(tokens[0], BINS)
            (x, y, seen), theirs = mirrored.view(3, 13), tokens[1].view(3, 13)
            # Where the window begins decides where in the corner the label's origin is.
            nowhere = (seen == 0) & (x <= 64) & (y <= 64)
            assert ((seen == 0) & (theirs[:2] <= 64).all(0)).equal(nowhere)
            difference = (mirrored.view(3, 13) - theirs).abs()[:, ~nowhere]
            assert (difference <= 1).all()
            assert difference[2].sum() == 0
            off += int(difference.sum())
            total += 39
            hidden += int((mirrored[26:] == 0).sum())
    assert hidden > 100
    assert off < 0.01 * total
