"""Which sample goes on where another ends: the pairs of a video, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m4.data.layout import read_pairs
from m4.data.packed.index import is_packed, read_index
from m4.data.packed.samples import split_samples


def following_rows(root: Path, split: str, pids: Sequence[str]) -> np.ndarray:
    """int64 (N,): for every sample of a split the row of one whose reference frame is its successor frame; -1 without.

    Of data that does not say which frames its samples are made of (no pairs.csv) all are -1. Raises DataError for a
    damaged file.
    """
    places: list[tuple[str, int, int] | None]
    if is_packed(root):
        samples = split_samples(root, read_index(root), split)
        known = zip(samples.videos, samples.frames, strict=True)
        places = [None if video is None or not frames else (video, frames[0], frames[1]) for video, frames in known]
    else:
        pairs = read_pairs(root)
        places = [pairs.get(pid) for pid in pids]
    starts = {place[:2]: row for row, place in enumerate(places) if place is not None}
    following = [-1 if place is None else starts.get((place[0], place[2]), -1) for place in places]
    return np.array(following, dtype=np.int64)


def rows_followed(following: np.ndarray, moments: int, rows: int) -> np.ndarray:
    """int64, ascending: the rows from which a video goes on for so many moments; where these are fewer than ``rows``,
    those from which it goes on for as many moments as leaves so many (one moment, which all rows have, if need be).

    following: see `following_rows`.
    """
    found = current = np.arange(len(following))
    for _ in range(moments - 1):
        current = np.where(current >= 0, following[current], -1)
        if (current >= 0).sum() < min(rows, len(following)):
            break
        found = np.flatnonzero(current >= 0)
    return found
