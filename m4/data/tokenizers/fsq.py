"""The embedded tokenizer: a block transform and finite scalar quantisation, without any weights.

Every 16x16 block becomes one of 64,000 codes, six levels as Cosmos has them: chroma Cb and Cr (8 each), mean luma
(8 coarse x 5 fine = 40), and the luma's slope across and down (5 each). Slopes and chroma have a level of exactly zero
and wider steps outward, so that plain areas give few and stable codes and noise does not change them.

Decoding is a fixed function of the whole grid: a pixel blends the planes of the four nearest blocks, which removes most
of the block edges. 26 dB PSNR on outdoor video at 320 lines.

Source of the quantiser: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple" (2023).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from m4.data.tokenizers.base import GRID, IMAGE_SIZE, VOCAB_SIZE, check_images, check_tokens
from m4.errors import data_error

LEVELS = (8, 8, 8, 5, 5, 5)  # of Cb, Cr, coarse and fine luma, slope across, slope down

_BLOCK = IMAGE_SIZE // GRID
# ITU-R BT.601, full range (JPEG).
_RGB_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_YCC_TO_RGB = np.linalg.inv(_RGB_TO_YCC)
_LUMA_LEVELS = LEVELS[2] * LEVELS[3]
# Reach of the companded scales in grey levels, and the sharpness of the blend: best of a grid search over outdoor video
# and synthetic scenes; PSNR varies by less than 0.1 dB around them.
_SLOPE_REACH, _CHROMA_REACH, _GROWTH = 60.0, 45.0, 3.0
_BLEND_POWER, _SLOPE_GAIN = 4, 0.9


class Numbering(NamedTuple):
    """How the six levels of a code become its id."""

    first: int  # the id of levels 0
    steps: tuple[int, ...]  # what a step of each level adds

    def ids(self, levels: tuple[np.ndarray, ...]) -> np.ndarray:
        """int64, of the shape of each level."""
        return self.first + np.tensordot(self.steps, np.stack(levels), 1)

    def levels(self, ids: np.ndarray) -> list[np.ndarray]:
        """The inverse."""
        digits = [ids // abs(step) % count for step, count in zip(self.steps, LEVELS, strict=True)]
        return [
            digit if step > 0 else count - 1 - digit
            for digit, step, count in zip(digits, self.steps, LEVELS, strict=True)
        ]

    def digits(self) -> tuple[int, ...]:
        """The counts of levels in the order of the id's digits, fastest first."""
        return tuple(count for _, count in sorted(zip(map(abs, self.steps), LEVELS, strict=True)))


# A model has one row for an id, whatever modality it is of: an image code below 8,192 shares it with a coordinate bin.
# By the first numbering these were codes of blocks much darker at the bottom, 3 to 4 % of all in our scenes, and where
# ankles are was hard to learn. By the second they are the bluest there are, and hardly any block is.
NUMBERINGS = {
    "fsq-block16-v1": Numbering(0, (1, 8, 64, 512, 2560, 12800)),
    "fsq-block16-v2": Numbering(56_000, (-8000, 1000, 125, 25, 5, 1)),
}
NEWEST = "fsq-block16-v2"


def numbering_of(tokenizer_id: str) -> Numbering:
    """Raises DataError for an id that is none of ours."""
    if tokenizer_id not in NUMBERINGS:
        raise data_error(
            "meta.json, tokenizer id",
            expected=" or ".join(NUMBERINGS),
            actual=repr(tokenizer_id),
            remedy="Use the version of m4 that prepared the data, or prepare it again.",
        )
    return NUMBERINGS[tokenizer_id]


class FSQTokenizer:
    """Training-free 16x16-block tokenizer with 64,000 codes (see the module's text).

    tokenizer_id: which numbering of the codes; data that was prepared with an earlier one keeps it. Raises DataError
    for one that is not known.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, tokenizer_id: str = NEWEST) -> None:
        self.id, self._numbering = tokenizer_id, numbering_of(tokenizer_id)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, 256, 256, 3) RGB → int64 (B, 16, 16)."""
        images = check_images(images)
        # Sums of integers below 2^24, exact in float32 in whatever order, so that every machine gets the same codes.
        rows = images.reshape(-1, IMAGE_SIZE * 3).astype(np.float32) @ _COLUMN_SUMS
        rows = rows.reshape(-1, GRID, _BLOCK, 2, GRID, 3)  # (B, 16, row, plain or weighted sum, 16, 3)
        plain, sloped = np.moveaxis(rows.sum(2), 2, 0).astype(np.float64)
        mean = plain @ _RGB_TO_YCC.T / _BLOCK**2  # (B, 16, 16, 3)
        # Least-squares slopes: the change of luma from the block's middle to its edge.
        norm = _BLOCK * float((_WEIGHTS**2).sum()) / (_BLOCK - 1)
        across = sloped @ _RGB_TO_YCC[0] / norm
        down = np.einsum("bikjc,k->bijc", rows[:, :, :, 0], _WEIGHTS).astype(np.float64) @ _RGB_TO_YCC[0] / norm
        luma = np.clip(np.floor(mean[..., 0] * _LUMA_LEVELS / 256), 0, _LUMA_LEVELS - 1).astype(np.int64)
        levels = (
            _quantize(mean[..., 1], _CHROMA_REACH, -3, 4),
            _quantize(mean[..., 2], _CHROMA_REACH, -3, 4),
            luma // LEVELS[3],
            luma % LEVELS[3],
            _quantize(across, _SLOPE_REACH, -2, 2),
            _quantize(down, _SLOPE_REACH, -2, 2),
        )
        return self._numbering.ids(levels)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Integer (B, 16, 16) → uint8 (B, 256, 256, 3) RGB."""
        tokens = check_tokens(tokens, self.vocab_size)
        luma, cb, cr, across, down = _components(self._numbering.levels(tokens))
        blend, ramp, linear = _BLEND, _RAMP, _LINEAR
        planes = blend @ luma @ blend.T + blend @ across @ ramp.T + ramp @ down @ blend.T
        chroma = [linear @ plane @ linear.T for plane in (cb, cr)]
        rgb = np.stack([planes, *chroma], axis=-1) @ _YCC_TO_RGB.T
        return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def mirrored_codes(tokenizer_id: str = NEWEST) -> np.ndarray:
    """int64 (64000,): the code of each code's block mirrored left to right, which turns its slope across around."""
    numbering = numbering_of(tokenizer_id)
    *others, across, down = numbering.levels(np.arange(VOCAB_SIZE))
    return numbering.ids((*others, LEVELS[4] - 1 - across, down))


def code_values(tokenizer_id: str = NEWEST) -> np.ndarray:
    """float32 (64000, 5): the mean red, green and blue of each code's block and its slopes across and down, in grey
    levels and so scaled that the squared distance of two codes tells that of the decoded pictures: the squared error
    summed over red, green and blue, as a mean over the pixels where all blocks change alike in colour, and in
    proportion where one block alone changes. (Clipping is left aside.)"""
    luma, cb, cr, across, down = _components(numbering_of(tokenizer_id).levels(np.arange(VOCAB_SIZE)))
    colour = np.stack([luma, cb, cr], axis=-1) @ _YCC_TO_RGB.T
    # Of a block between plain ones: what a slope of one grey level adds to the error, beside a mean of one grey level.
    middle = GRID // 2
    ramp = np.linalg.norm(_RAMP[:, middle]) / np.linalg.norm(_BLEND[:, middle])
    slopes = np.stack([across, down], axis=-1) * (ramp * np.sqrt(3))  # it changes red, green and blue alike
    return np.concatenate([colour, slopes], axis=-1).astype(np.float32)


def _components(levels: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Mean luma, mean Cb and Cr, slopes of luma across and down that levels stand for, in grey levels."""
    luma = (levels[2] * LEVELS[3] + levels[3] + 0.5) * (256 / _LUMA_LEVELS)
    cb, cr = (_dequantize(level - 3, _CHROMA_REACH, 3) for level in levels[:2])
    across, down = (_dequantize(level - 2, _SLOPE_REACH, 2) for level in levels[4:])
    return luma, cb, cr, across, down


def _quantize(value: np.ndarray, reach: float, lowest: int, highest: int) -> np.ndarray:
    """Level number from 0, on a scale whose steps grow exponentially from zero; ``reach`` is the level -lowest."""
    scaled = np.log1p(_GROWTH * np.abs(value) / reach) / np.log1p(_GROWTH) * -lowest
    return (np.clip(np.rint(np.sign(value) * scaled), lowest, highest) - lowest).astype(np.int64)


def _dequantize(level: np.ndarray, reach: float, count: int) -> np.ndarray:
    """The inverse, for signed levels of which ``count`` reaches ``reach``."""
    return np.sign(level) * np.expm1(np.abs(level) / count * np.log1p(_GROWTH)) * reach / _GROWTH


def _blending(power: int) -> tuple[np.ndarray, np.ndarray]:
    """(256, 16) weight of every block at every pixel of an axis, and the same times the pixel's place on its slope."""
    pixel = np.arange(IMAGE_SIZE)
    place = (pixel + 0.5) / _BLOCK - 0.5
    first = np.floor(place).astype(int)
    weights, ramps = np.zeros((IMAGE_SIZE, GRID)), np.zeros((IMAGE_SIZE, GRID))
    for step in (0, 1):
        share = np.abs(1 - step - (place - first)) ** power
        other = np.abs(step - (place - first)) ** power
        share = share / (share + other)
        block = np.clip(first + step, 0, GRID - 1)
        # Beyond the outermost blocks the grid is continued, each copy around its own middle.
        on_slope = (pixel - ((first + step) * _BLOCK + (_BLOCK - 1) / 2)) / ((_BLOCK - 1) / 2)
        np.add.at(weights, (pixel, block), share)
        np.add.at(ramps, (pixel, block), share * np.clip(on_slope, -1.1, 1.1) * _SLOPE_GAIN)
    return weights, ramps


def _column_sums() -> np.ndarray:
    """(768, 96): a row of pixels to the sums of its 16 blocks by channel, plain and weighted."""
    sums = np.zeros((GRID, _BLOCK, 3, 2, GRID, 3), np.float32)
    for block in range(GRID):
        for channel in range(3):
            sums[block, :, channel, 0, block, channel] = 1
            sums[block, :, channel, 1, block, channel] = _WEIGHTS
    return sums.reshape(IMAGE_SIZE * 3, 2 * GRID * 3)


_WEIGHTS = (2 * np.arange(_BLOCK) - (_BLOCK - 1)).astype(np.float32)
_COLUMN_SUMS = _column_sums()
_BLEND, _RAMP = _blending(_BLEND_POWER)
_LINEAR, _ = _blending(1)
