"""The command line: what it prints, its exit status, one line and no traceback for a user's mistake."""

import io
import subprocess
import sys

import pytest
from PIL import Image

from m4.data.__main__ import main
from m4.data.sample_set import make_sample_set


def run(capsys, *arguments):
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def test_from_nothing_to_a_contact_sheet(tmp_path, capsys):
    penn, root = tmp_path / "penn", tmp_path / "root"
    synth = ["synth", "--out", penn, "--videos", 3, "--frames", "6-8", "--size", "120x90", "--seed", 5, "--scenes", 2]
    assert run(capsys, *synth)[:2] == (0, f"3 videos in {penn}\n")
    status, out, _ = run(capsys, "prepare", "--penn-action", penn, "--out", root, "--ssim-threshold", 0.95)
    assert status == 0
    assert f"pairs of 3 videos in {root}: train" in out
    status, out, _ = run(capsys, "split", root, "--fractions", 0.4, 0.3, 0.3, "--unit", "pair")
    assert status == 0
    assert out.startswith("train ")
    status, out, _ = run(capsys, "inspect", root, "--sheet", tmp_path / "sheet.png", "--samples", 3)
    assert status == 0
    for phrase in ("train: ", "tok_rgb: 256 tokens each", "coords: 39 tokens each", "visible ", "framing subject"):
        assert phrase in out
    assert Image.open(tmp_path / "sheet.png").size[0] > 256


def test_sample_is_announced_and_reused(tmp_path, capsys):
    status, out, _ = run(capsys, "sample", "--out", tmp_path / "s", "--videos", 3, "--workers", 1)
    assert status == 0
    assert "Embedded sample set: 3 animated videos (not real footage)" in out
    status, out, _ = run(capsys, "sample", "--out", tmp_path / "s", "--videos", 3)
    assert status == 0
    assert "(already there)" in out


def test_bad_videos_are_listed(videos, tmp_path, capsys):
    import shutil

    shutil.copytree(videos, tmp_path / "penn")
    (tmp_path / "penn/labels/0004.mat").write_bytes(b"")
    status, out, _ = run(capsys, "prepare", "--penn-action", tmp_path / "penn", "--out", tmp_path / "root")
    assert status == 0
    assert "1 bad videos were left out" in out
    assert "0004.mat: expected a readable MATLAB 5 file" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "--penn-action", "nowhere", "--out", "out"], "nowhere: expected a folder"),
        (["synth", "--out", "out", "--videos", "0"], "videos: expected at least 1"),
        (
            ["synth", "--out", "out", "--videos", "2", "--poses", "nowhere"],
            "nowhere: expected a folder with at least 2",
        ),
        (["synth", "--out", "out", "--videos", "1", "--size", "small"], "expected WIDTHxHEIGHT such as 480x270"),
        (["prepare", "--penn-action", "x", "--out", "out", "--shard", "3"], "expected i/n such as 0/4"),
        (["split", "nowhere"], "nowhere: expected a data root"),
        (["inspect", "nowhere"], "nowhere: expected a data root"),
        (["prepare", "--penn-action", "x", "--out", "out", "--tokenizer", "vq"], "invalid choice: 'vq'"),
        (["unknown"], "invalid choice: 'unknown'"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    if err.startswith("error: "):
        assert err.count("\n") == 1


def test_all_bad_is_a_failure_without_traceback(videos, tmp_path):
    (tmp_path / "penn/frames").mkdir(parents=True)
    (tmp_path / "penn/labels").mkdir()
    (tmp_path / "penn/labels/0001.mat").write_bytes(b"")
    command = [sys.executable, "-m", "m4.data", "prepare", "--penn-action", "penn", "--out", "out"]
    import m4

    environment = {"PYTHONPATH": str(next(iter(m4.__path__)) + "/.."), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: penn: expected at least one usable video")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "argument", "got"),
    [
        (["synth", "--out", "out", "--videos", "many"], "--videos", "'many'"),
        (["synth", "--out", "out", "--videos", "1", "--seed", "-1"], "--seed", "-1"),
        (["synth", "--out", "out", "--videos", "1", "--workers", "0"], "--workers", "0"),
        (["synth", "--out", "out", "--videos", "1", "--scenes", "0"], "--scenes", "0"),
        (["prepare", "--penn-action", "penn", "--out", "out", "--seed", "-1"], "--seed", "-1"),
        (["prepare", "--penn-action", "penn", "--out", "out", "--workers", "-2"], "--workers", "-2"),
        (["prepare", "--penn-action", "penn", "--out", "out", "--workers", "9999999"], "--workers", "9999999"),
        (["split", "root", "--fractions", "nan", "nan", "nan"], "--fractions", "nan"),
        (["split", "root", "--fractions", "0.5", "0.6", "-0.1"], "--fractions", "-0.1"),
        (["split", "root", "--fractions", "inf", "0", "0"], "--fractions", "inf"),
        (["split", "root", "--seed", "1.5"], "--seed", "'1.5'"),
        (["sample", "--out", "out", "--videos", "0"], "--videos", "0"),
        (["inspect", "root", "--samples", "0"], "--samples", "0"),
        (["inspect", "root", "--samples", "1000000000"], "--samples", "1000000000"),
        ([], "command", ""),
    ],
)
def test_a_number_out_of_range_is_one_line_before_any_work(arguments, argument, got, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {argument}: expected" if got else "error: ")
    assert argument in err
    assert got in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sheet", ["sheet.xyz", "sheet", ".", "file/sheet.png"])
def test_the_sheet_is_checked_before_the_work(prepared, tmp_path, monkeypatch, capsys, sheet):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    status, out, err = run(capsys, "inspect", prepared, "--sheet", sheet)
    assert (status, out) == (2, "")
    assert err.startswith("error: --sheet: ")


def test_a_full_disk_is_named_by_the_output_folder(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("m4.data.__main__.synthesize", full)
    status, _, err = run(capsys, "synth", "--out", tmp_path, "--videos", 1)
    assert (status, err) == (2, f"error: {tmp_path}: No space left on device\n")


def test_the_sample_set_where_standard_error_is_no_file(tmp_path, monkeypatch):
    """As in some notebooks."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr("m4.data.sample_set._arguments", lambda *_: ["m4", "--version"])
    assert make_sample_set(tmp_path, 1) == tmp_path
