"""The token layout on disk: ``{root}/{split}/{modality}/{pid}/{file}``, and what its meta.json says."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from m4.data.packed.index import is_packed, read_index
from m4.errors import DataError, data_error

FORMAT = "m4-tokens-v1"
SPLITS = ("train", "eval", "test")
# Present while samples are being moved: what stands below the root then is neither the old nor the new layout.
UNFINISHED = ".unfinished"
_BAD_TOKENS = "Prepare this sample again: python -m m4.data prepare."


def find_splits(root: Path) -> list[str]:
    """The splits present under ``root``. Raises DataError for a root that is missing, unfinished or holds none."""
    if not root.is_dir():
        raise data_error(
            root,
            expected="a data root",
            actual="no such folder",
            remedy="Check data.root, or set it to null for the embedded sample set.",
        )
    if is_packed(root):
        splits = read_index(root).splits
        return [split for split in SPLITS if split in splits]
    if (root / UNFINISHED).exists():
        raise data_error(
            root,
            expected="a finished data set",
            actual=f"one whose samples are being laid out, or were when a run was cut off ({UNFINISHED})",
            remedy="Wait for that run, or give its command again: python -m m4.data prepare or split.",
        )
    if (root / ".videos").is_dir() and not (root / "meta.json").exists():
        raise data_error(
            root,
            expected="a finished data set with its meta.json",
            actual="videos that are not laid out yet",
            remedy="Finish it: python -m m4.data prepare, or python -m m4.data split ROOT once all shards are done.",
        )
    found = [split for split in SPLITS if (root / split).is_dir()]
    if not found:
        raise data_error(
            root,
            expected=f"the folders {', '.join(SPLITS)}",
            actual="none of them",
            remedy="Make the data: python -m m4.data prepare --out ROOT, or python -m m4.data split ROOT.",
        )
    return found


def read_meta(root: Path) -> dict:
    """The content of ``root``'s meta.json; {} where there is none, or one that this package did not write.

    A packed data set keeps it in its index. Raises DataError for a damaged file, or one of another version of the
    format.
    """
    if is_packed(root):
        return read_index(root).meta
    path = root / "meta.json"
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise data_error(path, expected="JSON", actual=str(error), remedy="Prepare the data again.") from error
    found = meta.get("format") if isinstance(meta, dict) else None
    if not isinstance(found, str) or not found.startswith("m4-tokens-"):
        return {}
    if found != FORMAT:
        raise data_error(path, expected=f"format {FORMAT}", actual=found, remedy="Prepare the data again.")
    return meta


def require_meta(root: Path) -> dict:
    """The content of ``root``'s meta.json, for what cannot do without it. Raises DataError where there is none."""
    meta = read_meta(root)
    missing = [key for key in ("options", "modalities") if key not in meta]
    if missing:
        raise data_error(
            root / "meta.json",
            expected="what python -m m4.data prepare says of its data",
            actual=f"no {' and no '.join(missing)}" if meta else "no such file, or none of this format",
            remedy="Prepare the data again: python -m m4.data prepare.",
        )
    return meta


def content_digest(digests: Mapping[tuple[str, str], bytes]) -> str:
    """The content fingerprint of a data set, wherever its samples lie: of (modality, pid) → SHA-256 of the file."""
    total = hashlib.sha256()
    for (modality, pid), digest in sorted(digests.items()):
        total.update(f"{modality}/{pid}\0".encode() + digest)
    return total.hexdigest()


def find_pids(root: Path, split: str, modalities: Sequence[str]) -> list[str]:
    """Sorted sample names of a split, the same for every modality. Raises DataError naming what is missing."""
    splits = find_splits(root)
    if split not in splits:
        raise data_error(
            root / split,
            expected="a folder of this split",
            actual=f"only {', '.join(splits)}",
            remedy="Split the data: python -m m4.data split ROOT.",
        )
    names: dict[str, set[str]] = {}
    for modality in modalities:
        folder = root / split / modality
        if not folder.is_dir():
            present = sorted(entry.name for entry in (root / split).iterdir() if entry.is_dir())
            raise data_error(
                folder,
                expected="a folder of this modality",
                actual=f"only {', '.join(present) or 'nothing'}",
                remedy="Correct the list of modalities, or prepare the data with this one.",
            )
        with os.scandir(folder) as entries:
            names[modality] = {entry.name for entry in entries if not entry.name.startswith(".")}
    everything = set().union(*names.values())
    if not everything:
        raise data_error(
            root / split,
            expected="samples",
            actual="none",
            remedy="Prepare more data, or split it with other fractions.",
        )
    for modality in modalities:
        lacking = sorted(everything - names[modality])
        if lacking:
            holder = next(other for other in modalities if lacking[0] in names[other])
            raise data_error(
                root / split / modality / lacking[0],
                expected=f"the same samples as in {holder}",
                actual=f"no sample {lacking[0]} ({len(lacking)} of {len(everything)} are missing here)",
                remedy="Prepare the data again, or remove these samples from the other modalities.",
            )
    return sorted(everything)


def read_pairs(root: Path) -> dict[str, tuple[str, int, int]]:
    """pid → (video, reference frame, successor frame), counted from 1; {} without pairs.csv. Raises DataError."""
    path = root / "pairs.csv"
    if not path.is_file():
        return {}
    try:
        with open(path, newline="") as file:
            return {
                row["pid"]: (row["video"], int(row["reference_frame"]), int(row["successor_frame"]))
                for row in csv.DictReader(file)
            }
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise data_error(
            path,
            expected="the columns pid, video, reference_frame, successor_frame",
            actual=f"{type(error).__name__}: {error}",
            remedy="Prepare the data again.",
        ) from error


def read_caption(path: Path) -> str:
    """The text of one captions file. Raises DataError."""
    try:
        return str(json.loads(path.read_text())["caption"])
    except (ValueError, KeyError, TypeError) as error:
        raise data_error(
            path, expected='{"caption": "…"}', actual=f"{type(error).__name__}: {error}", remedy=_BAD_TOKENS
        ) from error


def token_file(folder: Path) -> os.DirEntry:
    """The single file of a pid folder, whatever its name. Raises DataError for none or several."""
    try:
        with os.scandir(folder) as entries:
            files = [entry for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    except NotADirectoryError:
        files = []
    if len(files) != 1:
        found = ", ".join(sorted(entry.name for entry in files)) or "none"
        raise data_error(folder, expected="a folder with one file", actual=found, remedy=_BAD_TOKENS)
    return files[0]


__all__ = [
    "FORMAT",
    "SPLITS",
    "UNFINISHED",
    "DataError",
    "content_digest",
    "find_pids",
    "find_splits",
    "read_caption",
    "read_meta",
    "read_pairs",
    "require_meta",
    "token_file",
]
