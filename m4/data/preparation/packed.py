"""Lays out tokenised videos packed: the samples of `m4.data.preparation.assemble`, without a folder for each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m4.data.packed.index import INDEX, Column, read_index
from m4.data.packed.packing import add
from m4.data.packed.samples import Samples
from m4.data.packed.sources import Block
from m4.data.packed.splits import divide_packed
from m4.data.preparation.assemble import VIDEOS, load_video, meta_of, no_pairs, video_path, videos_digest
from m4.data.split import FRACTIONS, assigned
from m4.modalities import TOKEN_SHAPES


class VideoSource:
    """The pairs of the videos ``names`` (in this order), numbered as in folders, as a source of rows."""

    def __init__(self, out: Path, record: dict, tokenizer: dict, names: list[str], fractions: Sequence[float]) -> None:
        self.what, self._done = str(out), out / VIDEOS
        self._captions = record["captions"] != "none"
        self._loaded: tuple[str, dict[str, np.ndarray]] | None = None
        counts = {name: len(self._video(name)["pairs"]) for name in names}
        total = sum(counts.values())
        if total == 0:
            raise no_pairs(out, "at least 1 pair", total, record)
        sample = self._video(next(name for name in names if counts[name]))
        digits = max(6, len(str(total - 1)))
        self._places = [(name, row) for name in names for row in range(counts[name])]
        groups: dict[str, list[str]] = {}
        for number, (name, _) in enumerate(self._places):
            pid = f"{number:0{digits}d}"
            groups.setdefault(name if record["split_unit"] == "video" else pid, []).append(pid)
        members = assigned(groups, fractions, record["seed"])
        self.splits = {split: sorted(pids) for split, pids in members.items() if pids}
        counted = {split: len(pids) for split, pids in members.items()}
        self.meta = meta_of(record, tokenizer, names, counted, fractions) | {
            "videos_digest": videos_digest(self._done, names)
        }
        self.columns = [
            Column(name, int(np.prod(shape)), self.meta["modalities"][name]["vocab_size"], list(shape), dtype)
            for (name, shape), dtype in zip(
                TOKEN_SHAPES.items(), (sample[n].dtype.str for n in TOKEN_SHAPES), strict=True
            )
        ]

    def stamp(self, split: str, rows: Sequence[int]) -> str:
        """Of the content of the videos, and which rows."""
        digests, places = {}, [self._places[int(self.splits[split][row])] for row in rows]
        for name in dict.fromkeys(name for name, _ in places):
            digests[name] = hashlib.sha256(video_path(self._done, name).read_bytes()).hexdigest()
        pids = [self.splits[split][row] for row in rows]
        return hashlib.sha256(json.dumps([digests, places, pids, self._captions]).encode()).hexdigest()

    def read(self, split: str, rows: Sequence[int]) -> Block:
        """Some rows of a split."""
        tokens = np.empty((len(rows), sum(column.length for column in self.columns)), np.uint16)
        samples = Samples()
        for number, row in enumerate(rows):
            pid = self.splits[split][row]
            name, pair = self._places[int(pid)]
            video = self._video(name)
            np.concatenate(
                [video[column.name][pair].ravel() for column in self.columns], out=tokens[number], casting="unsafe"
            )
            caption = str(video["captions"][pair]) if self._captions else None
            samples.extend(Samples([pid], [name], [video["pairs"][pair].tolist()], [caption]))
        return Block(tokens, samples, {})

    def _video(self, name: str) -> dict[str, np.ndarray]:
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = (name, load_video(video_path(self._done, name)))
        return self._loaded[1]


def assemble_packed(
    out: Path, record: dict, tokenizer: dict, names: list[str], fractions: Sequence[float] = FRACTIONS
) -> tuple[dict, bool]:
    """`m4.data.preparation.assemble.assemble`, packed: the same names, splits and tokens."""
    if (out / INDEX).is_file():
        meta = read_index(out).meta
        if meta.get("videos_digest") == videos_digest(out / VIDEOS, names):
            if meta["options"] == record and meta["fractions"] == list(fractions):
                return meta, False
            divide_packed(out, fractions, record["seed"], record["split_unit"])
            return read_index(out).meta, True
    add(VideoSource(out, record, tokenizer, names, fractions), out, None)
    return read_index(out).meta, True
