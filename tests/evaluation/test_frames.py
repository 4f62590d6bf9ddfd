"""Frame figures: hand-made frames through a stand-in tokenizer, SSIM and PSNR by scikit-image."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from m4.evaluation.frames import MOST_PSNR, person_boxes, pixel_figures, token_accuracy
from m4.poses import Poses


def decode(tokens):
    """Every code a flat 16x16 block of its grey level."""
    blocks = np.repeat(np.repeat(tokens, 16, axis=1), 16, axis=2)
    return np.repeat(blocks[..., None], 3, axis=3).astype(np.uint8)


@pytest.fixture
def frames():
    random = np.random.default_rng(0)
    true = random.integers(0, 256, (19, 256))
    predicted = true.copy()
    predicted[:, ::4] = random.integers(0, 256, (19, 64))
    predicted[3] = true[3]
    return predicted, true


def test_figures(frames):
    predicted, true = frames
    figures, copied = pixel_figures([predicted, true], true, decode)
    assert copied == {"psnr": MOST_PSNR, "ssim": 1}
    a, b = (decode(tokens.reshape(-1, 16, 16)) for tokens in frames)
    others = [i for i in range(19) if i != 3]
    psnr = [peak_signal_noise_ratio(b[i], a[i], data_range=255) for i in others]
    ssim = [structural_similarity(a[i], b[i], data_range=255, channel_axis=2) for i in range(19)]
    assert figures == {
        "psnr": pytest.approx((sum(psnr) + MOST_PSNR) / 19),
        "ssim": pytest.approx(np.mean(ssim)),
    }


def test_token_accuracy(frames):
    predicted, true = frames
    assert token_accuracy(predicted, true) == sum(np.count_nonzero(p == t) for p, t in zip(*frames, strict=True)) / (
        19 * 256
    )
    assert token_accuracy(predicted[:0], true[:0]) is None


def test_inside_the_box(frames):
    """A box of one block that differs by 5 everywhere, and a person that nobody sees."""
    true = np.full((2, 256), 100)
    predicted = true + 5
    predicted[:, 1:] += 95  # whatever is outside
    boxes = [(slice(0, 16), slice(0, 16)), None]
    (figures,) = pixel_figures([predicted], true, decode, boxes)
    assert figures["psnr_person"] == pytest.approx(10 * np.log10(255**2 / 25))
    assert figures["psnr"] < figures["psnr_person"]
    assert pixel_figures([predicted], true, decode, [None, None])[0]["psnr_person"] is None


def test_person_boxes():
    """Padded by a tenth of its own size to each side, in whole pixels, inside the canvas."""
    xy = np.array([[[100.0, 50.0], [200.0, 90.0], [0.0, 0.0]], [[0.0, 250.0], [10.0, 256.0], [3, 3]], [[0, 0]] * 3])
    visible = np.array([[True, True, False]] * 2 + [[False] * 3])
    assert person_boxes(Poses(xy, visible)) == [
        (slice(46, 94), slice(90, 210)),
        (slice(249, 256), slice(0, 11)),
        None,
    ]
    (point,) = person_boxes(Poses(np.array([[[256.0, 256.0]]]), np.array([[True]])))
    assert point == (slice(255, 256), slice(255, 256))


def test_the_same_for_any_number_of_threads(frames):
    """Means are of frame after frame, whichever thread was done first."""
    before = torch.get_num_threads()
    predicted, true = frames
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(pixel_figures([predicted], true, decode))
        finally:
            torch.set_num_threads(before)
    assert found[0] == found[1]
