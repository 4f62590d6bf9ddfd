"""Writes a data set in the Penn Action layout: animated 13-joint figures, or real label files re-enacted.

Every frame is a function of (options, video), so a run can be interrupted, resumed and repeated.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from m4.data.penn_action import write_label
from m4.data.synthetic.clips import SynthOptions, animated_clip, reenacted_clip
from m4.data.workers import for_each
from m4.errors import data_error
from m4.files import writable_folder, write_atomically

_JPEG_QUALITY = 90


def synthesize(
    out: str | os.PathLike,
    options: SynthOptions,
    poses: str | os.PathLike | None = None,
    workers: int = 1,
    progress: bool = True,
) -> list[str]:
    """Write ``options.videos`` videos under ``out`` and return their names; finished videos are not drawn again.

    With ``poses``, a folder of Penn Action label files, the videos re-enact a seeded choice of them under their own
    names. Raises DataError for options out of range, a folder that holds something else, too few label files, or an
    unreadable label.
    """
    _check(options)
    out = Path(out)
    names, sources = _choose(options, None if poses is None else Path(poses))
    writable_folder(out)
    _claim(out, options, poses is not None)
    for part in ("frames", "labels"):
        writable_folder(out / part)
    jobs = [job for job in zip(range(len(names)), names, sources, strict=True) if not _label_path(out, job[1]).exists()]
    for_each("synth", partial(_write_video, out, options), jobs, workers, progress)
    return names


def _check(options: SynthOptions) -> None:
    for name in ("videos", "scenes", "people"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise data_error(name, expected="at least 1", actual=value, remedy="Ask for more.")
    if options.frames is not None and not 2 <= options.frames[0] <= options.frames[1]:
        raise data_error("frames", expected="(fewest, most), at least 2", actual=options.frames, remedy="Correct it.")
    if options.size is not None and min(options.size) < 64:
        raise data_error("size", expected="at least 64x64 pixels", actual=options.size, remedy="Ask for larger frames.")


def _choose(options: SynthOptions, poses: Path | None) -> tuple[list[str], list[Path | None]]:
    if poses is None:
        return [f"{index + 1:04d}" for index in range(options.videos)], [None] * options.videos
    files = sorted(poses.glob("*.mat")) if poses.is_dir() else []
    if len(files) < options.videos:
        raise data_error(
            poses,
            expected=f"a folder with at least {options.videos} label files",
            actual=f"{len(files)}",
            remedy="Point --poses at Penn Action's labels folder, or lower --videos.",
        )
    chosen = np.sort(np.random.default_rng([options.seed, 1]).permutation(len(files))[: options.videos])
    return [files[index].stem for index in chosen], [files[index] for index in chosen]


def _claim(out: Path, options: SynthOptions, reenacted: bool) -> None:
    """Record what this folder holds, or make sure that it already holds the same."""
    record = json.dumps(dict(asdict(options), reenacted=reenacted), indent=1) + "\n"
    path = out / "synth.json"
    if path.exists():
        if path.read_text() != record:
            raise data_error(
                path,
                expected="the options of this run",
                actual="those of another run",
                remedy="Choose another --out, or delete this folder.",
            )
    elif any((out / part).exists() for part in ("frames", "labels")):
        raise data_error(
            out, expected="an empty folder", actual="other frames or labels", remedy="Choose another --out."
        )
    else:
        write_atomically(path, record.encode())


def _label_path(out: Path, name: str) -> Path:
    return out / "labels" / f"{name}.mat"


def _write_video(out: Path, options: SynthOptions, job: tuple[int, str, Path | None]) -> None:
    index, name, source = job
    clip = animated_clip(options, index) if source is None else reenacted_clip(options, index, source)
    temporary, final = out / "frames" / f".{name}.tmp", out / "frames" / name
    for stale in (temporary, final):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir()
    for frame in range(len(clip.label)):
        clip.render(frame).save(temporary / f"{frame + 1:06d}.jpg", quality=_JPEG_QUALITY)
    temporary.rename(final)
    # The label comes last: it marks the video as finished.
    unfinished = out / "labels" / f".{name}.tmp"
    write_label(unfinished, clip.label)
    unfinished.rename(_label_path(out, name))
