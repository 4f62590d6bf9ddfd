"""Preparation: the samples it writes, its determinism, and what it does about bad or interrupted input."""

import json
import shutil

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from m4.data.__main__ import main
from m4.data.framing import frame_for
from m4.data.penn_action import open_video
from m4.data.preparation.captions import label_caption
from m4.data.preparation.options import PrepareOptions
from m4.data.preparation.pairs import find_pairs
from m4.data.preparation.prepare import merge, prepare
from m4.data.store import open_store
from m4.data.tokenizers import make_tokenizer
from m4.errors import DataError
from m4kernels import quantize_coords
from tests.data.conftest import STORE, table

MODALITIES = ("tok_rgb", "coords", "tok_rgb_next", "coords_next", "captions")
SPLITS = ("train", "eval", "test")


def sample(root, modality, pid):
    (folder,) = (root / split / modality / pid for split in SPLITS if (root / split / modality / pid).exists())
    (path,) = folder.iterdir()
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


@pytest.fixture
def copied(videos, tmp_path):
    shutil.copytree(videos, tmp_path / "penn")
    return tmp_path / "penn"


def test_layout(prepared):
    rows = table(prepared)
    assert [row["pid"] for row in rows] == [f"{number:06d}" for number in range(len(rows))]
    meta = json.loads((prepared / "meta.json").read_text())
    assert sum(meta["splits"].values()) == len(rows)
    assert meta["tokenizer"] == {"id": "fsq-block16-v2", "vocab_size": 64_000}
    assert meta["options"]["framing"] == "subject"
    for split in SPLITS:
        pids = {modality: {path.name for path in (prepared / split / modality).iterdir()} for modality in MODALITIES}
        assert len(set(map(frozenset, pids.values()))) == 1
        assert len(pids["coords"]) == meta["splits"][split]
    assert sample(prepared, "tok_rgb", "000000").shape == (16, 16)
    coords = sample(prepared, "coords_next", "000000")
    assert coords.shape == (3, 13)
    assert coords.dtype == np.uint16
    assert set(np.unique(coords[2])) <= {0, 1}
    assert sample(prepared, "captions", "000000")["caption"].startswith("a person ")


def test_samples_are_what_the_parts_say(videos, prepared):
    """Every sample of a video, done by hand: pairs, the reference's window for both frames, tokens."""
    rows = [row for row in table(prepared) if row["video"] == "0002"]
    video = open_video(videos, "0002")
    images = [video.image(number) for number in range(len(video.frames))]
    pairs = list(find_pairs([np.asarray(image.convert("L")) for image in images]))
    assert [(int(row["reference_frame"]), int(row["successor_frame"])) for row in rows] == [
        (a + 1, b + 1) for a, b in pairs
    ]
    tokenizer = make_tokenizer("fsq")
    label = video.label
    for row, (a, b) in zip(rows, pairs, strict=True):
        framing = frame_for((120, 161), label.x[a], label.y[a], label.visible[a], "subject")
        for suffix, number in (("", a), ("_next", b)):
            window = np.asarray(framing.apply_image(images[number]))[None]
            np.testing.assert_array_equal(sample(prepared, f"tok_rgb{suffix}", row["pid"]), tokenizer.encode(window)[0])
            joints = quantize_coords(
                torch.from_numpy(label.continuous(number)).float(),
                torch.from_numpy(label.visible[number]),
                torch.from_numpy(framing.scale),
                torch.from_numpy(framing.offset),
            )
            np.testing.assert_array_equal(sample(prepared, f"coords{suffix}", row["pid"]), joints.reshape(3, 13))
        assert sample(prepared, "captions", row["pid"]) == {"caption": label_caption(label)}


def test_a_second_run_changes_nothing(videos, tmp_path, tree):
    first = prepare(videos, tmp_path / "a", progress=False)
    before = tree(tmp_path / "a")
    kept = (tmp_path / "a/meta.json").stat().st_mtime_ns
    second = prepare(videos, tmp_path / "a", progress=False)
    assert first.fresh
    assert not second.fresh
    assert first.splits == second.splits
    assert tree(tmp_path / "a") == before
    assert (tmp_path / "a/meta.json").stat().st_mtime_ns == kept


def test_workers_and_shards_do_not_show(videos, prepared, tmp_path, tree):
    prepare(videos, tmp_path / "workers", workers=2, progress=False)
    assert tree(tmp_path / "workers") == tree(prepared)
    states = [prepare(videos, tmp_path / "shards", shard=(index, 3), progress=False).complete for index in (2, 0, 1)]
    assert states == [False, False, True]
    assert tree(tmp_path / "shards") == tree(prepared)


def test_shards_are_merged_by_split(videos, prepared, tmp_path, tree, capsys):
    out = tmp_path / "out"
    prepare(videos, out, shard=(1, 2), progress=False)
    assert main(["split", str(out)]) == 2
    error = capsys.readouterr().err
    assert "expected all 5 videos, found 3 that no shard has done, the first being 0001" in error
    with pytest.raises(DataError, match="found videos that are not laid out yet"):
        open_store(out, "train", *STORE)
    # The second shard is cut off before its samples are laid out.
    (out / ".videos/0001.npz").write_bytes((prepared / ".videos/0001.npz").read_bytes())
    for name in ("0003", "0005"):
        shutil.copy(prepared / f".videos/{name}.npz", out / ".videos")
    assert main(["split", str(out)]) == 0
    assert capsys.readouterr().out.startswith("train ")
    assert tree(out) == tree(prepared)


def test_ranks_of_torchrun_are_shards(videos, prepared, tmp_path, tree, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["prepare", "--penn-action", str(videos), "--out", str(tmp_path / "out")]
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main(command) == 0
        assert ("this shard is done: 2 videos are ready" in capsys.readouterr().out) == (rank == "1")
    assert tree(tmp_path / "out") == tree(prepared)
    monkeypatch.setenv("RANK", "first")
    assert main(command) == 2
    assert "RANK and WORLD_SIZE: expected numbers, found 'first'" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main([*command, "--shard", "0/1"]) == 0
    assert "(already there)" in capsys.readouterr().out


def test_only_the_split_is_made_anew(videos, tmp_path, tree):
    """Other seeds and units move samples and tokenise nothing; the way there does not show."""
    options = PrepareOptions(split_unit="pair", seed=7)
    prepare(videos, tmp_path / "a", progress=False)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "a/.videos").glob("*.npz")}
    assert prepare(videos, tmp_path / "a", options, progress=False).fresh
    prepare(videos, tmp_path / "b", options, progress=False)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert {path: path.stat().st_mtime_ns for path in made} == made
    merge(tmp_path / "a", (0.5, 0.25, 0.25), seed=1, unit="video")
    meta = json.loads((tmp_path / "a/meta.json").read_text())
    assert meta["options"]["split_unit"] == "video"
    assert meta["options"]["seed"] == 1
    assert meta["fractions"] == [0.5, 0.25, 0.25]
    for split in SPLITS:
        assert meta["splits"][split] == len(list((tmp_path / "a" / split / "coords").iterdir()))


def test_a_changed_video_is_done_again_and_a_vanished_one_kept(copied, prepared, tmp_path, tree):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    shutil.rmtree(copied / "frames/0005")  # to free the disk
    assert not prepare(copied, out, progress=False).fresh
    label = copied / "labels/0002.mat"
    fields = {key: value for key, value in scipy.io.loadmat(label).items() if not key.startswith("__")}
    scipy.io.savemat(label, fields | {"y": fields["y"] + 3.0})
    assert prepare(copied, out, progress=False).fresh
    changed = {name for name, content in tree(out).items() if content != tree(prepared).get(name)}
    rows = [row["pid"] for row in table(out) if row["video"] == "0002"]
    assert {name.split("/")[2] for name in changed if "coords" in name} <= set(rows)
    assert any("coords" in name for name in changed)


def break_video(root, fault):
    """Damage video 0002 in one way; return what its reason must mention."""
    label, frame = root / "labels/0002.mat", root / "frames/0002/000004.jpg"
    fields = {key: value for key, value in scipy.io.loadmat(label).items() if not key.startswith("__")}
    if fault == "truncated jpeg":
        frame.write_bytes(frame.read_bytes()[:700])
        return "000004.jpg: expected a whole image file"
    if fault == "no image":
        frame.write_text("hello")
        return "000004.jpg: expected a whole image file"
    if fault == "zero-byte label":
        label.write_bytes(b"")
        return "0002.mat: expected a readable MATLAB 5 file, found 0 bytes"
    if fault in ("12 joints", "14 joints"):
        count = int(fault[:2])
        scipy.io.savemat(label, fields | {"x": np.resize(fields["x"], (len(fields["x"]), count))})
        return f"joints, found shape ({len(fields['x'])}, {count})"
    if fault == "wrong dimensions":
        scipy.io.savemat(label, fields | {"dimensions": fields["dimensions"] + np.array([[50, 0, 0]], np.uint16)})
        return "000001.jpg: expected 161x170 pixels"
    if fault == "a frame of another size":
        Image.new("RGB", (60, 60)).save(frame)
        return "000004.jpg: expected 161x120 pixels"
    if fault == "NaN frame count":
        scipy.io.savemat(label, fields | {"nframes": np.array([[np.nan]])})
        return "0002.mat: expected a whole number of frames"
    if fault == "missing frame":
        frame.unlink()
        return f"expected {len(fields['x'])} frames"
    if fault == "missing frames folder":
        shutil.rmtree(root / "frames/0002")
        return "expected a folder of frames"
    label.unlink()
    return "expected a label file"


@pytest.mark.parametrize(
    "fault",
    [
        "truncated jpeg",
        "no image",
        "zero-byte label",
        "12 joints",
        "14 joints",
        "wrong dimensions",
        "NaN frame count",
        "a frame of another size",
        "missing frame",
        "missing frames folder",
        "missing label",
    ],
)
def test_a_bad_video_is_reported_and_left_out(copied, prepared, tmp_path, fault):
    mention = break_video(copied, fault)
    summary = prepare(copied, tmp_path / "out", progress=False)
    assert list(summary.bad) == ["0002"]
    assert mention in summary.bad["0002"]
    assert summary.videos == 4
    rows = [(row["video"], row["reference_frame"], row["successor_frame"]) for row in table(tmp_path / "out")]
    others = [(row["video"], row["reference_frame"], row["successor_frame"]) for row in table(prepared)]
    assert rows == [row for row in others if row[0] != "0002"]


def test_a_mended_video_is_taken_up(videos, copied, prepared, tmp_path, tree):
    break_video(copied, "truncated jpeg")
    assert prepare(copied, tmp_path / "out", progress=False).bad
    shutil.copytree(videos, copied, dirs_exist_ok=True)
    assert not prepare(copied, tmp_path / "out", progress=False).bad
    assert tree(tmp_path / "out") == tree(prepared)


def test_bad_videos_do_not_hold_up_shards(copied, tmp_path):
    break_video(copied, "no image")
    first = prepare(copied, tmp_path / "out", shard=(1, 2), progress=False)
    assert not first.complete
    last = prepare(copied, tmp_path / "out", shard=(0, 2), progress=False)
    assert last.complete
    assert list(last.bad) == ["0002"]


def test_nan_joints_become_invisible(copied, tmp_path):
    path = copied / "labels/0001.mat"
    fields = {key: value for key, value in scipy.io.loadmat(path).items() if not key.startswith("__")}
    fields["x"][:, 4] = np.nan
    scipy.io.savemat(path, fields)
    summary = prepare(copied, tmp_path / "out", progress=False)
    assert not summary.bad
    pids = [row["pid"] for row in table(tmp_path / "out") if row["video"] == "0001"]
    assert pids
    for pid in pids:
        coords = sample(tmp_path / "out", "coords", pid)
        assert coords[0, 4] == coords[2, 4] == 0


def test_all_videos_bad(copied, tmp_path):
    for path in (copied / "labels").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"at least one usable video, found 5 of 5 bad, the first being 0001"):
        prepare(copied, tmp_path / "out", progress=False)
    assert not (tmp_path / "out/meta.json").exists()


def test_no_pair_at_all(videos, tmp_path):
    with pytest.raises(DataError, match=r"pairs in all videos, found 0\. Raise or lower --ssim-threshold"):
        prepare(videos, tmp_path / "out", PrepareOptions(ssim_threshold=-0.9), progress=False)


@pytest.mark.parametrize(
    "change",
    [dict(tokenizer="vq"), dict(captions="yes"), dict(framing="left"), dict(split_unit="x"), dict(ssim_threshold=2.0)],
)
def test_bad_options(videos, tmp_path, change):
    with pytest.raises(DataError, match=f"{next(iter(change))}: expected"):
        prepare(videos, tmp_path / "out", PrepareOptions(**change), progress=False)
    assert not (tmp_path / "out").exists()


def test_bad_arguments(videos, tmp_path):
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(DataError, match="shard"):
            prepare(videos, tmp_path / "out", shard=shard)
    with pytest.raises(DataError, match="workers"):
        prepare(videos, tmp_path / "out", workers=0)
    with pytest.raises(DataError, match="--cosmos-dir"):
        prepare(videos, tmp_path / "out", PrepareOptions(tokenizer="cosmos"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="a folder that can be written to"):
        prepare(videos, tmp_path / "file/out")


def test_other_options_in_the_same_folder_are_refused(videos, tmp_path, tree):
    prepare(videos, tmp_path / "out", progress=False)
    before = tree(tmp_path / "out")
    with pytest.raises(DataError, match=r"expected framing 'center', found data made with framing 'subject'"):
        prepare(videos, tmp_path / "out", PrepareOptions(framing="center"), progress=False)
    assert tree(tmp_path / "out") == before
    (tmp_path / "other/train").mkdir(parents=True)
    with pytest.raises(DataError, match="found train of other data"):
        prepare(videos, tmp_path / "other", progress=False)


def test_without_captions(videos, tmp_path):
    prepare(videos, tmp_path / "out", PrepareOptions(captions="none"), progress=False)
    assert not (tmp_path / "out/train/captions").exists()
