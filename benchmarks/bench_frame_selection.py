"""Frame selection: decoding, grayscale and SSIM of a video's frames, against the plain loop that it must agree with."""

import io
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image
from skimage.metrics import structural_similarity

from benchmarks.measure import Run, Work
from benchmarks.suite import Case, Suite, test_guard, test_time  # noqa: F401
from m4.data.penn_action import read_frame
from m4.data.preparation.pairs import SSIM_THRESHOLD, find_pairs
from m4.data.synthetic.clips import SynthOptions, animated_clip


class Frames(NamedTuple):
    paths: list[Path]
    size: tuple[int, int]  # height, width
    folder: TemporaryDirectory  # lives as long as the inputs


def frames(size: tuple[int, int]) -> Frames:
    """24 JPEG frames of an animated clip."""
    clip = animated_clip(SynthOptions(videos=1, seed=1, frames=(24, 24), size=size), 0)
    folder = TemporaryDirectory()
    paths = [Path(folder.name) / f"{number:06d}.jpg" for number in range(24)]
    for number, path in enumerate(paths):
        content = io.BytesIO()
        clip.render(number).save(content, "jpeg", quality=90)
        path.write_bytes(content.getvalue())
    return Frames(paths, size, folder)


def ours(inputs: Frames) -> Run:
    return lambda: list(find_pairs(np.asarray(read_frame(path).convert("L")) for path in inputs.paths))


def plain(inputs: Frames) -> Run:
    def pairs() -> Iterator[tuple[int, int]]:
        reference, gray = 0, None
        for number, path in enumerate(inputs.paths):
            with Image.open(path) as image:
                frame = np.asarray(image.convert("RGB").convert("L"))
            if gray is None:
                gray = frame
            elif structural_similarity(gray, frame, data_range=255) <= SSIM_THRESHOLD:
                yield reference, number
                reference, gray = number, frame

    return lambda: list(pairs())


def decoded(inputs: Frames) -> Run:
    """What no selection can do without."""
    return lambda: [np.asarray(read_frame(path).convert("L")) for path in inputs.paths]


def work(inputs: Frames) -> Work:
    height, width = inputs.size
    return Work(len(inputs.paths) * height * width * 4, "B", "bytes = frames x pixels x (3 RGB + 1 gray)")


PLAIN = "Pillow + scikit-image"

SUITE = Suite(
    "frame_selection",
    {
        "480x270, 24 frames": Case(lambda: frames((270, 480)), work),
        "640x480, 24 frames": Case(lambda: frames((480, 640)), work),
    },
    {"m4.data": ours, PLAIN: plain, "decoding alone": decoded},
    guards=(("m4.data", PLAIN),),
)
