"""From videos in the Penn Action layout to token samples: pairs, framing, tokens, captions, splits.

Work goes video by video into ``{out}/.videos/{video}.npz``, each written atomically, so an interrupted or sharded run
is continued by running it again. When the last video is there, all samples are laid out in a hidden folder and moved
into place. Nothing depends on the number of workers, on shards or on the time: the same input gives the same bytes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from m4.data.checks import check_apart, check_name, check_workers, printable
from m4.data.layout import SPLITS
from m4.data.locking import LOCK, locked
from m4.data.packed.index import INDEX
from m4.data.penn_action import list_videos, open_video
from m4.data.preparation.assemble import VIDEOS, assemble, pack_video, video_path, work_path
from m4.data.preparation.done import content_of, is_done, made_of, remember, status_of
from m4.data.preparation.options import SPLIT_OPTIONS, PrepareOptions
from m4.data.preparation.packed import assemble_packed
from m4.data.preparation.tokenize_video import shared_captioner, shared_tokenizer, tokenize_video
from m4.data.progress import bars
from m4.data.split import FRACTIONS, UNITS, check_split
from m4.data.workers import for_each
from m4.errors import DataError, data_error
from m4.files import writable_folder, write_atomically

_CLAIM, _LIST = "options.json", "videos.json"
_STALE_SECONDS = 3600.0


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
    packed: bool = False,
) -> Summary:
    """Tokenise the videos of ``source`` (Penn Action layout) into ``out``; see the module's text.

    ``packed``: the samples are laid out in shards (`m4.data.packed`) in place of folders.

    ``shard=(i, n)`` does every n-th video from the i-th (0-based); the run that finds all videos done lays out the
    samples, as `merge` does. Videos that cannot be read are reported in the summary and left out, and tried again by
    the next run; videos that have changed are done again. Raises DataError for bad options, an ``out`` made with other
    options, a source without videos or without any usable one, or no pair at all.
    """
    options = options or PrepareOptions()
    options.check()
    source, out = Path(source), Path(out)
    check_workers(workers)
    index, count = shard
    if not 0 <= index < count:
        raise data_error("shard", expected="i/n with 0 <= i < n", actual=f"{index}/{count}", remedy="Correct it.")
    check_apart(out, source)
    names = list_videos(source)
    # Missing weights or libraries are found before any work.
    tokenizer = shared_tokenizer(options)
    identity = {"id": tokenizer.id, "vocab_size": tokenizer.vocab_size}
    if hasattr(tokenizer, "weights"):
        identity["weights"] = tokenizer.weights()
    if options.captions == "blip":
        shared_captioner(options)
    done = writable_folder(writable_folder(out) / VIDEOS)
    with locked(out / LOCK, str(out)):
        _claim(out, options, identity, packed)
        write_atomically(done / _LIST, json.dumps(names).encode())
    with locked(done / f".shard-{index}-of-{count}.lock", str(out)):
        pending = [name for name in names[index::count] if not is_done(source, done, name)]
        for_each("prepare", partial(_do_video, source, done, options), pending, workers, progress)
    with locked(out / LOCK, str(out)), bars(progress):
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
    check_split(fractions, 0 if seed is None else seed, UNITS[0] if unit is None else unit)
    with locked(out / LOCK, str(out)):
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
                actual=f"{len(missing)} that no shard has done, the first being {printable(missing[0])}",
                remedy="Run the shards that are missing (prepare --shard i/n), or all again: what is done is kept.",
            )
        return _finish(out, out, names, fractions)


def _finish(out: Path, source: Path, names: list[str], fractions: Sequence[float]) -> Summary:
    """Lay out the samples, if every video is done. The caller holds the lock of ``out``."""
    done = out / VIDEOS
    bad = {name: _bad_path(done, name).read_text("utf-8") for name in names if _bad_path(done, name).exists()}
    shown = {printable(name): reason for name, reason in bad.items()}
    usable = [name for name in names if video_path(done, name).exists()]
    if len(bad) == len(names):
        name, reason = next(iter(shown.items()))
        raise data_error(
            source,
            expected="at least one usable video",
            actual=f"{len(bad)} of {len(bad)} bad, the first being {name}: {reason}",
            remedy="Mend the videos and run this again.",
        )
    if len(usable) + len(bad) < len(names):
        return Summary(len(usable), 0, shown, {}, complete=False, fresh=True)
    claim = _read(done / _CLAIM)
    lay_out = assemble_packed if claim.get("packed") else assemble
    meta, fresh = lay_out(out, claim["options"], claim["tokenizer"], usable, fractions)
    _sweep(done)
    return Summary(len(usable), sum(meta["splits"].values()), shown, meta["splits"], complete=True, fresh=fresh)


def _sweep(done: Path) -> None:
    """Remove what runs that were killed have left, but not what another shard may be writing."""
    for left in done.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()


def _claim(out: Path, options: PrepareOptions, tokenizer: dict, packed: bool) -> None:
    """Record what this folder is made with, or make sure that it is the same but for the split."""
    path = out / VIDEOS / _CLAIM
    claim = {"options": options.record(), "tokenizer": tokenizer} | ({"packed": True} if packed else {})
    if not path.exists():
        foreign = [name for name in (*SPLITS, "meta.json", INDEX) if (out / name).exists()]
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
    kept["packed"] = claim.get("packed", False)
    return kept if weights is None else {**kept, "weights": weights}


def _do_video(source: Path, done: Path, options: PrepareOptions, name: str) -> None:
    """Write a video's tokens, or the reason why it cannot be used.

    Only DataError, which everything that reads a video's files raises for what such files can do (`m4.data.frames`),
    makes a video bad. Other exceptions are bugs or the machine's state, and end the run.
    """
    path, bad = video_path(done, name), _bad_path(done, name)
    try:
        check_name(name)
        video = open_video(source, name)
        status = status_of(source, video)
        status.settle()
        content = content_of(source, video)
        if made_of(done, name) != content:
            arrays = tokenize_video(video, options)
            write_atomically(path, pack_video({**arrays, "content": np.array(content)}))
        # Files that changed while they were read are looked at again by the next run.
        unchanged = status_of(source, video).hexdigest() == status.hexdigest()
    except DataError as error:
        path.unlink(missing_ok=True)
        write_atomically(bad, str(error).encode(errors="backslashreplace"))
        return
    bad.unlink(missing_ok=True)
    if unchanged:
        remember(done, name, status, content)


def _bad_path(done: Path, name: str) -> Path:
    return work_path(done, name, ".bad")
