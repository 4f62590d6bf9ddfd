"""A picture of the user's own: cut as the data was, with a pose that lies on it."""

import json

import numpy as np
import pytest
from PIL import Image

import m4.generate
from m4.cli import exit_status
from m4.data.tokenizers import make_tokenizer
from m4.errors import DataError
from m4.generation.inputs import picture_inputs, read_pose
from m4.modalities import RowLayout
from m4kernels import dequantize_coords

LAYOUT = RowLayout(("tok_rgb", "coords"), (256, 39), (64000, 8192))
X, Y = [100.0 + 8 * joint for joint in range(13)], [50.0 + 10 * joint for joint in range(13)]


@pytest.fixture
def pose(tmp_path):
    path = tmp_path / "pose.json"
    path.write_text(json.dumps({"x": X, "y": Y, "visibility": [1] * 12 + [0]}))
    return path


@pytest.fixture
def picture(tmp_path):
    """Dark, with a bright square about the fourth joint."""
    image = np.full((240, 480, 3), 20, np.uint8)
    image[int(Y[3]) - 10 : int(Y[3]) + 10, int(X[3]) - 10 : int(X[3]) + 10] = 250
    path = tmp_path / "mine.png"
    Image.fromarray(image).save(path)
    return path


@pytest.mark.parametrize("framing", ["subject", "center", "squash"])
def test_a_pose_lies_on_its_picture(picture, pose, framing):
    inputs = picture_inputs(LAYOUT, {"options": {"framing": framing}}, make_tokenizer("fsq"), picture, pose)
    tokens = inputs.batch()
    xy, visible = dequantize_coords(tokens[0, 256:])
    assert visible.tolist() == [True] * 12 + [False] if framing != "center" else not visible.all()
    decoded = make_tokenizer("fsq").decode(tokens[:, :256].unflatten(1, (16, 16)).numpy())[0]
    if visible[3]:
        x, y = xy[3].round().long().tolist()
        assert decoded[y - 4 : y + 4, x - 4 : x + 4].mean() > 120  # the background is 20
    assert decoded.mean() < 80


def test_without_a_pose(picture):
    tokenizer = make_tokenizer("fsq")
    inputs = picture_inputs(LAYOUT, {"options": {"framing": "subject"}}, tokenizer, picture, None)
    assert not inputs.tokens[0, 256:].any()
    middle = np.asarray(Image.open(picture).crop((120, 0, 360, 240)).resize((256, 256), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(inputs.tokens[0, :256], tokenizer.encode(middle[None]).flatten())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting"),
        ("[]", "list indices"),
        ('{"x": [1]}', "no 'y'"),
        (json.dumps({"x": X, "y": Y, "visibility": [1] * 12}), r"arrays of shape \[12\] and \[13\]"),
        (json.dumps({"x": X, "y": Y, "visibility": [2] * 13}), r"found \[2.0, "),
        (json.dumps({"x": ["a"] * 13, "y": Y, "visibility": [1] * 13}), "could not convert"),
    ],
)
def test_poses_that_are_none(tmp_path, text, said):
    path = tmp_path / "pose.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"pose.json: expected .*{said}"):
        read_pose(path)


@pytest.mark.parametrize("with_pose", [False, True])
def test_the_command(saved_run, picture, pose, tmp_path, capsys, monkeypatch, with_pose):
    """The embedded tokenizer knows more ids than this run, so its picture is taken as one of the first 512."""
    assert (
        exit_status(lambda: m4.generate.main(["--run", str(saved_run), "--out", "a.npz", "--image", str(picture)])) == 2
    )
    assert "the run knows 512 ids of tok_rgb" in capsys.readouterr().err
    plain = make_tokenizer("fsq").encode
    monkeypatch.setattr("m4.data.tokenizers.fsq.FSQTokenizer.encode", lambda self, images: plain(images) % 512)
    out = tmp_path / "mine.npz"
    options = ["--image", str(picture), *(["--pose", str(pose)] if with_pose else [])]
    arguments = ["--run", str(saved_run), "--out", str(out), "--out", str(tmp_path / "a.gif"), "--steps", "1", *options]
    assert exit_status(lambda: m4.generate.main(arguments)) == 0, capsys.readouterr().err
    arrays = np.load(out)
    assert arrays["samples"].tolist() == ["mine.png"]
    assert ("coords" in arrays.files) == with_pose
    assert arrays["coords_next"].shape == (1, 3, 13)
    assert not any(name.startswith("true") for name in arrays.files)
    rolled = [*arguments[:2], "--out", str(tmp_path / "b.gif"), "--rollout", "2", "--steps", "1", *options]
    assert exit_status(lambda: m4.generate.main(rolled)) == 0, capsys.readouterr().err
