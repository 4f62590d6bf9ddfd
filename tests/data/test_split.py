"""Splits: exact counts, reproducible, without leakage, safe to repeat."""

import csv
import os
import shutil

import numpy as np
import pytest

from m4.data.layout import find_pids
from m4.data.split import split_output_dataset
from m4.errors import DataError


def make(root, videos, per_video, modalities=("rgb", "coords")):
    rows = []
    for number in range(videos * per_video):
        pid = f"{number:06d}"
        rows.append((pid, f"v{number // per_video:03d}"))
        for modality in modalities:
            folder = root / modality / pid
            folder.mkdir(parents=True)
            np.save(folder / "x.npy", np.array([number]))
    with open(root / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("pid", "video"), *rows])
    return dict(rows)


def members(root, modality="rgb"):
    return {
        split: {path.name for path in (root / split / modality).iterdir()}
        for split in ("train", "eval", "test")
        if (root / split).is_dir()
    }


@pytest.mark.parametrize(
    ("units", "counts"), [(100, (80, 10, 10)), (57, (45, 6, 6)), (7, (5, 1, 1)), (3, (1, 1, 1)), (1, (1, 0, 0))]
)
def test_exact_counts(tmp_path, units, counts):
    make(tmp_path, units, 1)
    totals = split_output_dataset(tmp_path, unit="pair")
    assert tuple(totals.values()) == counts
    assert sum(counts) == units
    for modality in ("rgb", "coords"):
        assert {split: len(pids) for split, pids in members(tmp_path, modality).items()} == {
            split: count for split, count in totals.items() if count
        }
    assert not (tmp_path / "rgb").exists()


def test_videos_do_not_leak(tmp_path):
    video = make(tmp_path, 20, 6)
    totals = split_output_dataset(tmp_path)
    assert totals == {"train": 96, "eval": 12, "test": 12}
    found = {split: {video[pid] for pid in pids} for split, pids in members(tmp_path).items()}
    assert not found["train"] & found["eval"]
    assert not found["train"] & found["test"]
    assert not found["eval"] & found["test"]
    assert members(tmp_path, "rgb") == members(tmp_path, "coords")


def test_reproducible_and_idempotent(tmp_path):
    for name in ("a", "b"):
        make(tmp_path / name, 20, 3)
    split_output_dataset(tmp_path / "a", seed=1)
    split_output_dataset(tmp_path / "b", seed=2)
    assert members(tmp_path / "a") != members(tmp_path / "b")
    split_output_dataset(tmp_path / "b", seed=1)  # splitting what is split moves it
    assert members(tmp_path / "a") == members(tmp_path / "b")
    before = members(tmp_path / "a")
    split_output_dataset(tmp_path / "a", seed=1)
    assert members(tmp_path / "a") == before


def test_other_fractions(tmp_path):
    make(tmp_path, 10, 2)
    assert split_output_dataset(tmp_path, (0.5, 0.5, 0.0)) == {"train": 10, "eval": 10, "test": 0}


def test_an_interrupted_split_is_finished(tmp_path):
    for name in ("a", "b"):
        make(tmp_path / name, 10, 2)
    split_output_dataset(tmp_path / "a")
    (tmp_path / "b/eval/rgb").mkdir(parents=True)
    (tmp_path / "b/rgb/000000").rename(tmp_path / "b/eval/rgb/000000")
    split_output_dataset(tmp_path / "b")
    for modality in ("rgb", "coords"):
        assert members(tmp_path / "a", modality) == members(tmp_path / "b", modality)


def test_readers_refuse_a_split_that_was_cut_off(tmp_path, monkeypatch):
    """Killed after half of the moves; the next call finishes it, and then readers see it."""
    make(tmp_path, 10, 2)
    calls = []

    def rename(source, destination):
        calls.append(source)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return os.replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            split_output_dataset(tmp_path)
    with pytest.raises(DataError, match="expected a finished data set"):
        find_pids(tmp_path, "train", ["rgb"])
    split_output_dataset(tmp_path)
    assert len(find_pids(tmp_path, "train", ["rgb", "coords"])) == 16


def test_duplicate_pids_are_refused(tmp_path):
    make(tmp_path, 5, 2)
    with open(tmp_path / "pairs.csv", "a", newline="") as file:
        file.write("000003,another\n")
    with pytest.raises(DataError, match=r"pairs\.csv: expected one row a sample, found two for 000003"):
        split_output_dataset(tmp_path)
    assert (tmp_path / "rgb/000003").exists()


def test_videos_are_no_samples(tmp_path, videos):
    """A folder of frames beside the samples stays; a folder of videos given by mistake is refused untouched."""
    make(tmp_path, 10, 2)
    (tmp_path / "videos/frames").mkdir(parents=True)
    (tmp_path / "videos/frames/000001.jpg").write_bytes(b"x")
    split_output_dataset(tmp_path)
    assert (tmp_path / "videos/frames/000001.jpg").exists()
    with pytest.raises(DataError, match=r"frames/0001: expected a folder with one file"):
        split_output_dataset(videos, unit="pair")
    assert not (videos / "train").exists()


def test_errors(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        split_output_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected samples"):
        split_output_dataset(tmp_path)
    make(tmp_path, 5, 2)
    for fractions in ((0.8, 0.1), (0.8, 0.1, 0.2), (1.1, -0.1, 0.0)):
        with pytest.raises(DataError, match="fractions"):
            split_output_dataset(tmp_path, fractions)
    with pytest.raises(DataError, match="video or pair, found 'frame'"):
        split_output_dataset(tmp_path, unit="frame")
    shutil.copytree(tmp_path / "rgb/000003", tmp_path / "train/rgb/000003")
    with pytest.raises(DataError, match="expected each sample once"):
        split_output_dataset(tmp_path)
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "pairs.csv").write_text("pid,video\n000000,a\n")
    with pytest.raises(DataError, match="a row for every sample, found none for 000001"):
        split_output_dataset(tmp_path)
    (tmp_path / "pairs.csv").unlink()
    with pytest.raises(DataError, match=r"pairs\.csv: expected the table"):
        split_output_dataset(tmp_path)
    assert sum(split_output_dataset(tmp_path, unit="pair").values()) == 10
