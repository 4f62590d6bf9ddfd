"""Pose figures of cases small enough to work out by hand."""

import math

import numpy as np
import pytest

from m4.poses import Poses, bounding_boxes, median_pose, nearest_figures, pose_figures

BINS = 257  # so that a bin is a pixel


def poses(*samples):
    """From (x, y, visible) a joint."""
    tokens = [np.array(joints).T.reshape(-1) for joints in samples]
    return Poses.of(np.stack(tokens), BINS)


TRUE = poses([(10, 10, 1), (40, 50, 1), (200, 200, 0)], [(0, 0, 1), (0, 100, 1), (100, 0, 1)])
REFERENCE = poses([(10, 10, 1), (40, 50, 0), (200, 200, 1)], [(0, 0, 1), (0, 100, 1), (0, 0, 0)])
PREDICTED = poses([(13, 14, 1), (0, 0, 1), (0, 0, 1)], [(0, 14, 1), (0, 130, 0), (1, 1, 1)])


def test_by_hand():
    """Judged are joint 0 of the first sample (5 px off, diagonal 50) and 0, 1 of the second (14, 30; diagonal 141)."""
    figures = pose_figures(PREDICTED, REFERENCE, TRUE)
    assert figures["joints"] == 3
    assert figures["error_px"] == pytest.approx((5 + 14 + 30) / 3)
    assert figures["pck"] == {"0.05": 0.0, "0.1": pytest.approx(2 / 3), "0.2": pytest.approx(2 / 3)}
    assert figures["visibility_accuracy"] == pytest.approx(4 / 6)  # wrong: the third joint, the second of the second


def test_a_threshold_that_is_met_exactly_counts():
    true, predicted = poses([(0, 0, 1), (60, 80, 1)]), poses([(0, 10, 1), (60, 80, 1)])
    assert pose_figures(predicted, true, true)["pck"] == {"0.05": 0.5, "0.1": 1.0, "0.2": 1.0}


def test_the_truth_is_perfect():
    figures = pose_figures(TRUE, REFERENCE, TRUE)
    assert (figures["error_px"], figures["visibility_accuracy"], set(figures["pck"].values())) == (0, 1, {1})


def test_no_joint_to_judge():
    hidden = poses([(1, 2, 0), (3, 4, 0)])
    figures = pose_figures(hidden, hidden, hidden)
    assert figures["error_px"] is None
    assert set(figures["pck"].values()) == {None}
    assert (figures["joints"], figures["visibility_accuracy"]) == (0, 1)


def test_the_nearest_of_two_by_hand():
    """First sample: joint 0 is judged, 5 px off in one draw and 13 in the other. Second: joints 0 and 1, 14 and 30 px
    off (mean 22), or 20 and 20; the third joint, which is far off in the other, is not judged."""
    other = poses([(15, 22, 1), (0, 0, 1), (0, 0, 1)], [(0, 20, 1), (0, 120, 0), (250, 250, 1)])
    expected = {"samples": 2, "error_px": pytest.approx((5 + 20 + 20) / 3)}
    assert nearest_figures([PREDICTED, other], REFERENCE, TRUE) == expected
    assert nearest_figures([other, PREDICTED], REFERENCE, TRUE) == expected
    one = nearest_figures([PREDICTED], REFERENCE, TRUE)
    assert one == {"samples": 1, "error_px": pose_figures(PREDICTED, REFERENCE, TRUE)["error_px"]}
    assert nearest_figures([PREDICTED, TRUE, other], REFERENCE, TRUE)["error_px"] == 0


def test_the_nearest_where_no_joint_is_judged():
    """A sample without a judged joint has no part in the mean; without any there is none."""
    hidden = poses([(1, 2, 0), (3, 4, 0), (5, 6, 0)], [(0, 0, 1), (0, 100, 1), (0, 0, 0)])
    assert nearest_figures([PREDICTED], hidden, TRUE)["error_px"] == pytest.approx((14 + 30) / 2)
    nothing = poses([(1, 2, 0)])
    assert nearest_figures([nothing, nothing], nothing, nothing) == {"samples": 2, "error_px": None}


def test_boxes():
    low, high = bounding_boxes(TRUE)
    assert low.tolist() == [[10, 10], [0, 0]]
    assert high.tolist() == [[40, 50], [100, 100]]
    assert not np.isfinite(bounding_boxes(poses([(1, 2, 0)]))[0]).any()


def test_median_pose():
    """Over visible joints only; visible where most are; one that never is lies in the middle."""
    pose = median_pose(
        poses(
            [(10, 0, 1), (9, 9, 0), (5, 5, 1)],
            [(20, 6, 1), (9, 9, 0), (9, 9, 0)],
            [(90, 8, 1), (9, 9, 0), (7, 9, 0)],
            [(250, 250, 0), (9, 9, 0), (7, 9, 1)],
        )
    )
    assert pose.xy.tolist() == [[[20, 6], [128, 128], [6, 7]]]
    assert pose.visible.tolist() == [[True, False, False]]
    assert len(pose.repeated(5)) == 5


def test_pixels_are_those_of_the_canvas():
    figures = pose_figures(Poses.of(np.array([[8191, 0, 1]]), 8192), *[Poses.of(np.array([[0, 8191, 1]]), 8192)] * 2)
    assert figures["error_px"] == pytest.approx(256 * math.sqrt(2))
