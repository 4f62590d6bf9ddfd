"""From videos in the Penn Action layout to token samples: pairs, framing, tokens, captions, splits.

Work goes video by video into ``{out}/.videos/{video}.npz``, each written atomically, so an interrupted or sharded run
is continued by running it again. When the last video is there, all samples are laid out in a hidden folder and moved
into place. Nothing depends on the number of workers, on shards or on the time: the same input gives the same bytes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from m4.data.assemble import VIDEOS, assemble, locked, pack_video, video_path
from m4.data.errors import DataError, data_error
from m4.data.files import writable_folder, write_atomically
from m4.data.layout import SPLITS
from m4.data.options import PrepareOptions
from m4.data.penn_action import list_videos, open_video
from m4.data.tokenise import shared_captioner, shared_tokenizer, tokenise_video
from m4.data.workers import for_each


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
    samples. Videos that cannot be read are reported in the summary and left out, and tried again by the next run.
    Raises DataError for bad options, an ``out`` made with other options, a source without videos or without any usable
    one, or no pair at all.
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
    shared_tokenizer(options.tokenizer, options.cosmos_dir)
    if options.captions == "blip":
        shared_captioner()
    done = writable_folder(writable_folder(out) / VIDEOS)
    _claim(out, options)
    mine = [name for name in names[index::count] if not video_path(done, name).exists()]
    for_each("prepare", partial(_do_video, source, done, options), mine, workers, progress)
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
        meta, fresh = assemble(out, options, usable)
    return Summary(len(usable), sum(meta["splits"].values()), bad, meta["splits"], complete=True, fresh=fresh)


def _claim(out: Path, options: PrepareOptions) -> None:
    """Record the options this folder is made with, or make sure that they are the same."""
    path = out / VIDEOS / "options.json"
    record = json.dumps(options.record(), indent=1, sort_keys=True)
    if not path.exists():
        strangers = [name for name in (*SPLITS, "meta.json") if (out / name).exists()]
        if strangers:
            raise data_error(
                out,
                expected="an empty folder",
                actual=f"{', '.join(strangers)} of other data",
                remedy="Choose another --out.",
            )
        write_atomically(path, record.encode())
    elif path.read_text() != record:
        before, now = json.loads(path.read_text()), options.record()
        changed = [f"{key} {before.get(key)!r}" for key in now if before.get(key) != now[key]]
        raise data_error(
            out,
            expected=", ".join(f"{key} {now[key]!r}" for key in now if before.get(key) != now[key]),
            actual=f"data made with {', '.join(changed)}",
            remedy="Choose another --out, or delete this folder.",
        )


def _do_video(source: Path, done: Path, options: PrepareOptions, name: str) -> None:
    """Write a video's tokens, or the reason why it cannot be used."""
    bad = _bad_path(done, name)
    try:
        arrays = tokenise_video(open_video(source, name), options)
    except DataError as error:
        write_atomically(bad, str(error).encode())
        return
    write_atomically(video_path(done, name), pack_video(arrays))
    bad.unlink(missing_ok=True)


def _bad_path(done: Path, name: str) -> Path:
    return done / f"{name}.bad"
