"""Rolling a motion out: moments are fed back, and compared with what truly followed, in one window."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import m4.generate
from m4.cli import exit_status
from m4.data.following import following_rows, rows_followed
from m4.data.packed.packing import pack
from m4.data.store import TokenStore
from m4.generation.decode import generate
from m4.generation.horizons import TrueMoments, horizon_errors
from m4.generation.options import Decoding
from m4.generation.rollout import roll_out
from m4.modalities import NEXT, REFERENCE, RowLayout
from m4.model import M4, ModelConfig
from m4.pictures.gif import gif_frames
from m4kernels import quantize_coords
from tests.saved_runs import IDS, LENGTHS, save_run, saved_config, write_data

NAMES = (*REFERENCE, *NEXT)
LAYOUT = RowLayout(NAMES, (256, 39, 256, 39), (64000, 8192, 64000, 8192))


def test_moments_are_fed_back():
    config = ModelConfig(NAMES, [30] * 4, [4, 3, 4, 3], dim=16, head_dim=8, enc_depth=1, dec_depth=1)
    torch.manual_seed(0)
    model = M4(config).eval()
    with torch.no_grad():
        model.to_logits.weight.normal_()
    tokens = torch.randint(0, 30, (2, 14), generator=torch.Generator().manual_seed(1))
    options = {
        "id_limits": torch.full((14,), 30),
        "ordinal": torch.zeros(14, dtype=torch.bool),
        "decoding": Decoding(steps=2, temperature=1.0),
        "sample_ids": torch.tensor([5, 9]),
    }
    moments = roll_out(model, tokens, 3, given=["tok_rgb"], wanted=list(NEXT), **options)
    assert torch.equal(moments[0][:, :7], tokens[:, :7])
    for moment in (1, 2):
        assert torch.equal(moments[moment][:, :7], moments[moment - 1][:, 7:])  # what was predicted is the reference
    first = generate(model, tokens, given=["tok_rgb"], wanted=NEXT, moment=0, **options)
    assert torch.equal(moments[0], first)
    expected = generate(model, moments[1], given=REFERENCE, wanted=NEXT, moment=1, **options)
    assert torch.equal(moments[1][:, 7:], expected[:, 7:])


def write_pairs(root, pairs):
    with open(root / "pairs.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["pid", "video", "reference_frame", "successor_frame"])
        lines.writerows((f"{sample:06d}", *pair) for sample, pair in enumerate(pairs))


PAIRS = [("a", 1, 3), ("b", 3, 4), ("a", 3, 4), ("a", 4, 9), ("a", 5, 6)]


def test_which_sample_goes_on(tmp_path):
    root = write_data(tmp_path / "data", {"eval": 5})
    pids = [f"{sample:06d}" for sample in range(5)]
    assert following_rows(root, "eval", pids).tolist() == [-1] * 5
    write_pairs(root, PAIRS)
    following = following_rows(root, "eval", pids)
    assert following.tolist() == [2, -1, 3, -1, -1]
    pack([root], tmp_path / "packed")
    assert following_rows(tmp_path / "packed", "eval", pids).tolist() == following.tolist()
    for moments, rows, expected in [(1, 1, range(5)), (2, 2, [0, 2]), (3, 1, [0]), (3, 2, [0, 2]), (9, 1, [0])]:
        assert rows_followed(following, moments, rows).tolist() == list(expected)


def walk():
    """A store of three samples of one walk, each cut by a window 20 pixels further right and 3 further down, and the
    true poses at its four frames in the window of the first."""
    random = np.random.default_rng(0)
    frames = 60 + 130 * random.random((1, 13, 2)) + 10 * np.arange(4)[:, None, None]
    visible = random.random((4, 13)) < 0.8
    visible[:, 0] = True
    rows = np.zeros((3, LAYOUT.length), np.uint16)
    for sample in range(3):
        for name, frame in ((REFERENCE[1], sample), (NEXT[1], sample + 1)):
            window = frames[frame] - sample * np.array([20.0, 3.0])
            pose = quantize_coords(torch.from_numpy(window).float(), torch.from_numpy(visible[frame]))
            rows[sample, LAYOUT.span(name)] = pose.numpy()
    return TokenStore(rows, "", ["0", "1", "2"]), frames, visible


@pytest.mark.parametrize("framing", ["subject", "center"])
def test_truth_is_moved_into_the_first_window(framing):
    store, frames, visible = walk()
    meta = {"options": {"framing": framing}}
    true = TrueMoments.of(store, np.array([0, 2]), np.array([1, 2, -1]), 4, LAYOUT, meta)
    assert true.rows.tolist() == [[0, 1, 2, -1], [2, -1, -1, -1]]
    if framing == "center":
        assert not true.shift.any()  # such windows do not move
        return
    assert true.shift[0, :3] == pytest.approx(np.array([[0, 0], [20, 3], [40, 6]]), abs=0.05)
    for moment in range(3):
        poses = true.poses(store, moment, LAYOUT, meta)
        seen = visible[moment + 1]
        inside = ((frames[moment + 1] >= 0) & (frames[moment + 1] <= 256)).all(-1)
        assert (poses.visible[0] == (seen & inside)).mean() == 1
        assert poses.xy[0][seen] == pytest.approx(frames[moment + 1][seen], abs=0.1)


def test_errors_by_moment():
    """A prediction 5 pixels right of the truth is 5 pixels off at every moment; copying falls behind."""
    store, frames, visible = walk()
    meta = {"options": {"framing": "subject"}}
    rows = np.array([0])
    true = TrueMoments.of(store, rows, np.array([1, 2, -1]), 4, LAYOUT, meta)
    predicted = np.stack(
        [
            quantize_coords(torch.from_numpy(f + np.array([3.0, 4.0])).float(), torch.ones(13, dtype=torch.bool))
            for f in frames[1:]
        ]
        + [np.zeros(39)]
    )[:, None].astype(np.int64)
    errors = horizon_errors(predicted, true, store, rows, LAYOUT, meta)
    assert errors.error_px[:3] == pytest.approx(5, abs=0.1)
    assert errors.copy_px[:3] == pytest.approx(np.hypot(10, 10) * np.array([1, 2, 3]), abs=0.1)
    assert errors.of_sample[0, :3] == pytest.approx(5, abs=0.1)
    assert errors.joints.tolist() == [*(int((visible[0] & visible[m]).sum()) for m in (1, 2, 3)), 0]
    assert np.isnan(errors.error_px[3])
    assert errors.figures()["copy_px"][3] is None
    assert len(errors.lines()) == 2 + 3


@pytest.fixture
def walking_run(tmp_path):
    root = write_data(tmp_path / "tokens", {"train": 2, "eval": 5})
    write_pairs(root, PAIRS)
    return save_run(saved_config(root, tmp_path / "runs"), (1,))


def call(*arguments):
    return exit_status(lambda: m4.generate.main([str(argument) for argument in arguments]))


def test_the_command_writes_every_file(walking_run, tmp_path, capsys):
    outs = [tmp_path / f"roll.{ending}" for ending in ("png", "gif", "npz", "json")]
    arguments = [part for out in outs for part in ("--out", out)]
    assert call("--run", walking_run, "--rollout", 3, "--samples", 1, "--steps", 2, "--seconds", 0.1, *arguments) == 0
    said = capsys.readouterr().out
    assert "next pose, mean distance by moment" in said
    assert said.count("wrote ") == 4
    arrays, figures = np.load(outs[2]), json.loads(outs[3].read_text())
    assert arrays["samples"].tolist() == figures["samples"] == ["000000"]  # the one whose video goes on
    assert arrays["tok_rgb_next"].shape == (1, 3, 16, 16)
    assert arrays["coords_next_xy"].shape == (1, 3, 13, 2)
    assert arrays["true_coords_next_visible"].shape == (1, 3, 13)
    assert (arrays["tok_rgb_next"] < IDS).all()
    assert arrays["error_px"].tolist() == figures["error_px"]
    assert len(figures["copy_px"]) == figures["rollout"] == 3
    frames = list(gif_frames(outs[1].read_bytes()))
    assert len(frames) == 4
    assert frames[0].size == (2 * 262 + 6, 22 + 262 + 6)


def test_without_truth_only_the_prediction_is_shown(walking_run, tmp_path, capsys):
    """Frames alone: no pose to compare with."""
    out = tmp_path / "roll.gif"
    options = ["--given", "tok_rgb", "--wanted", "tok_rgb_next", "--rollout", 2, "--pids", "000004", "--steps", 1]
    assert call("--run", walking_run, "--out", out, *options) == 0
    assert "error" not in capsys.readouterr().out
    assert {frame.size for frame in gif_frames(out.read_bytes())} == {(262 + 6, 22 + 262 + 6)}
    with Image.open(out) as animation:  # equal moments are one picture that stays for longer
        lasting = [animation.seek(number) or animation.info["duration"] for number in range(animation.n_frames)]
    assert sum(lasting) == 500 + 500 + 3 * 500


@pytest.mark.parametrize(
    ("rollout", "pids", "said"), [(60, 6, "at most 5 samples of 60 moments"), (1, 31, "at most 30")]
)
def test_more_than_fits_a_picture(walking_run, tmp_path, capsys, rollout, pids, said):
    names = ["000000"] * pids
    assert call("--run", walking_run, "--out", tmp_path / "a.png", "--rollout", rollout, "--pids", *names) == 2
    assert said in capsys.readouterr().err


def test_lengths_are_those_of_the_table():
    assert LAYOUT.length == sum(LENGTHS.values())
