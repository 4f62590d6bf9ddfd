"""Reading and writing the Penn Action layout, and what it says about damaged input."""

import dataclasses
import shutil

import numpy as np
import pytest
import scipy.io
from PIL import Image

from m4.data.penn_action import Label, list_videos, open_video, read_frame, read_label, write_label
from m4.errors import DataError


def label(frames=4, **changes):
    rng = np.random.default_rng(0)
    fields = dict(
        x=rng.uniform(1, 100, (frames, 13)),
        y=rng.uniform(1, 80, (frames, 13)),
        visible=rng.uniform(size=(frames, 13)) < 0.8,
        height=80,
        width=100,
        action="squat",
        view="left",
        train=False,
        bbox=rng.uniform(1, 80, (frames, 4)),
    )
    return Label(**{**fields, **changes})


def rewrite(path, **changes):
    fields = {key: value for key, value in scipy.io.loadmat(path).items() if not key.startswith("__")}
    for key, value in changes.items():
        if value is None:
            del fields[key]
        else:
            fields[key] = value
    scipy.io.savemat(path, fields)


def test_round_trip(tmp_path):
    before = label()
    write_label(tmp_path / "a.mat", before)
    after = read_label(tmp_path / "a.mat")
    for field in dataclasses.fields(Label):
        np.testing.assert_array_equal(getattr(after, field.name), getattr(before, field.name))


def test_fields_are_those_of_penn_action(tmp_path, shared_dir):
    write_label(tmp_path / "a.mat", label())
    ours = scipy.io.loadmat(tmp_path / "a.mat")
    theirs = scipy.io.loadmat(shared_dir / "penn_action/labels/0001.mat")
    assert {key for key in ours if not key.startswith("__")} == {key for key in theirs if not key.startswith("__")}
    for key in ("x", "y", "visibility", "bbox", "dimensions", "train"):
        assert ours[key].dtype == theirs[key].dtype, key
        assert ours[key].ndim == theirs[key].ndim, key


def test_reads_real_labels(shared_dir):
    paths = sorted((shared_dir / "penn_action/labels").glob("*.mat"))
    assert len(paths) > 1000
    for path in paths[::10]:
        record = read_label(path)
        assert record.x.shape == record.y.shape == record.visible.shape == (len(record), 13)
        assert record.visible.dtype == bool
        assert record.view in ("front", "back", "left", "right")


def test_coordinates_are_matlab_pixels():
    record = label(x=np.ones((4, 13)), y=np.full((4, 13), 2.0))
    np.testing.assert_array_equal(record.continuous(0), np.tile([0.5, 1.5], (13, 1)))


def test_non_finite_joints_are_invisible(tmp_path):
    record = label(visible=np.ones((4, 13), bool))
    record.x[1, 2] = np.nan
    record.y[3, 5] = np.inf
    write_label(tmp_path / "a.mat", record)
    hidden = np.argwhere(~read_label(tmp_path / "a.mat").visible)
    assert hidden.tolist() == [[1, 2], [3, 5]]


@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.7, 0.95, 0.999])
def test_truncated_file(tmp_path, share):
    path = tmp_path / "a.mat"
    write_label(path, label(frames=40))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"a\.mat: expected"):
        read_label(path)


def test_damaged_bytes_give_a_label_or_one_error(tmp_path, shared_dir):
    rng = np.random.default_rng(1)
    source = (shared_dir / "penn_action/labels/0001.mat").read_bytes()
    errors = 0
    for _ in range(60):
        content = bytearray(source)
        for place in rng.integers(0, len(content), 20):
            content[place] = rng.integers(256)
        (tmp_path / "a.mat").write_bytes(content)
        try:
            read_label(tmp_path / "a.mat")
        except DataError:
            errors += 1
    assert errors > 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=np.ones((4, 12))), r"x with 4 frames x 13 joints, found shape \(4, 12\)"),
        (dict(y=np.ones((4, 14))), r"y with 4 frames x 13 joints, found shape \(4, 14\)"),
        (dict(visibility=np.ones((3, 13))), r"visibility with 4 frames x 13 joints, found shape \(3, 13\)"),
        (dict(nframes=np.array([[9]])), r"dimensions \[height width 9\]"),
        (dict(dimensions=np.array([[80, 100]])), "dimensions with 3 values"),
        (dict(dimensions=np.array([[0, 100, 4]])), "positive sizes"),
        (dict(x=np.array([["a"]])), "numbers in x"),
        (dict(pose=None), "found no pose"),
        (dict(action=np.array([[3.0]])), "text in action"),
    ],
)
def test_wrong_fields(tmp_path, changes, message):
    path = tmp_path / "a.mat"
    write_label(path, label())
    rewrite(path, **changes)
    with pytest.raises(DataError, match=message):
        read_label(path)


def test_boxes_of_another_length_are_dropped(tmp_path):
    path = tmp_path / "a.mat"
    write_label(path, label())
    rewrite(path, bbox=np.ones((3, 4)))  # label 1154 of the real set has one box too few
    assert read_label(path).bbox is None


def test_frames_and_labels_disagree_in_number(videos, tmp_path):
    shutil.copytree(videos, tmp_path / "v")
    (tmp_path / "v/frames/0001/000003.jpg").unlink()
    with pytest.raises(DataError, match=r"0001: expected \d+ frames \(nframes of 0001\.mat\), found \d+"):
        open_video(tmp_path / "v", "0001")


def test_frames_are_ordered_by_number(videos, tmp_path):
    """Names without leading zeros, and what a Mac leaves behind; a gap or a second copy is refused."""
    shutil.copytree(videos, tmp_path / "v")
    folder = tmp_path / "v/frames/0001"
    for path in list(folder.iterdir()):
        path.rename(folder / f"frame {int(path.stem) + 5}.jpg")
    (folder / "._frame 6.jpg").write_bytes(b"")
    (tmp_path / "v/labels/._0001.mat").write_bytes(b"")
    frames = open_video(tmp_path / "v", "0001").frames
    assert [path.name for path in frames] == [f"frame {number + 6}.jpg" for number in range(len(frames))]
    assert list_videos(tmp_path / "v") == list_videos(videos)
    (folder / "frame 8.jpg").rename(folder / "frame 99.jpg")
    with pytest.raises(DataError, match=r"frames with consecutive numbers, found frame 9\.jpg after frame 7\.jpg"):
        open_video(tmp_path / "v", "0001")
    (folder / "frame 99.jpg").rename(folder / "frame 7.png")
    with pytest.raises(DataError, match=r"consecutive numbers, found frame 7\.png after frame 7\.jpg"):
        open_video(tmp_path / "v", "0001")


def test_missing_parts(videos, tmp_path):
    root = tmp_path / "v"
    shutil.copytree(videos, root)
    with pytest.raises(DataError, match="no such folder"):
        list_videos(tmp_path / "nowhere")
    shutil.rmtree(root / "frames/0002")
    with pytest.raises(DataError, match=r"frames/0002: expected a folder of frames"):
        open_video(root, "0002")
    (root / "labels/0003.mat").unlink()
    with pytest.raises(DataError, match=r"labels/0003\.mat: expected a label file"):
        open_video(root, "0003")
    assert list_videos(root) == ["0001", "0002", "0003", "0004", "0005"]
    shutil.rmtree(root / "labels")
    with pytest.raises(DataError, match="labels: expected the folders frames/ and labels/"):
        list_videos(root)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_image(videos, tmp_path, content):
    path = tmp_path / "000001.jpg"
    whole = (videos / "frames/0001/000001.jpg").read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(DataError, match=r"000001\.jpg: expected a whole image file"):
        read_frame(path)


def test_frame_of_another_size(videos, tmp_path):
    shutil.copytree(videos, tmp_path / "v")
    Image.new("RGB", (90, 90)).save(tmp_path / "v/frames/0001/000002.jpg")
    video = open_video(tmp_path / "v", "0001")
    video.image(0)
    with pytest.raises(DataError, match=r"expected 161x120 pixels .* found 90x90"):
        video.image(1)
