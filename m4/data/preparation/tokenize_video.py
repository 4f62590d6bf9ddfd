"""One video to tokens: its pairs, framed, tokenised and captioned."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from m4.data.framing import Framing, frame_for
from m4.data.penn_action import Label, Video
from m4.data.preparation.captions import BlipCaptioner, label_caption
from m4.data.preparation.options import PrepareOptions
from m4.data.preparation.pairs import find_pairs
from m4.data.tokenizers import ImageTokenizer, make_tokenizer
from m4.modalities import BINS, CANVAS, NUM_JOINTS, TABLE, TOKEN_SHAPES
from m4kernels import quantize_coords

_BATCH = 16  # pairs tokenised together


@lru_cache(maxsize=1)
def shared_tokenizer(options: PrepareOptions) -> ImageTokenizer:
    """The process's tokenizer: weights are loaded once."""
    return make_tokenizer(options.tokenizer, options.cosmos_dir, options.cosmos_dtype)


@lru_cache(maxsize=1)
def shared_captioner(options: PrepareOptions) -> BlipCaptioner:
    """The process's BLIP."""
    return BlipCaptioner(options.blip_dir)


def tokenize_video(video: Video, options: PrepareOptions) -> dict[str, np.ndarray]:
    """All P pairs of a video: ``pairs`` int32 (P, 2), frame numbers from 1; tokens (P, *TOKEN_SHAPES); ``captions``.

    Both frames of a pair are cut by the framing of the reference. Raises DataError for a frame that cannot be used.
    """
    label = video.label
    tokenizer = shared_tokenizer(options)
    columns: dict[str, list] = {name: [] for name in (*TOKEN_SHAPES, "pairs", "captions")}
    windows: list[np.ndarray] = []
    references: list[Image.Image] = []  # whole frames, for BLIP

    def encode_windows() -> None:
        if not windows:
            return
        grids = tokenizer.encode(np.stack(windows)).astype(np.int32)
        columns["tok_rgb"] += list(grids[0::2])
        columns["tok_rgb_next"] += list(grids[1::2])
        if options.captions == "blip":
            columns["captions"] += shared_captioner(options)(references)
        windows.clear()
        references.clear()

    for reference, successor, image, image_next in _walk(video, options.ssim_threshold):
        size = (image.size[1], image.size[0])
        joints = label.x[reference], label.y[reference], label.visible[reference]
        framing = frame_for(size, *joints, options.framing)
        windows += [np.asarray(framing.apply_image(frame)) for frame in (image, image_next)]
        columns["coords"].append(joint_tokens(label, reference, framing))
        columns["coords_next"].append(joint_tokens(label, successor, framing))
        columns["pairs"].append((reference + 1, successor + 1))
        if options.captions == "label":
            columns["captions"].append(label_caption(label))
        elif options.captions == "blip":
            references.append(image)
        if len(windows) == 2 * _BATCH:
            encode_windows()
    encode_windows()
    arrays: dict[str, np.ndarray] = {}
    for name, shape in TOKEN_SHAPES.items():
        dtype = np.uint16 if TABLE[name].kind == "joints" else np.int32
        arrays[name] = np.array(columns[name], dtype=dtype).reshape(-1, *shape)
    arrays["pairs"] = np.array(columns["pairs"], dtype=np.int32).reshape(-1, 2)
    if options.captions != "none":
        arrays["captions"] = np.array(columns["captions"], dtype=str)
    return arrays


def joint_tokens(label: Label, frame: int, framing: Framing) -> np.ndarray:
    """Tokens of one frame's joints through ``framing``: uint16 (3, 13), rows x, y, visibility."""
    tokens = quantize_coords(
        torch.from_numpy(label.continuous(frame)).float(),
        torch.from_numpy(label.visible[frame]),
        torch.from_numpy(framing.scale),
        torch.from_numpy(framing.offset),
        canvas=float(CANVAS),
        bins=BINS,
    )
    return tokens.numpy().reshape(3, NUM_JOINTS).astype(np.uint16)


def _walk(video: Video, threshold: float) -> Iterator[tuple[int, int, Image.Image, Image.Image]]:
    """The pairs with their images, of which only the reference and the newest are kept."""
    images: dict[str, Image.Image] = {}

    def gray() -> Iterator[np.ndarray]:
        for number in range(len(video.frames)):
            images["newest"] = video.image(number)
            images.setdefault("reference", images["newest"])
            yield np.asarray(images["newest"].convert("L"))

    for reference, successor in find_pairs(gray(), threshold):
        yield reference, successor, images["reference"], images["newest"]
        images["reference"] = images["newest"]
