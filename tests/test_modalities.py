"""The table of modalities, and where they stand in a row."""

import numpy as np
import pytest
import torch

from m4.config import TrainConfig
from m4.modalities import (
    BINS,
    CANVAS,
    JOINTS,
    MIRRORED_JOINTS,
    NEXT,
    REFERENCE,
    SUCCESSORS,
    TABLE,
    TOKEN_SHAPES,
    RowLayout,
    data_vocab_size,
    mirror_image,
    mirror_joints,
    modality_of,
)
from m4kernels import quantize_coords

OURS = ("tok_rgb", "coords", "tok_rgb_next", "coords_next")


def test_table():
    assert TOKEN_SHAPES == {"tok_rgb": (16, 16), "coords": (3, 13), "tok_rgb_next": (16, 16), "coords_next": (3, 13)}
    assert [TABLE[name].vocab_size for name in OURS] == [64_000, 8192, 64_000, 8192]
    assert SUCCESSORS == {"tok_rgb": "tok_rgb_next", "coords": "coords_next"}
    assert all(TABLE[a].kind == TABLE[b].kind for a, b in SUCCESSORS.items())
    for moment in (REFERENCE, NEXT):
        assert [TABLE[name].kind for name in moment] == ["image", "joints"]
    assert TABLE["captions"].kind == "text"
    assert TABLE["captions"].length == 0


@pytest.mark.parametrize(
    ("name", "length", "kind", "shape"),
    [
        ("tok_rgb", 256, "image", (16, 16)),
        ("tok_rgb", 8, "plain", (8,)),  # no grid of 16 x 16
        ("coords_next", 39, "joints", (3, 13)),
        ("coords", 6, "joints", (3, 2)),
        ("coords", 40, "plain", (40,)),
        ("coords_of_hands", 39, "plain", (39,)),  # begins like joints, which nobody said they are
        ("captions", 77, "plain", (77,)),
        ("depth", 256, "plain", (256,)),
    ],
)
def test_modality_of_a_run(name, length, kind, shape):
    modality = modality_of(name, length)
    assert (modality.name, modality.kind, modality.shape, modality.length) == (name, kind, shape, length)
    tokens = list(range(length))
    if kind == "joints":
        assert tokens[modality.coordinates] + tokens[modality.visibility] == tokens
        assert len(tokens[modality.visibility]) == shape[1]
    else:
        assert tokens[modality.coordinates] == tokens[modality.visibility] == []


def test_row_of_the_recipe():
    config = TrainConfig()
    layout = RowLayout.of(config)
    assert [layout.span(name) for name in OURS] == [slice(0, 256), slice(256, 295), slice(295, 551), slice(551, 590)]
    assert layout.length == 590
    rows = torch.arange(590)
    for m, name in enumerate(OURS):
        span = layout.span(name)
        assert (layout.modality_ids()[span] == m).all()
        assert torch.equal(layout.positions()[span], torch.arange(config.max_seq_lens[m]))
    assert rows[layout.ordinal()].tolist() == [*range(256, 282), *range(551, 577)]


def test_row_of_another_order_and_names():
    layout = RowLayout(("depth", "coords", "tok_rgb"), (2, 6, 3), (10, 9000, 70_000))
    assert [layout.span(name) for name in layout.modalities] == [slice(0, 2), slice(2, 8), slice(8, 11)]
    assert layout.ordinal().nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert layout.id_limits({}).tolist() == [10, 10, 8192, 8192, 8192, 8192, 2, 2, 64_000, 64_000, 64_000]
    meta = {"modalities": {"depth": {"vocab_size": 7}, "coords": {"vocab_size": 100}}}
    assert layout.id_limits(meta).tolist() == [7, 7, 100, 100, 100, 100, 2, 2, 64_000, 64_000, 64_000]
    with pytest.raises(KeyError, match="coords_next: not among the modalities depth, coords, tok_rgb"):
        layout.span("coords_next")


def test_row_never_exceeds_the_vocabulary_of_the_model():
    layout = RowLayout(OURS, (256, 39, 256, 39), (512, 1, 64_000, 65_536))
    limits = layout.id_limits({"modalities": {"coords_next": {"vocab_size": 4096}}})
    assert [limits[layout.span(name)].max().item() for name in OURS] == [512, 1, 64_000, 4096]


@pytest.mark.parametrize(("names", "lengths"), [(("a", "b"), (1,)), (("a", "a"), (1, 1))])
def test_row_that_is_none(names, lengths):
    with pytest.raises(ValueError, match="expected different names, each with a length and a vocabulary"):
        RowLayout(names, lengths, (4, 4))


def test_vocabulary_of_data():
    meta = {"modalities": {"coords": {"vocab_size": 1024}, "depth": {"vocab_size": 5}}}
    names = ("coords", "coords_next", "depth", "other")
    assert [data_vocab_size(name, meta) for name in names] == [1024, 8192, 5, 0]


def test_joints_of_the_other_side():
    assert MIRRORED_JOINTS == (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11)
    assert [JOINTS[joint] for joint in MIRRORED_JOINTS[:3]] == ["head", "right shoulder", "left shoulder"]


def _pose(xy, visible):
    return quantize_coords(xy, visible, bins=BINS, canvas=float(CANVAS), backend="reference")


def _mirrored_pose(xy, visible):
    """The tokens of the mirrored coordinates."""
    turned = torch.stack([CANVAS - xy[..., 0], xy[..., 1]], dim=-1)
    return _pose(turned[..., list(MIRRORED_JOINTS), :], visible[..., list(MIRRORED_JOINTS)])


def test_a_mirrored_pose_has_the_tokens_of_the_mirrored_coordinates():
    """In the window and out of it, visible and hidden; the float64 coordinates hit no tie."""
    random = torch.Generator().manual_seed(0)
    xy = torch.rand(500, 13, 2, generator=random, dtype=torch.float64) * 300 - 20
    visible = torch.rand(500, 13, generator=random) < 0.8
    tokens = _pose(xy, visible)
    at_origin = ((tokens[:, 26:] == 0) & (xy < 2.1).all(-1)).any(-1)  # has a test of its own
    assert at_origin.float().mean() < 0.2
    assert torch.equal(mirror_joints(tokens, BINS)[~at_origin], _mirrored_pose(xy, visible)[~at_origin])


@pytest.mark.parametrize(("bins", "off"), [(8192, 1), (8191, 0)])
def test_a_tie_is_off_by_one_bin(bins, off):
    """(k + 1/2) and its mirror image both round to even: to bins that mirror each other if bins - 1 is even."""
    canvas = float(bins - 1)  # so that coordinates are bins, exactly
    x = (torch.arange(13 * 600, dtype=torch.float64) + 0.5).view(600, 13)
    visible = torch.ones(600, 13, dtype=torch.bool)

    def pose(x):
        xy = torch.stack([x, torch.full_like(x, 7.0)], dim=-1)
        return quantize_coords(xy, visible, bins=bins, canvas=canvas, backend="reference")

    expected = pose(canvas - x[:, list(MIRRORED_JOINTS)])
    difference = (mirror_joints(pose(x), bins) - expected).abs()
    assert (difference[:, :13] == off).all()
    assert (difference[:, 13:] == 0).all()


def test_a_hidden_joint_without_a_position_stays_at_the_origin():
    tokens = torch.tensor([*range(100, 113), *range(200, 213), *[1] * 13])
    tokens[[1, 14, 27]] = torch.tensor([20, 33, 0])  # left shoulder: hidden, at the label's origin
    tokens[[3, 16, 29]] = torch.tensor([0, 500, 0])  # left elbow: hidden, left of the window
    tokens[[5, 18]] = torch.tensor([0, 0])  # left wrist: visible in the corner
    mirrored = mirror_joints(tokens, BINS).view(3, 13)
    assert mirrored[:, 2].tolist() == [20, 33, 0]
    assert mirrored[:, 4].tolist() == [8191, 500, 0]
    assert mirrored[:, 6].tolist() == [8191, 0, 1]
    assert mirrored[:, 1].tolist() == [8191 - 102, 202, 1]
    assert mirrored[:, 0].tolist() == [8191 - 100, 200, 1]


def test_a_mirrored_image_has_its_columns_reversed_and_its_codes_exchanged():
    codes = torch.arange(64_000).roll(1)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 64_000, (3, 256)))
    mirrored = mirror_image(tokens, codes).view(3, 16, 16)
    for row, column in ((0, 0), (5, 3), (15, 15)):
        assert torch.equal(mirrored[:, row, column], codes[tokens.view(3, 16, 16)[:, row, 15 - column]])
