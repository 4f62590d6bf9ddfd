"""The embedded sample set: animated videos, prepared with the embedded tokenizer. Everything on the spot, no download.

A handful of people and scenes filmed from tripods, so that a small model can learn in minutes what they look like;
videos of the evaluation split show new motion of known people in known scenes.
"""

from __future__ import annotations

import os
from pathlib import Path

from m4.data.preparation.options import PrepareOptions
from m4.data.preparation.prepare import Summary, prepare
from m4.data.synthetic.clips import SynthOptions
from m4.data.synthetic.synth import synthesize

SAMPLE_VIDEOS = 150


def make_sample(
    out: str | os.PathLike, videos: int = SAMPLE_VIDEOS, workers: int = 2, progress: bool = True
) -> Summary:
    """Make the sample set of ``videos`` videos in ``out`` (tokens) and ``out/videos`` (frames and labels).

    A set that is finished is used as it stands; one that is not is continued. Raises DataError as synthesize and
    prepare do, for instance for a folder that holds something else.
    """
    out = Path(out)
    options = SynthOptions(
        videos=videos, seed=9, frames=(20, 28), size=(240, 320), scenes=4, people=6, steady=True, fps=8.0, noise=2.4
    )
    synthesize(out / "videos", options, workers=workers, progress=progress)
    return prepare(out / "videos", out, PrepareOptions(framing="center"), workers=workers, progress=progress)
