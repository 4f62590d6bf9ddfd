"""Reading many files shows how far it is; reading few says nothing."""

from m4.data import progress


def test_only_long_work_is_shown(monkeypatch, capsys):
    assert list(progress.shown([1, 2, 3], "reading coords", "file")) == [1, 2, 3]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_QUIET", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress.shown([1, 2, 3], "reading coords", "file")) == [1, 2, 3]
    said = capsys.readouterr().err
    assert "reading coords" in said
    assert "3" in said
