"""Loss curves of a run."""

import json

import pytest
from PIL import Image

from m4.errors import ConfigError
from m4.pictures.curves import loss_curves
from m4.run.metrics import truncate_metrics


def _line(kind, step, loss):
    return json.dumps(
        {"kind": kind, "step": step, "tokens": step / 10, "loss": loss, "per_modality": {"a": loss, "b": None}}
    )


def test_curves(tmp_path):
    lines = [_line("eval", 0, 9.0)] + [_line("train", s, 9.0 / s) for s in range(1, 30)] + [_line("eval", 29, 0.5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "evaluation.json").write_text(json.dumps({"unigram": {"a": {"cross_entropy": 3.0}}}))
    figure = loss_curves(tmp_path)
    assert [axes.get_title() for axes in figure.axes] == ["mean", "a", "b"]
    assert len(figure.axes[0].lines) == 2
    assert len(figure.axes[1].lines) == 3
    assert list(figure.axes[1].lines[1].get_ydata()) == [9.0, 0.5]
    figure.savefig(tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.width > 500


def test_no_metrics(tmp_path):
    with pytest.raises(ConfigError, match="metrics"):
        loss_curves(tmp_path)


def test_truncation_drops_later_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(_line("train", s, 1.0) for s in (1, 2, 3, 4)) + '\n{"kind": "tr')
    truncate_metrics(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    truncate_metrics(tmp_path / "new.jsonl", 5)
    assert (tmp_path / "new.jsonl").read_text() == ""
