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

from m4.data.checks import check_apart, check_name, check_seed, check_whole, check_workers
from m4.data.frames import frame_names, natural_key
from m4.data.locking import LOCK, locked
from m4.data.penn_action import read_label, write_label
from m4.data.synthetic.clips import SynthOptions, animated_clip, reenacted_clip, reenacted_label
from m4.data.workers import for_each
from m4.errors import DataError, data_error
from m4.files import writable_folder, write_atomically

_JPEG_QUALITY = 90
_SMALLEST, _LARGEST = 64, 8192  # sides of a frame, pixels


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
    check_workers(workers)
    out = Path(out)
    if poses is not None:
        check_apart(out, Path(poses))
    names, sources = _choose(options, None if poses is None else Path(poses))
    for source in sources:
        if source is not None:
            _check_source(source)
    writable_folder(out)
    with locked(out / LOCK, str(out)):
        _claim(out, options, poses is not None)
        for part in ("frames", "labels"):
            _sweep(writable_folder(out / part))
        everything = zip(range(len(names)), names, sources, strict=True)
        jobs = [job for job in everything if not _is_whole(out, options, job)]
        for_each("synth", partial(_write_video, out, options), jobs, workers, progress)
    return names


def _sweep(folder: Path) -> None:
    """Remove what runs that were killed have left; nobody else works here while the lock is held."""
    for left in folder.glob(".*.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _is_whole(out: Path, options: SynthOptions, job: tuple[int, str, Path | None]) -> bool:
    """Whether a video is there with all its frames, and of the pose file that it re-enacts."""
    _, name, source = job
    try:
        made = read_label(_label_path(out, name))
        frames = sorted(frame_names(out / "frames" / name))
    except DataError:
        return False
    if frames != [_frame_name(number) for number in range(len(made))]:
        return False
    if source is None:
        return True
    wanted = reenacted_label(options, source)
    return all(np.array_equal(getattr(made, part), getattr(wanted, part)) for part in ("x", "y", "visible"))


def _frame_name(number: int) -> str:
    return f"{number + 1:06d}.jpg"


def _check(options: SynthOptions) -> None:
    """Raises DataError for a number out of range: frame names have six digits, and a picture must fit into memory."""
    for name, most in (("videos", 999_999), ("scenes", 999_999), ("people", 999_999)):
        if getattr(options, name) is not None:
            check_whole(name, getattr(options, name), 1, most)
    check_seed(options.seed)
    if options.frames is not None and not 2 <= options.frames[0] <= options.frames[1] <= 999_999:
        raise data_error(
            "frames",
            expected="(fewest, most), at least 2, at most 999999",
            actual=options.frames,
            remedy="Correct it.",
        )
    if options.size is not None:
        _check_size("size", options.size)


def _check_size(where: str | os.PathLike, size: tuple[int, int]) -> None:
    if not _SMALLEST <= min(size) <= max(size) <= _LARGEST:
        raise data_error(
            where,
            expected=f"frames of {_SMALLEST}x{_SMALLEST} to {_LARGEST}x{_LARGEST} pixels",
            actual=f"{size[1]}x{size[0]}",
            remedy="Ask for another size.",
        )


def _check_source(path: Path) -> None:
    """Raises DataError for a pose file that cannot be re-enacted."""
    label = read_label(path)
    _check_size(path, (label.height, label.width))
    check_name(path.stem)


def _choose(options: SynthOptions, poses: Path | None) -> tuple[list[str], list[Path | None]]:
    if poses is None:
        return [f"{index + 1:04d}" for index in range(options.videos)], [None] * options.videos
    if not poses.is_dir():
        raise data_error(
            poses,
            expected=f"a folder with at least {options.videos} label files",
            actual="no such folder",
            remedy="Point --poses at Penn Action's labels folder.",
        )
    found = (path for path in poses.iterdir() if path.suffix.lower() == ".mat" and not path.name.startswith("."))
    files = sorted(found, key=_by_stem)
    if len(files) < options.videos:
        raise data_error(
            poses,
            expected=f"a folder with at least {options.videos} label files",
            actual=f"{len(files)}",
            remedy="Point --poses at Penn Action's labels folder, or lower --videos.",
        )
    chosen = np.sort(np.random.default_rng([options.seed, 1]).permutation(len(files))[: options.videos])
    return [files[index].stem for index in chosen], [files[index] for index in chosen]


def _by_stem(path: Path) -> tuple:
    return natural_key(path.stem)


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
    # Under a name of this process's own, and renamed when whole: a part is never taken for a video.
    temporary, final = out / "frames" / f".{name}.{os.getpid()}.tmp", out / "frames" / name
    unfinished, label = out / "labels" / f".{name}.{os.getpid()}.tmp", _label_path(out, name)
    label.unlink(missing_ok=True)
    for stale in (temporary, final):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir()
    for frame in range(len(clip.label)):
        clip.render(frame).save(temporary / _frame_name(frame), quality=_JPEG_QUALITY)
    temporary.rename(final)
    # The label comes last: it marks the video as finished.
    write_label(unfinished, clip.label)
    unfinished.rename(label)
