"""Looking at a data set: a contact sheet of decoded frames with skeletons, and how well they match the real frames."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from m4.data.checks import check_whole
from m4.data.framing import frame_for
from m4.data.inspection.dataset_statistics import Split, read_all, read_pairs
from m4.data.layout import read_meta
from m4.data.penn_action import open_video
from m4.data.preparation.tokenize_video import joint_tokens
from m4.data.tokenizers import ImageTokenizer, tokenizer_of
from m4.errors import data_error
from m4.modalities import BINS, CANVAS, NEXT, REFERENCE, TOKEN_SHAPES
from m4.pictures.sheets import contact_sheet
from m4.pictures.skeleton import draw_skeleton
from m4kernels import dequantize_coords

_STRIP, _PAPER, _INK = 18, (250, 250, 248), (70, 70, 76)


def draw_sheet(
    root: str | os.PathLike, samples: int = 12, cosmos_dir: str | None = None, tokenizer: str | None = None
) -> Image.Image:
    """Decoded reference beside successor of ``samples`` samples, evenly spaced over all splits, with their skeletons.

    Raises DataError for a root without pictures or joints, or a sample that cannot be read or decoded.
    """
    root = Path(root)
    return sheet_of(root, read_all(root), samples, tokenizer_of(read_meta(root), tokenizer, cosmos_dir))


def sheet_of(root: Path, splits: list[Split], samples: int, tokenizer: ImageTokenizer) -> Image.Image:
    """`draw_sheet` of splits that have been read."""
    chosen = _choose(splits, samples)
    for split in splits:
        lacking = [modality for modality in TOKEN_SHAPES if modality not in split.tokens]
        if lacking:
            raise data_error(
                root / split.name,
                expected=f"the modalities {', '.join(TOKEN_SHAPES)} for a contact sheet",
                actual=f"no {', '.join(lacking)}",
                remedy="Use --no-sheet for the statistics alone.",
            )
    pairs = read_pairs(root)
    rows = []
    for split, row in chosen:
        pid = split.pids[row]
        video, *frames = pairs.get(pid, ("", 0, 0))
        titles = [
            f"{split.name}/{pid}" + (f"  {video}:{frames[0]}" if video else ""),
            f"{video}:{frames[1]}" if video else "",
        ]
        pictures = []
        for (pixels, joints), title in zip((REFERENCE, NEXT), titles, strict=True):
            image = tokenizer.decode(split.tokens[pixels][row].reshape(1, *TOKEN_SHAPES[pixels]))[0]
            xy, visible = dequantize_coords(
                torch.from_numpy(split.tokens[joints][row]), canvas=float(CANVAS), bins=BINS
            )
            seen = f"  {int(visible.sum())} of {len(visible)} joints"
            pictures.append(_labelled(draw_skeleton(image, xy.numpy(), visible.numpy()), title + seen))
        rows.append(pictures)
    return contact_sheet(rows, ("reference", "successor"), columns=3 if len(rows) >= 3 else 1)


def compare_with_frames(
    root: Path, splits: list[Split], source: Path, samples: int, tokenizer: ImageTokenizer
) -> list[str]:
    """PSNR of decoded against real windows, and whether the joints are those of the labels, for evenly spaced samples.

    source: the videos (Penn Action layout) that the data was prepared from. Raises DataError where pairs.csv or
    meta.json are missing, or a frame cannot be read.
    """
    pairs, meta = read_pairs(root), read_meta(root)
    if not pairs or not meta:
        raise data_error(
            root,
            expected="pairs.csv and meta.json, which say what each sample was made of",
            actual="none",
            remedy="Leave out --penn-action.",
        )
    quality, shifted = [], 0
    for split, row in _choose(splits, samples):
        video_name, *numbers = pairs[split.pids[row]]
        video = open_video(source, video_name)
        label, reference = video.label, numbers[0] - 1
        image = video.image(reference)
        joints = label.x[reference], label.y[reference], label.visible[reference]
        framing = frame_for((image.size[1], image.size[0]), *joints, meta["options"]["framing"])
        same = True
        for number, (pixels, name) in zip(numbers, (REFERENCE, NEXT), strict=True):
            window = np.asarray(framing.apply_image(video.image(number - 1)), np.float64)
            decoded = tokenizer.decode(split.tokens[pixels][row].reshape(1, *TOKEN_SHAPES[pixels]))[0]
            quality.append(10 * np.log10(255**2 / max(float(((window - decoded) ** 2).mean()), 1e-9)))
            expected = joint_tokens(label, number - 1, framing).ravel()
            same &= bool((split.tokens[name][row] == expected).all())
        shifted += not same
    lines = [f"round trip of {len(quality)} frames: PSNR {np.mean(quality):.1f} dB, worst {np.min(quality):.1f} dB"]
    if shifted:
        lines.append(f"WARNING: the joints of {shifted} of {len(quality) // 2} samples are not those of the labels")
    else:
        lines.append(f"joints of {len(quality) // 2} samples: those of the labels, in the window of the frames")
    return lines


def _choose(splits: list[Split], samples: int) -> list[tuple[Split, int]]:
    """Evenly spaced (split, row); all of them if ``samples`` is more. Raises DataError for less than one."""
    check_whole("samples", samples, 1)
    every = [(split, row) for split in splits for row in range(len(split.pids))]
    places = np.linspace(0, len(every) - 1, min(samples, len(every)))
    return [every[index] for index in np.unique(places.astype(int))]


def _labelled(picture: Image.Image, text: str) -> Image.Image:
    """The picture with a line of text below it."""
    result = Image.new("RGB", (picture.size[0], picture.size[1] + _STRIP), _PAPER)
    result.paste(picture, (0, 0))
    ImageDraw.Draw(result).text((2, picture.size[1] + 2), text, fill=_INK, font=ImageFont.load_default(12))
    return result
