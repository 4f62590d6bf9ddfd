"""The pair rule decides as scikit-image does."""

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from m4.data.errors import DataError
from m4.data.pairs import find_pairs


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


def test_same_pairs_on_real_frames(shared_dir):
    frames = gray_frames(shared_dir, 3)
    for threshold in (0.89, 0.85):
        pairs = list(find_pairs(frames, threshold))
        assert pairs == by_scikit_image(frames, threshold)
        assert len(pairs) > 3


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
    with pytest.raises(DataError, match="ssim_threshold"):
        list(find_pairs([frame], 1.5))
    with pytest.raises(DataError, match="ssim_threshold"):
        list(find_pairs([frame], float("nan")))
