"""Pictures: skeletons where the joints are, sheets and panels of the right make-up."""

import numpy as np
import pytest
from PIL import Image

from m4.pictures.sheets import Moment, contact_sheet, moment_sheet
from m4.pictures.skeleton import draw_skeleton

GRAY = np.full((256, 256, 3), 90, np.uint8)


def pose(seed=0):
    return np.random.default_rng(seed).uniform(20, 236, (13, 2)), np.ones(13, bool)


def test_skeleton_covers_visible_joints_only():
    xy, visible = pose()
    visible[[3, 8]] = False
    picture = np.asarray(draw_skeleton(GRAY, xy, visible))
    assert picture.shape == GRAY.shape
    for joint in np.flatnonzero(visible):
        x, y = np.floor(xy[joint]).astype(int)
        assert (picture[y, x] != 90).any()
    np.testing.assert_array_equal(np.asarray(draw_skeleton(GRAY, xy, np.zeros(13, bool))), GRAY)
    assert (GRAY == 90).all()  # the argument is not drawn on


def test_a_bone_needs_both_ends():
    xy, visible = np.full((13, 2), 20.0), np.zeros(13, bool)
    xy[9], xy[11] = (100, 60), (100, 200)
    visible[9] = True
    assert (np.asarray(draw_skeleton(GRAY, xy, visible))[130, 100] == 90).all()
    visible[11] = True
    assert (np.asarray(draw_skeleton(GRAY, xy, visible))[130, 100] != 90).any()


def test_contact_sheet_and_panel():
    sheet = contact_sheet([[GRAY, GRAY]] * 5, ("reference", "next"), columns=2)
    assert sheet.size[0] > 4 * 256
    assert 3 * 256 < sheet.size[1] < 4 * 256
    moment = Moment(GRAY, *pose())
    panel = moment_sheet([(moment, moment, moment)] * 2)
    assert isinstance(panel, Image.Image)
    assert panel.size[0] > 3 * 256
    assert panel.size[1] > 2 * 256


def test_errors():
    with pytest.raises(ValueError, match=r"expected xy \(13, 2\)"):
        draw_skeleton(GRAY, np.zeros((12, 2)), np.zeros(12, bool))
    with pytest.raises(ValueError, match="uint8"):
        draw_skeleton(GRAY.astype(float), *pose())
    with pytest.raises(ValueError, match="equally many"):
        contact_sheet([[GRAY], [GRAY, GRAY]])
