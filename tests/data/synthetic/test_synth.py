"""Synthetic videos: the layout, determinism, people that move, figures where the labels say."""

import dataclasses

import numpy as np
import pytest

from m4.data.penn_action import list_videos, open_video, read_label
from m4.data.preparation.pairs import find_pairs
from m4.data.synthetic.clips import SynthOptions, animated_clip, reenacted_clip
from m4.data.synthetic.motions import MOTIONS, NUM_POINTS, animate
from m4.data.synthetic.synth import synthesize
from m4.errors import DataError

TINY = SynthOptions(videos=2, seed=3, frames=(3, 4), size=(96, 128), scenes=2)


def test_layout_is_read_by_the_real_reader(videos):
    names = list_videos(videos)
    assert names == [f"{number:04d}" for number in range(1, 6)]
    for name in names:
        video = open_video(videos, name)
        assert video.frames[0].name == "000001.jpg"
        assert video.image(0).size == (161, 120)
        assert video.label.action in MOTIONS
        assert 0.2 < video.label.visible.mean() <= 1
        inside = (video.label.x <= 161.5) & (video.label.x >= 0.5) & (video.label.y <= 120.5) & (video.label.y >= 0.5)
        assert inside[video.label.visible].all()


def test_the_same_seed_gives_the_same_bytes(tmp_path, tree):
    synthesize(tmp_path / "a", TINY, progress=False)
    synthesize(tmp_path / "b", TINY, workers=2, progress=False)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    synthesize(tmp_path / "c", dataclasses.replace(TINY, seed=4), progress=False)
    frame = "frames/0001/000001.jpg"
    assert tree(tmp_path / "a")[frame] != tree(tmp_path / "c")[frame]


def test_an_unfinished_video_is_drawn_again_and_a_finished_one_kept(tmp_path, tree):
    synthesize(tmp_path, TINY, progress=False)
    before = tree(tmp_path)
    (tmp_path / "labels/0002.mat").unlink()
    (tmp_path / "frames/0002/000001.jpg").write_bytes(b"half")
    kept = (tmp_path / "frames/0001/000001.jpg").stat().st_mtime_ns
    synthesize(tmp_path, TINY, progress=False)
    assert tree(tmp_path) == before
    assert (tmp_path / "frames/0001/000001.jpg").stat().st_mtime_ns == kept


def test_other_options_or_strange_content_are_refused(tmp_path):
    synthesize(tmp_path / "a", TINY, progress=False)
    with pytest.raises(DataError, match=r"synth\.json: expected the options of this run"):
        synthesize(tmp_path / "a", dataclasses.replace(TINY, seed=9), progress=False)
    (tmp_path / "b/labels").mkdir(parents=True)
    with pytest.raises(DataError, match="expected an empty folder"):
        synthesize(tmp_path / "b", TINY, progress=False)


@pytest.mark.parametrize(
    "change",
    [dict(videos=0), dict(scenes=0), dict(people=0), dict(frames=(5, 4)), dict(frames=(1, 1)), dict(size=(10, 10))],
)
def test_options_out_of_range(tmp_path, change):
    with pytest.raises(DataError, match="expected"):
        synthesize(tmp_path / "a", dataclasses.replace(TINY, **change), progress=False)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("action", MOTIONS)
def test_bodies_keep_their_bones_and_move(action):
    times = np.arange(60) / 20
    points = animate(MOTIONS[action], times, 30.0, np.random.default_rng(0))
    assert points.shape == (60, NUM_POINTS, 3)
    assert np.isfinite(points).all()
    for a, b, length in ((1, 3, 0.165), (4, 6, 0.145), (7, 9, 0.235), (10, 12, 0.235)):
        np.testing.assert_allclose(np.linalg.norm(points[:, a] - points[:, b], axis=-1), length, atol=1e-9)
    speed = np.linalg.norm(np.diff(points[:, :13], axis=0), axis=-1)
    assert 0.003 < speed.max() < 0.35  # body heights a frame: it moves, and does not jump
    if MOTIONS[action].anchor == "ground":
        assert points[..., 1].min() > 0


def test_most_videos_have_a_pair():
    options = SynthOptions(videos=20, seed=11, frames=(24, 24))
    without = 0
    for index in range(20):
        clip = animated_clip(options, index)
        frames = (np.asarray(clip.render(frame).convert("L")) for frame in range(len(clip.label)))
        without += next(find_pairs(frames), None) is None
    assert without <= 1


def test_reenacts_real_labels(tmp_path, shared_dir):
    labels = shared_dir / "penn_action/labels"
    options = SynthOptions(videos=3, seed=1, frames=(2, 6))
    names = synthesize(tmp_path, options, poses=labels, progress=False)
    for name in names:
        made, real = open_video(tmp_path, name), read_label(labels / f"{name}.mat")
        count = len(made.label)
        assert count == min(6, len(real))
        assert made.image(0).size == (real.width, real.height)
        np.testing.assert_array_equal(made.label.x, real.x[:count])
        np.testing.assert_array_equal(made.label.visible, real.visible[:count])
        assert made.label.action == real.action


def test_the_figure_is_drawn_through_the_labelled_joints(shared_dir):
    """Where a joint is visible, the picture differs from the same scene without a figure."""
    options = SynthOptions(videos=9, seed=2, noise=0.0, steady=True)
    clips = [animated_clip(options, index) for index in range(6)]
    paths = sorted((shared_dir / "penn_action/labels").glob("*.mat"))[::300]
    clips += [reenacted_clip(options, index, path) for index, path in enumerate(paths)]
    drawn = []
    for clip in clips:
        track = dataclasses.replace(clip.track, known=np.zeros_like(clip.track.known))
        empty = np.asarray(dataclasses.replace(clip, track=track).render(0), int)
        changed = np.abs(np.asarray(clip.render(0), int) - empty).max(-1) > 3
        joints = np.floor(clip.label.continuous(0)[clip.label.visible[0]]).astype(int)
        inside = ((joints >= 0) & (joints < (clip.label.width, clip.label.height))).all(-1)
        drawn += list(changed[joints[inside, 1], joints[inside, 0]])
    assert len(drawn) > 80
    assert np.mean(drawn) > 0.95


def test_too_few_labels(tmp_path):
    (tmp_path / "poses").mkdir()
    with pytest.raises(DataError, match="at least 2 label files, found 0"):
        synthesize(tmp_path / "out", TINY, poses=tmp_path / "poses", progress=False)
