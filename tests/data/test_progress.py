"""Reading many files shows how far it is; reading few says nothing."""

from m4.data import progress
from m4.data.preparation.prepare import prepare


def test_only_long_work_is_shown(monkeypatch, capsys):
    assert list(progress.shown([1, 2, 3], "reading coords", "file")) == [1, 2, 3]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_QUIET", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress.shown([1, 2, 3], "reading coords", "file")) == [1, 2, 3]
    said = capsys.readouterr().err
    assert "reading coords" in said
    assert "3" in said


def test_preparing_is_never_silent_for_long(videos, tmp_path, monkeypatch, capsys):
    """What comes after the videos takes minutes for many of them: laying out, looking through what is there, moving."""
    monkeypatch.setattr(progress, "_QUIET", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    prepare(videos, tmp_path / "out")
    said = capsys.readouterr().err
    assert "laying out" in said
    assert "looking through coords_next" in said
    assert "split" in said


def test_preparing_without_progress_is_silent(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_QUIET", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    prepare(videos, tmp_path / "out", progress=False)
    assert capsys.readouterr().err == ""
