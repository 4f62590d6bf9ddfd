"""Slips in the arguments of the data commands: one line that names argument, expected and found, before any work."""

import os
import shutil
import time

import numpy as np
import pytest

from m4.data import workers as workers_module
from m4.data.checks import check_seed, check_workers, printable
from m4.data.preparation import prepare as prepare_module
from m4.data.preparation.options import PrepareOptions
from m4.data.preparation.prepare import merge, prepare
from m4.data.split import split_output_dataset
from m4.data.synthetic import synth as synth_module
from m4.data.synthetic.clips import SynthOptions
from m4.data.synthetic.synth import synthesize
from m4.errors import DataError
from tests.data.test_commands import run
from tests.data.test_penn_action import label

SYNTH = ["synth", "--out", "out", "--videos", "2"]
PREPARE = ["prepare", "--penn-action", "penn", "--out", "out"]


LOCK = ".lock"


@pytest.fixture
def place(videos, prepared, tmp_path, monkeypatch):
    """The current folder, with videos in penn, tokens in root, good and bad labels; whatever works says so."""
    (tmp_path / "penn").symlink_to(videos)
    shutil.copytree(prepared, tmp_path / "root")
    shutil.rmtree(tmp_path / "root/.videos")
    (tmp_path / "empty").mkdir()
    shutil.copytree(videos / "labels", tmp_path / "poses")
    (tmp_path / "poses/0004.mat").write_bytes(b"cut off")
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("work was begun")

    for module in (workers_module, prepare_module, synth_module):
        monkeypatch.setattr(module, "for_each", refuse)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["split", "root", "--fractions", "nan", "nan", "nan"], "fractions"),
        (["split", "root", "--fractions", "inf", "0", "0"], "fractions"),
        (["split", "root", "--fractions", "1.1", "-0.1", "0"], "fractions"),
        (["split", "root", "--fractions", "0.8", "0.1", "0.2"], "fractions"),
        (["split", "root", "--seed", "-1"], "seed"),
        (["split", ""], "path"),
        ([*PREPARE, "--seed", "-1"], "seed"),
        ([*PREPARE, "--seed", "1e3"], "seed"),
        ([*PREPARE, "--seed", str(2**70)], "seed"),
        ([*PREPARE, "--workers", "0"], "workers"),
        ([*PREPARE, "--workers", "-3"], "workers"),
        ([*PREPARE, "--workers", "1000000000"], "workers"),
        ([*PREPARE, "--shard", "3/2"], "shard"),
        ([*PREPARE, "--shard", "0/0"], "shard"),
        ([*PREPARE, "--shard", "-1/2"], "shard"),
        ([*PREPARE, "--ssim-threshold", "nan"], "ssim"),
        ([*PREPARE, "--ssim-threshold", "inf"], "ssim"),
        (["prepare", "--penn-action", "penn", "--out", "penn"], "penn: expected an output folder outside"),
        (["prepare", "--penn-action", "penn", "--out", "penn/frames/0009"], "0009: expected an output folder outside"),
        (["prepare", "--penn-action", "penn", "--out", "file"], "file: expected a folder that can be written to"),
        (["prepare", "--penn-action", "penn", "--out", "file/out"], "file/out: expected a folder that can be"),
        (["prepare", "--penn-action", "penn", "--out", ""], "--out"),
        (["prepare", "--penn-action", "", "--out", "out"], "--penn-action"),
        (["prepare", "--penn-action", "file", "--out", "out"], "file: expected a folder in the Penn Action layout"),
        ([*SYNTH, "--frames", "1"], "frames"),
        ([*SYNTH, "--frames", "5-3"], "frames"),
        ([*SYNTH, "--frames", "9999999"], "frames"),
        ([*SYNTH, "--size", "0x0"], "64x64 to 8192x8192 pixels, found 0x0"),
        ([*SYNTH, "--size", "99999x270"], "8192x8192 pixels, found 99999x270"),
        ([*SYNTH, "--videos", "-1"], "videos"),
        ([*SYNTH, "--videos", "1000000000"], "videos"),
        ([*SYNTH, "--scenes", "0"], "scenes"),
        ([*SYNTH, "--seed", "-1"], "seed"),
        ([*SYNTH, "--workers", "0"], "workers"),
        ([*SYNTH, "--workers", "1000000000"], "workers"),
        ([*SYNTH, "--poses", "empty"], "empty: expected a folder with at least 2 label files, found 0"),
        ([*SYNTH, "--poses", "file"], "file: expected a folder with at least 2 label files, found no such"),
        (["synth", "--out", "out", "--videos", "5", "--poses", "poses"], "0004.mat: expected a readable MATLAB 5"),
        (["synth", "--out", "poses/new", "--videos", "1", "--poses", "poses"], "new: expected an output folder"),
        (["synth", "--out", "file", "--videos", "1"], "file: expected a folder that can be written to"),
        (["sample", "--out", "out", "--videos", "0"], "videos"),
        (["sample", "--out", "out", "--workers", "-2"], "workers"),
        (["inspect", "root", "--samples", "0"], "samples"),
        (["inspect", "root", "--samples", "-5", "--no-sheet", "--penn-action", "penn"], "samples"),
        (["inspect", "root", "--penn-action", "empty"], "expected the folders frames/ and labels/"),
        (["inspect", "file"], "file: expected a data root"),
    ],
)
def test_slips_are_named_before_the_work(place, capsys, arguments, names):
    before = sorted(path for path in place.rglob("*") if path.name != LOCK)
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert names in err.splitlines()[-1]
    assert "Traceback" not in err
    assert err.splitlines()[-1].count("error: ") == 1
    if arguments[0] != "inspect" and "sample" not in arguments:
        assert not out
    assert sorted(path for path in place.rglob("*") if path.name != LOCK) == before


def test_wrong_arguments_of_split_leave_no_trace_in_a_prepared_root(prepared, tmp_path, capsys):
    shutil.copytree(prepared, tmp_path / "root")
    kept = (tmp_path / "root/.videos/options.json").read_bytes()
    for change in (["--seed", "-1"], ["--fractions", "nan", "nan", "nan"]):
        status, _, err = run(capsys, "split", tmp_path / "root", *change)
        assert status == 2
        assert change[0].strip("-") in err
    with pytest.raises(DataError, match="split unit"):
        merge(tmp_path / "root", unit="frame")
    assert (tmp_path / "root/.videos/options.json").read_bytes() == kept


@pytest.mark.parametrize("seed", [-1, 1.5, True, "7", None, 2**63, float("nan")])
def test_seeds(place, seed):
    with pytest.raises(DataError, match="seed: expected at least 0 and at most 9223372036854775807"):
        prepare("penn", "out", PrepareOptions(seed=seed))
    with pytest.raises(DataError, match="seed: expected at least 0"):
        synthesize("out", SynthOptions(videos=1, seed=seed))
    with pytest.raises(DataError, match="seed: expected at least 0"):
        split_output_dataset("root", seed=seed)
    check_seed(2**63 - 1)
    check_seed(0)


def test_workers():
    for workers in (0, -3, 10**9, 1.0, None):
        with pytest.raises(DataError, match="workers: expected at least 1 and at most "):
            check_workers(workers)
    check_workers(64)


def test_more_samples_than_there_are_is_all_of_them(videos, prepared, capsys):
    """Not an array of a billion places."""
    start = time.monotonic()
    status, out, _ = run(capsys, "inspect", prepared, "--samples", 10**9, "--no-sheet", "--penn-action", videos)
    assert status == 0
    assert "round trip of " in out
    assert time.monotonic() - start < 120


def test_the_home_folder_is_understood(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    status, _, _ = run(capsys, "synth", "--out=~/penn", "--videos", 1, "--frames", 2, "--size", "64x64")
    assert status == 0
    assert (tmp_path / "penn/frames/0001").is_dir()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ["two\nlines", os.fsdecode(b"\xff"), "größe", "a b'c\"d$e"])
def test_folders_of_any_name(videos, prepared, tmp_path, tree, capsys, name):
    penn, out = tmp_path / name / "penn", tmp_path / name / "root"
    shutil.copytree(videos, penn)
    prepare(penn, out, progress=False)
    assert tree(out) == tree(prepared)
    status, _, err = run(capsys, "inspect", out, "--sheet", tmp_path / name / "x.png", "--samples", 1)
    assert status in (0, 2) if "\udcff" in name else status == 0, err
    (penn / "labels/0001.mat").write_bytes(b"")
    assert list(prepare(penn, out, progress=False).bad) == ["0001"]


def test_pose_files_of_any_size_are_looked_at_first(tmp_path):
    from m4.data.penn_action import write_label

    (tmp_path / "poses").mkdir()
    write_label(tmp_path / "poses/0001.mat", label(width=60_000))
    with pytest.raises(DataError, match=r"0001\.mat: expected frames of 64x64 to 8192x8192 pixels, found 60000x80"):
        synthesize(tmp_path / "out", SynthOptions(videos=1), tmp_path / "poses")
    assert not (tmp_path / "out").exists()


def test_names_on_one_line():
    assert printable("0001 größe") == "0001 größe"
    assert printable("a\nb") == "a\\nb"
    assert printable(os.fsdecode(b"\xff")) == "\\udcff"
    assert np.all([printable(name).isprintable() for name in map(chr, range(0x300))])
