"""The pair rule decides as scikit-image does."""

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from m4.data.preparation import ssim
from m4.data.preparation.pairs import find_pairs
from m4.data.preparation.ssim import GrayFrame, at_most, similarity
from m4.errors import DataError


def by_scikit_image(frames, threshold):
    pairs, reference = [], 0
    for number in range(1, len(frames)):
        if structural_similarity(frames[reference], frames[number], data_range=255) <= threshold:
            pairs.append((reference, number))
            reference = number
    return pairs


def gray_frames(shared_dir, step):
    paths = sorted((shared_dir / "real_frames/swing").glob("*.jpg"))[::step]
    return [np.asarray(Image.open(path).convert("L")) for path in paths]


def test_same_pairs_on_all_real_frames(shared_dir):
    frames = gray_frames(shared_dir, 1)
    assert len(frames) == 150
    pairs = list(find_pairs(frames))
    assert pairs == by_scikit_image(frames, 0.89)
    assert len(pairs) > 10


def hard_frames():
    """Pairs of frames whose sums are extreme, or whose variances vanish."""
    rng = np.random.default_rng(0)
    chess = (np.indices((61, 83)).sum(0) % 2 * 255).astype(np.uint8)
    noise = rng.integers(0, 256, (61, 83), dtype=np.uint8)
    flat = np.full((61, 83), 254, np.uint8)
    smooth = np.tile(np.linspace(0, 255, 83).astype(np.uint8), (61, 1))
    yield chess, 255 - chess
    yield np.full_like(chess, 255), np.zeros_like(chess)
    yield np.full_like(chess, 255), np.full_like(chess, 255)
    yield flat, flat + rng.integers(0, 2, flat.shape, dtype=np.uint8)
    yield smooth, np.roll(smooth, 1, 1)
    yield noise, np.clip(noise + rng.normal(0, 20, noise.shape), 0, 255).astype(np.uint8)
    yield noise[:7, :7], smooth[:7, :7]
    yield noise[:7], smooth[:7]
    yield noise[:, :8], smooth[:, :8]
    wide = rng.integers(200, 256, (9, 70_001), dtype=np.uint8)  # a strip of one row
    yield wide, wide // 2
    tall = rng.integers(0, 256, (900, 97), dtype=np.uint8)  # two strips
    yield tall, tall ^ 3


@pytest.mark.parametrize("number", range(11))
def test_error_bound_and_decisions(number):
    a, b = list(hard_frames())[number]
    truth = structural_similarity(a, b, data_range=255)
    one, other = GrayFrame(a), GrayFrame(b)
    assert abs(similarity(one, other) - truth) <= 1e-6
    for step in (0, 1, -1):
        threshold = truth if step == 0 else np.nextafter(truth, step * np.inf)
        assert at_most(one, other, threshold) == (truth <= threshold)
        assert at_most(one, other, truth + step * 3e-6) == (step >= 0)


def test_scikit_image_is_asked_near_the_threshold_only(monkeypatch):
    asked = []

    def count(a, b, data_range):
        asked.append(data_range)
        return structural_similarity(a, b, data_range=data_range)

    monkeypatch.setattr(ssim, "structural_similarity", count)
    rng = np.random.default_rng(1)
    a = rng.integers(0, 256, (40, 60), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 30, a.shape), 0, 255).astype(np.uint8)
    one, other = GrayFrame(a), GrayFrame(b)
    truth = structural_similarity(a, b, data_range=255)
    for threshold in (truth - 1e-4, truth + 1e-4, 0.1, 1.0):
        at_most(one, other, threshold)
    assert not asked
    at_most(one, other, truth + 1e-7)
    assert asked == [255]


def test_same_decision_at_the_very_threshold(shared_dir):
    """A threshold equal to the SSIM of a frame, and the numbers next to it, fall on the right side."""
    frames = gray_frames(shared_dir, 40)[:2]
    similarity = structural_similarity(*frames, data_range=255)
    assert list(find_pairs(frames, similarity)) == [(0, 1)]
    assert list(find_pairs(frames, np.nextafter(similarity, 1))) == [(0, 1)]
    assert list(find_pairs(frames, np.nextafter(similarity, 0))) == []


def test_the_successor_is_the_next_reference():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (40, 50), dtype=np.uint8) for _ in range(2))
    assert list(find_pairs([a, a, b, b, a])) == [(0, 2), (2, 4)]
    assert list(find_pairs([a])) == list(find_pairs([])) == list(find_pairs([a] * 5)) == []


def test_errors():
    frame = np.zeros((20, 20), np.uint8)
    with pytest.raises(DataError, match="size of the frames before, 20x20, found 21x20"):
        list(find_pairs([frame, np.zeros((20, 21), np.uint8)]))
    with pytest.raises(DataError, match="at least 7x7"):
        list(find_pairs([frame[:6]]))
    for strange in (frame.astype(float), np.zeros((20, 20, 3), np.uint8)):
        with pytest.raises(DataError, match=r"frame 1: expected a grayscale frame, uint8 \(H, W\)"):
            list(find_pairs([strange]))
    with pytest.raises(DataError, match="ssim_threshold"):
        list(find_pairs([frame], 1.5))
    with pytest.raises(DataError, match="ssim_threshold"):
        list(find_pairs([frame], float("nan")))
