"""Loss curves."""

import io

import numpy as np
import pytest
from PIL import Image

from m4.pictures.curves import FIGURE_ENDINGS, figure_bytes, loss_curves


def _line(step, loss):
    return {"step": step, "tokens": step / 10, "loss": loss, "per_modality": {"a": loss, "b": None}}


def test_curves():
    train, evaluations = [_line(s, 9.0 / s) for s in range(1, 30)], [_line(0, 9.0), _line(29, 0.5)]
    figure = loss_curves(train, evaluations, {"a": 3.0})
    assert [axes.get_title() for axes in figure.axes] == ["mean", "a"]  # b never had a target
    assert len(figure.axes[0].lines) == 2
    assert len(figure.axes[1].lines) == 3
    assert list(figure.axes[1].lines[1].get_xdata()) == [0.0, 2.9]
    assert list(figure.axes[1].lines[1].get_ydata()) == [9.0, 0.5]
    assert list(figure.axes[1].lines[2].get_ydata()) == [3.0, 3.0]
    with Image.open(io.BytesIO(figure_bytes(figure, ".png"))) as picture:
        assert picture.width > 500


def test_a_step_without_a_target_is_a_gap():
    lines = [_line(1, 2.0), _line(2, 3.0), _line(3, 4.0)]
    lines[0]["per_modality"]["b"] = lines[2]["per_modality"]["b"] = 5.0
    curve = loss_curves(lines, [], {}).axes[2].lines[0]
    assert np.array_equal(curve.get_ydata(), [5.0, np.nan, 5.0], equal_nan=True)
    assert list(curve.get_xdata()) == [0.1, 0.2, 0.3]


def test_pose_error_beside_copying():
    def evaluation(step, error):
        return {**_line(step, 1.0), "next": {"pose": {"error_px": error, "copy": {"error_px": 8.0}}}}

    lines = [evaluation(0, 60.0), _line(10, 1.0), evaluation(20, None), evaluation(29, 9.0)]
    figure = loss_curves([_line(1, 2.0)], lines, {})
    assert [axes.get_title() for axes in figure.axes] == ["mean", "a", "next pose"]
    predicted, copied = figure.axes[2].lines
    assert list(predicted.get_xdata()) == [0.0, 2.0, 2.9]
    assert np.array_equal(predicted.get_ydata(), [60.0, np.nan, 9.0], equal_nan=True)
    assert list(copied.get_ydata()) == [8.0, 8.0, 8.0]
    assert len(figure_bytes(figure, ".png")) > 1000


def test_without_evaluations():
    figure = loss_curves([_line(1, 2.0)], [], {})
    assert [len(axes.lines) for axes in figure.axes] == [1, 1]


@pytest.mark.parametrize("ending", FIGURE_ENDINGS)
def test_every_ending(ending):
    assert len(figure_bytes(loss_curves([_line(1, 2.0)], [], {}), ending)) > 1000
