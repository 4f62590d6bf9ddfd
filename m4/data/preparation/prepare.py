"""From videos in the Penn Action layout to token samples: pairs, framing, tokens, captions, splits.

Work goes video by video into ``{out}/.videos/{video}.npz``, each written atomically, so an interrupted or sharded run
is continued by running it again. When the last video is there, all samples are laid out in a hidden folder and moved
into place. Nothing depends on the number of workers, on shards or on the time: the same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from m4.data.layout import SPLITS
from m4.data.penn_action import Video, list_videos, open_video
from m4.data.preparation.assemble import VIDEOS, assemble, load_video, locked, pack_video, video_path
from m4.data.preparation.options import SPLIT_OPTIONS, PrepareOptions
from m4.data.preparation.tokenize_video import shared_captioner, shared_tokenizer, tokenize_video
from m4.data.split import FRACTIONS
from m4.data.workers import for_each
from m4.errors import DataError, data_error
from m4.files import writable_folder, write_atomically

_CLAIM, _LIST = "options.json", "videos.json"


@dataclass(frozen=True)
class Summary:
    """Outcome of a run: usable videos, their pairs, the reason for each bad video, samples per split.

    complete: the layout is in place (False after a shard that others must join). fresh: this run wrote it.
    """

    videos: int
    pairs: int
    bad: dict[str, str]
    splits: dict[str, int]
    complete: bool
    fresh: bool


def prepare(
    source: str | os.PathLike,
    out: str | os.PathLike,
    options: PrepareOptions | None = None,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Summary:
    """Tokenise the videos of ``source`` (Penn Action layout) into ``out``; see the module's text.

    ``shard=(i, n)`` does every n-th video from the i-th (0-based); the run that finds all videos done lays out the
    samples, as `merge` does. Videos that cannot be read are reported in the summary and left out, and tried again by
    the next run; videos that have changed are done again. Raises DataError for bad options, an ``out`` made with other
    options, a source without videos or without any usable one, or no pair at all.
    """
    options = options or PrepareOptions()
    options.check()
    source, out = Path(source), Path(out)
    if workers < 1:
        raise data_error("workers", expected="at least 1", actual=workers, remedy="Correct it.")
    index, count = shard
    if not 0 <= index < count:
        raise data_error("shard", expected="i/n with 0 <= i < n", actual=f"{index}/{count}", remedy="Correct it.")
    names = list_videos(source)
    # Missing weights or libraries are found before any work.
    tokenizer = shared_tokenizer(options)
    identity = {"id": tokenizer.id, "vocab_size": tokenizer.vocab_size}
    if hasattr(tokenizer, "weights"):
        identity["weights"] = tokenizer.weights()
    if options.captions == "blip":
        shared_captioner(options)
    done = writable_folder(writable_folder(out) / VIDEOS)
    _claim(out, options, identity)
    write_atomically(done / _LIST, json.dumps(names).encode())
    pending = [name for name in names[index::count] if not _is_done(source, done, name)]
    for_each("prepare", partial(_do_video, source, done, options), pending, workers, progress)
    return _finish(out, source, names, FRACTIONS)


def merge(
    out: str | os.PathLike,
    fractions: Sequence[float] = FRACTIONS,
    seed: int | None = None,
    unit: str | None = None,
) -> Summary | None:
    """Lay out the samples of the shards that were prepared into ``out``; None if it holds no prepared videos.

    ``seed`` and ``unit`` are those of ``prepare`` unless given. Raises DataError while videos are missing.
    """
    out = Path(out)
    done = out / VIDEOS
    if not (done / _CLAIM).is_file() or not (done / _LIST).is_file():
        return None
    claim = _read(done / _CLAIM)
    given = {"seed": seed, "split_unit": unit}
    claim["options"] |= {key: value for key, value in given.items() if value is not None}
    write_atomically(done / _CLAIM, json.dumps(claim, indent=1).encode())
    names = _read(done / _LIST)
    missing = [name for name in names if not (video_path(done, name).exists() or _bad_path(done, name).exists())]
    if missing:
        raise data_error(
            out,
            expected=f"all {len(names)} videos",
            actual=f"{len(missing)} that no shard has done, the first being {missing[0]}",
            remedy="Run the shards that are missing (prepare --shard i/n), or all of them again: what is done is kept.",
        )
    return _finish(out, out, names, fractions)


def _finish(out: Path, source: Path, names: list[str], fractions: Sequence[float]) -> Summary:
    """Lay out the samples, if every video is done."""
    done = out / VIDEOS
    with locked(done):
        bad = {name: _bad_path(done, name).read_text() for name in names if _bad_path(done, name).exists()}
        usable = [name for name in names if video_path(done, name).exists()]
        if len(bad) == len(names):
            name, reason = next(iter(bad.items()))
            raise data_error(
                source,
                expected="at least one usable video",
                actual=f"{len(bad)} of {len(bad)} bad, the first being {name}: {reason}",
                remedy="Mend the videos and run this again.",
            )
        if len(usable) + len(bad) < len(names):
            return Summary(len(usable), 0, bad, {}, complete=False, fresh=True)
        claim = _read(done / _CLAIM)
        meta, fresh = assemble(out, claim["options"], claim["tokenizer"], usable, fractions)
        for left in done.glob(".*.tmp"):  # of runs that were killed
            left.unlink(missing_ok=True)
    return Summary(len(usable), sum(meta["splits"].values()), bad, meta["splits"], complete=True, fresh=fresh)


def _claim(out: Path, options: PrepareOptions, tokenizer: dict) -> None:
    """Record what this folder is made with, or make sure that it is the same but for the split."""
    path = out / VIDEOS / _CLAIM
    claim = {"options": options.record(), "tokenizer": tokenizer}
    if not path.exists():
        foreign = [name for name in (*SPLITS, "meta.json") if (out / name).exists()]
        if foreign:
            raise data_error(
                out,
                expected="an empty folder",
                actual=f"{', '.join(foreign)} of other data",
                remedy="Choose another --out.",
            )
    else:
        before, now = _deciding(_read(path)), _deciding(claim)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            raise data_error(
                out,
                expected=", ".join(f"{key} {now.get(key)!r}" for key in changed),
                actual=f"data made with {', '.join(f'{key} {before.get(key)!r}' for key in changed)}",
                remedy="Choose another --out, or delete this folder.",
            )
    write_atomically(path, json.dumps(claim, indent=1).encode())


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise data_error(
            path, expected="JSON", actual=str(error), remedy=f"Delete {path.parent.parent} and prepare the data again."
        ) from error


def _deciding(claim: dict) -> dict:
    """What decides the tokens."""
    # Before it held two parts, the file was the options alone.
    kept = {key: value for key, value in claim.get("options", claim).items() if key not in SPLIT_OPTIONS}
    weights = claim.get("tokenizer", {}).get("weights") if "options" in claim else None
    return kept if weights is None else {**kept, "weights": weights}


def _is_done(source: Path, done: Path, name: str) -> bool:
    """Whether the tokens of a video are there, of the video as it is now."""
    try:
        arrays = load_video(video_path(done, name))
    except (FileNotFoundError, DataError):
        return False
    if "source" not in arrays:
        return True
    try:
        return _stamp(source, open_video(source, name)) == str(arrays["source"])
    except DataError:
        # A source that is gone is no changed source: frames may be deleted once their tokens are made.
        return not (source / "frames" / name).is_dir()


def _stamp(source: Path, video: Video) -> str:
    """Tells a changed video, without reading its frames: digest of its label, number and sizes of its frames."""
    digest = hashlib.sha256((source / "labels" / f"{video.name}.mat").read_bytes())
    for frame in video.frames:
        digest.update(f"{frame.name}:{frame.stat().st_size};".encode())
    return digest.hexdigest()


def _do_video(source: Path, done: Path, options: PrepareOptions, name: str) -> None:
    """Write a video's tokens, or the reason why it cannot be used."""
    path, bad = video_path(done, name), _bad_path(done, name)
    try:
        video = open_video(source, name)
        stamp = _stamp(source, video)
        arrays = tokenize_video(video, options)
    except DataError as error:
        path.unlink(missing_ok=True)
        write_atomically(bad, str(error).encode())
        return
    bad.unlink(missing_ok=True)
    write_atomically(path, pack_video({**arrays, "source": np.array(stamp)}))


def _bad_path(done: Path, name: str) -> Path:
    return done / f"{name}.bad"
