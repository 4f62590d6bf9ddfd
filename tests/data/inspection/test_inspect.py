"""What `inspect` says: counts, tokens, joints, duplicates and leaks, quality, and the sheet."""

import csv
import json
import shutil

import numpy as np
import pytest
import scipy.io
from PIL import Image

from m4.data.__main__ import main
from m4.data.inspection.dataset_statistics import read_all, statistics
from m4.data.inspection.sheet import compare_with_frames, draw_sheet
from m4.data.layout import read_meta
from m4.data.split import split_output_dataset
from m4.data.tokenizers import tokenizer_of
from m4.errors import DataError
from m4.modalities import TOKEN_SHAPES

SPLITS = ("train", "eval", "test")


@pytest.fixture
def root(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "root")
    return tmp_path / "root"


def rows(root):
    with open(root / "pairs.csv", newline="") as file:
        return list(csv.DictReader(file))


def folder(root, modality, pid):
    (found,) = (root / split / modality / pid for split in SPLITS if (root / split / modality / pid).exists())
    return found


def test_counts_and_tokens_of_a_known_set(tmp_path):
    """Three samples whose tokens are known: every number by hand."""
    rgb = np.zeros((3, 16, 16), np.int32)
    rgb[0, 0] = 63_999
    coords = np.zeros((3, 3, 13), np.uint16)
    coords[:, 0], coords[:, 1] = 8191, 4000
    coords[:2, 2, :4] = 1
    for number in range(3):
        for modality in TOKEN_SHAPES:
            path = tmp_path / "eval" / modality / f"{number:06d}"
            path.mkdir(parents=True)
            np.save(path / "x.npy", (rgb if modality.startswith("tok") else coords)[number])
        path = tmp_path / "eval/captions" / f"{number:06d}"
        path.mkdir(parents=True)
        (path / "c.json").write_text(json.dumps({"caption": "" if number else "a person"}))
    text = statistics(tmp_path)
    assert "eval: 3 samples\n" in text
    assert (
        "tok_rgb: 256 tokens each, ids 0 … 63999, 2 different, 63,998 of 64,000 unused, entropy 0.10 nats, "
        "commonest 0 (97.9%)" in text
    )
    assert f"|█{' ' * 38}▁| histogram over 0 … 63999" in text
    assert "coords: 39 tokens each, ids 4000 … 8191, 2 different, 8,190 of 8,192 unused" in text
    assert "visible 21%, x 256.0 … 256.0, y 125.0 … 125.0 px; no joint visible in 1 samples" in text
    assert "visible by joint: head 67%, left shoulder 67%, right shoulder 67%, left elbow 67%, right elbow 0%" in text
    assert "captions: 2 different, 0 … 2 words, 2 empty; commonest (2): ''" in text
    assert (
        "duplicates: 1 samples are copies of another, such as 000001 and 000002" not in text
    )  # 2 differs in visibility
    assert "duplicates: 0 samples are copies of another" in text


def test_prepared_data_is_clean(root):
    text = statistics(root)
    assert "WARNING" not in text
    assert "duplicates: 0 samples" in text
    assert "videos: 5, 0 copies of another, 0 in more than one split" in text
    assert f"content: {json.loads((root / 'meta.json').read_text())['content'][:16]}, as meta.json says" in text
    assert "framing subject" in text
    split_output_dataset(root, (0.6, 0.2, 0.2), seed=1)  # moves samples, changes none
    assert "as meta.json says" in statistics(root)


def test_leaks_and_copies_are_found(root):
    table = rows(root)
    split_output_dataset(root, (0.4, 0.3, 0.3), unit="pair")
    text = statistics(root)
    assert "5 in more than one split such as 0001; split with --unit video" in text
    # A copy of one sample in another split.
    first, other = (next(path.name for path in sorted((root / split / "coords").iterdir())) for split in SPLITS[:2])
    for modality in TOKEN_SHAPES:
        shutil.rmtree(folder(root, modality, other))
        shutil.copytree(folder(root, modality, first), root / "eval" / modality / other)
    text = statistics(root)
    assert "duplicates: 1 samples are copies of another" in text
    assert f"WARNING: 1 samples are in two splits, such as train/{first} = eval/{other}" in text
    assert "WARNING: content differs from what meta.json says" in text
    assert len(table) == len(rows(root))


def test_copied_videos_are_found(root):
    table = rows(root)
    mine, theirs = ([row["pid"] for row in table if row["video"] == video] for video in ("0001", "0002"))
    count = min(len(mine), len(theirs))
    for a, b in zip(mine[:count], theirs[:count], strict=True):
        for modality in TOKEN_SHAPES:
            for path in folder(root, modality, b).iterdir():
                shutil.copy(next(folder(root, modality, a).iterdir()), path)
    for extra in mine[count:] + theirs[count:]:
        for modality in (*TOKEN_SHAPES, "captions"):
            shutil.rmtree(folder(root, modality, extra))
    assert "videos: 5, 1 copies of another such as 000" in statistics(root)


def test_a_pid_in_two_splits_and_one_without_a_row(root):
    pid = next(path.name for path in (root / "train/coords").iterdir())
    for modality in (*TOKEN_SHAPES, "captions"):
        shutil.copytree(root / "train" / modality / pid, root / "test" / modality / pid)
        shutil.copytree(root / "train" / modality / pid, root / "test" / modality / "900000")
    text = statistics(root)
    assert f"WARNING: 1 pids are in more than one split, such as {pid}" in text
    assert "WARNING: 1 samples are not in pairs.csv, such as 900000" in text


def test_quality_and_joints_against_the_frames(root, videos, tmp_path):
    splits, tokenizer = read_all(root), tokenizer_of(read_meta(root))
    lines = compare_with_frames(root, splits, videos, 8, tokenizer)
    assert lines[0].startswith("round trip of 16 frames: PSNR 2")
    assert lines[1] == "joints of 8 samples: those of the labels, in the window of the frames"
    moved = tmp_path / "videos"
    shutil.copytree(videos, moved)
    for path in (moved / "labels").iterdir():
        fields = {key: value for key, value in scipy.io.loadmat(path).items() if not key.startswith("__")}
        scipy.io.savemat(path, fields | {"y": fields["y"] + 1.0})
    lines = compare_with_frames(root, splits, moved, 8, tokenizer)
    assert lines[1] == "WARNING: the joints of 8 of 8 samples are not those of the labels"
    (root / "pairs.csv").unlink()
    with pytest.raises(DataError, match=r"expected pairs\.csv and meta\.json"):
        compare_with_frames(root, splits, videos, 8, tokenizer)


def test_sheet(root):
    """Twelve pairs, three a line; pictures of the decoded frames with skeletons of both colours drawn on them."""
    sheet = draw_sheet(root, 12)
    assert sheet.size[0] > 6 * 256
    assert 4 * 256 < sheet.size[1] < 6 * 256
    for color in ((70, 170, 255), (255, 120, 70)):
        assert (np.asarray(sheet) == color).all(-1).sum() > 200
    with pytest.raises(DataError, match="samples: expected at least 1, found 0"):
        draw_sheet(root, 0)
    shutil.rmtree(root / "test/tok_rgb_next")
    with pytest.raises(DataError, match="for a contact sheet, found no tok_rgb_next"):
        draw_sheet(root)


def test_command(root, videos, tmp_path, capsys):
    assert main(["inspect", str(root), "--penn-action", str(videos), "--samples", "4"]) == 0
    out = capsys.readouterr().out
    assert "round trip of 8 frames: PSNR" in out
    assert f"contact sheet: {root / 'contact_sheet.png'}" in out
    assert Image.open(root / "contact_sheet.png").size[0] > 1000
    assert main(["inspect", str(root), "--no-sheet"]) == 0
    assert "contact sheet" not in capsys.readouterr().out
    (folder(root, "captions", "000000") / "captions.json").write_text("{}")
    assert main(["inspect", str(root)]) == 2
    assert 'captions.json: expected {"caption": "…"}, found KeyError' in capsys.readouterr().err
