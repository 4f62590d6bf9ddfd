"""Divide samples into train, eval and test."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m4.data.checks import check_seed
from m4.data.layout import SPLITS, UNFINISHED, read_meta, token_file
from m4.data.locking import LOCK, locked
from m4.data.progress import shown
from m4.errors import data_error
from m4.files import write_atomically

UNITS = ("video", "pair")
FRACTIONS = (0.8, 0.1, 0.1)


def split_output_dataset(
    root: str | os.PathLike,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 42,
    unit: str = "video",
) -> dict[str, int]:
    """Move every sample of ``root`` to ``train``, ``eval`` or ``test``; return the number of samples in each.

    Samples, folders named by a number with one file each, may lie in ``{root}/{modality}/{pid}`` or already in splits.
    The outcome depends on the set of samples and the arguments only, so calling it again moves nothing, and a call that
    was cut off is finished by the next; readers refuse the root in between. meta.json, if any, is kept up to date.
    ``unit="video"`` keeps all pairs of a video together (videos are read from ``{root}/pairs.csv``); ``"pair"`` draws
    every pair by itself. Units are counted by largest remainder: each split gets its share to within one unit, and none
    with a positive fraction stays empty while there are units. Raises DataError for bad arguments, a missing or empty
    root, a sample in two places, or a pair whose video is unknown.
    """
    root = Path(root)
    check_split(fractions, seed, unit)
    if not root.is_dir():
        raise data_error(root, expected="a data root", actual="no such folder", remedy="Check the path.")
    with locked(root / LOCK, str(root)):
        return divide(root, fractions, seed, unit)


def check_split(fractions: Sequence[float], seed: int, unit: str) -> None:
    """Raises DataError for arguments that `split_output_dataset` cannot follow."""
    # math.isfinite first: every comparison with NaN is false.
    if (
        len(fractions) != len(SPLITS)
        or not all(map(math.isfinite, fractions))
        or min(fractions) < 0
        or abs(sum(fractions) - 1) > 1e-6
    ):
        raise data_error(
            "fractions",
            expected=f"{len(SPLITS)} non-negative numbers ({', '.join(SPLITS)}) with sum 1",
            actual=tuple(fractions),
            remedy="Correct them.",
        )
    check_seed(seed)
    if unit not in UNITS:
        raise data_error("split unit", expected=" or ".join(UNITS), actual=repr(unit), remedy="Choose one of these.")


def divide(root: Path, fractions: Sequence[float], seed: int, unit: str) -> dict[str, int]:
    """`split_output_dataset` by a caller that has checked the arguments and holds the root's lock, or needs none."""
    folders = _sample_folders(root)
    modalities = sorted({modality for modality, _ in folders})
    pids = sorted({pid for _, pid in folders})
    if not pids:
        raise data_error(
            root, expected="samples (MODALITY/PID/FILE)", actual="none", remedy="Run python -m m4.data prepare first."
        )
    groups = _videos(root, pids) if unit == "video" else {pid: [pid] for pid in pids}
    members = assigned(groups, fractions, seed)
    totals = {split: len(chosen) for split, chosen in members.items()}
    moves: list[tuple[Path, Path]] = []
    for split, chosen in members.items():
        for pid in chosen:
            for modality in modalities:
                folder, destination = folders.get((modality, pid)), root / split / modality / pid
                if folder is not None and folder != destination:
                    moves.append((folder, destination))
    _carry_out(root, moves, modalities, _described(root, fractions, seed, unit, totals))
    return totals


def assigned(groups: Mapping[str, Sequence[str]], fractions: Sequence[float], seed: int) -> dict[str, list[str]]:
    """Split → the samples that fall to it, of groups that stay together (name → samples)."""
    names = sorted(groups)
    order = np.random.default_rng(seed).permutation(len(names))
    members, start = {}, 0
    for split, count in zip(SPLITS, _share(len(names), fractions), strict=True):
        members[split] = [pid for index in order[start : start + count] for pid in groups[names[index]]]
        start += count
    return members


def _carry_out(root: Path, moves: list[tuple[Path, Path]], modalities: list[str], meta: bytes | None) -> None:
    """Move the samples and renew meta.json; until all is done, readers refuse the root."""
    marker = root / UNFINISHED
    if moves:
        write_atomically(marker, b"split\n")
    for folder, destination in shown(moves, "split", "folder"):
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(destination)
    for modality in modalities:
        unsplit = root / modality
        if unsplit.is_dir() and not any(unsplit.iterdir()):
            unsplit.rmdir()
    if meta is not None:
        write_atomically(root / "meta.json", meta)
    marker.unlink(missing_ok=True)


def _described(root: Path, fractions: Sequence[float], seed: int, unit: str, totals: dict[str, int]) -> bytes | None:
    """meta.json saying how the samples are divided now; None where there is none, or none to be changed."""
    meta = read_meta(root)
    new = described(meta, fractions, seed, unit, totals)
    return None if new == meta else (json.dumps(new, indent=1) + "\n").encode()


def described(
    meta: dict[str, Any], fractions: Sequence[float], seed: int, unit: str, totals: dict[str, int]
) -> dict[str, Any]:
    """What meta.json says once the samples are divided so; {} stays {}."""
    if not meta:
        return meta
    options = {**meta["options"], "split_unit": unit, "seed": seed}
    return {**meta, "options": options, "fractions": list(fractions), "splits": totals}


def _sample_folders(root: Path) -> dict[tuple[str, str], Path]:
    """Where every (modality, pid) lies now. Raises DataError for a pid that is in two places."""
    folders: dict[tuple[str, str], Path] = {}
    for base in (root, *(root / split for split in SPLITS)):
        for modality in _folders(base):
            if base == root and modality.name in SPLITS:
                continue
            for sample in shown(_folders(modality), f"looking through {modality.name}", "folder"):
                # Other folders, such as the frames of an embedded sample set, are not samples.
                if not sample.name.isdecimal():
                    continue
                token_file(sample)
                first = folders.setdefault((modality.name, sample.name), sample)
                if first != sample:
                    raise data_error(
                        sample, expected="each sample once", actual=f"also {first}", remedy="Remove one of the two."
                    )
    return folders


def _folders(base: Path) -> list[Path]:
    if not base.is_dir():
        return []
    return sorted(entry for entry in base.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _videos(root: Path, pids: list[str]) -> dict[str, list[str]]:
    """Pids by video, from pairs.csv."""
    path = root / "pairs.csv"
    if not path.is_file():
        raise data_error(
            path,
            expected="the table pid,video,… that python -m m4.data prepare writes",
            actual="no such file",
            remedy='Split with unit "pair", or prepare the data again.',
        )
    with open(path, newline="") as file:
        rows = [(row.get("pid"), row.get("video")) for row in csv.DictReader(file)]
    videos = dict(rows)
    if len(videos) < len(rows):
        twice = next(pid for number, (pid, _) in enumerate(rows) if pid in dict(rows[:number]))
        raise data_error(path, expected="one row a sample", actual=f"two for {twice}", remedy="Prepare again.")
    groups: dict[str, list[str]] = {}
    for pid in pids:
        video = videos.get(pid)
        if video is None:
            raise data_error(path, expected="a row for every sample", actual=f"none for {pid}", remedy="Prepare again.")
        groups.setdefault(video, []).append(pid)
    return groups


def _share(units: int, fractions: Sequence[float]) -> list[int]:
    """Whole numbers that add up to ``units``, by largest remainder, none empty that need not be."""
    exact = [units * fraction for fraction in fractions]
    counts = [int(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: units - sum(counts)]:
        counts[index] += 1
    for index, fraction in enumerate(fractions):
        largest = max(range(len(counts)), key=counts.__getitem__)
        if fraction > 0 and counts[index] == 0 and counts[largest] > 1:
            counts[index] += 1
            counts[largest] -= 1
    return counts
