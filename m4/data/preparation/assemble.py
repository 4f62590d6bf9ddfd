"""Lays out tokenised videos as samples: numbers them, writes a folder per modality and sample, splits, moves them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m4.data.checks import MAX_NAME
from m4.data.layout import FORMAT, SPLITS, UNFINISHED, content_digest, read_meta
from m4.data.progress import shown
from m4.data.split import FRACTIONS, divide
from m4.errors import DataError, data_error
from m4.files import write_atomically
from m4.modalities import TABLE, TOKEN_SHAPES

VIDEOS = ".videos"  # folder of finished videos below the output
_STAGE = ".stage"
_MAX_PAIRS = 1_000_000  # sample names have six digits


def work_path(done: Path, name: str, ending: str) -> Path:
    """Where the work on video ``name`` lies; names that would make no file name with the ending are digested."""
    written = os.fsencode(name)
    try:
        written.decode()
    except UnicodeDecodeError:
        return done / f"{hashlib.sha256(written).hexdigest()}{ending}"
    return done / f"{name if len(written) <= MAX_NAME else hashlib.sha256(written).hexdigest()}{ending}"


def video_path(done: Path, name: str) -> Path:
    """Where the tokens of video ``name`` lie."""
    return work_path(done, name, ".npz")


def pack_video(arrays: dict[str, np.ndarray]) -> bytes:
    """The arrays as an .npz file that, unlike numpy's own, does not carry the time of writing."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())
    return buffer.getvalue()


def load_video(path: Path) -> dict[str, np.ndarray]:
    """The arrays that `pack_video` packed. Raises DataError for a damaged file, FileNotFoundError for none."""
    try:
        with np.load(path) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise data_error(
            path,
            expected="the tokens of a video",
            actual=f"a damaged file ({error})",
            remedy="Run python -m m4.data prepare again: it makes this video anew.",
        ) from error


def assemble(
    out: Path, record: dict, tokenizer: dict, names: list[str], fractions: Sequence[float] = FRACTIONS
) -> tuple[dict, bool]:
    """Lay out the videos ``names`` (in this order) below ``out``; return meta.json's content and whether it is new.

    record: the options as PrepareOptions.record gives them; tokenizer: meta.json's entry of that name. A layout of the
    same videos that stands already is left alone, or divided anew where that is all that changed. Raises DataError if
    there is no pair at all. The caller holds the lock of ``out``.
    """
    done = out / VIDEOS
    digest = videos_digest(done, names)
    meta = {} if (out / UNFINISHED).exists() else read_meta(out)
    if meta.get("videos_digest") == digest and all((out / split).is_dir() for split in meta["splits"]):
        if meta["options"] == record and meta["fractions"] == list(fractions):
            return meta, False
        divide(out, fractions, record["seed"], record["split_unit"])
        return read_meta(out), True
    stage = out / _STAGE
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    table, content = _write_samples(stage, done, record, names)
    (stage / "pairs.csv").write_bytes(table)
    splits = divide(stage, fractions, record["seed"], record["split_unit"])
    meta = {
        **meta_of(record, tokenizer, names, splits, fractions),
        "content": content,
        "videos_digest": digest,
    }
    _move_into_place(out, stage, table, meta)
    return meta, True


def _move_into_place(out: Path, stage: Path, table: bytes, meta: dict) -> None:
    """Exchange the layout: whole folders are renamed, and readers refuse the root until meta.json is there again."""
    write_atomically(out / UNFINISHED, b"prepare\n")
    (out / "meta.json").unlink(missing_ok=True)
    # First all that was there goes, so that splits of two layouts never stand together.
    old = stage / "old"
    old.mkdir()
    for split in SPLITS:
        if (out / split).is_dir():
            (out / split).rename(old / split)
    for split in SPLITS:
        if (stage / split).is_dir():
            (stage / split).rename(out / split)
    write_atomically(out / "pairs.csv", table)
    write_atomically(out / "meta.json", (json.dumps(meta, indent=1) + "\n").encode())
    (out / UNFINISHED).unlink()
    shutil.rmtree(stage)


def _write_samples(stage: Path, done: Path, record: dict, names: list[str]) -> tuple[bytes, str]:
    """Write ``{stage}/{modality}/{pid}/{file}`` for all pairs; return the content of pairs.csv and their digest."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("pid", "video", "reference_frame", "successor_frame"))
    digests: dict[tuple[str, str], bytes] = {}

    def write(modality: str, pid: str, file: str, content: bytes) -> None:
        folder = stage / modality / pid
        folder.mkdir(parents=True)
        (folder / file).write_bytes(content)
        digests[modality, pid] = hashlib.sha256(content).digest()

    number = 0
    for name in shown(names, "laying out", "video"):
        columns = load_video(video_path(done, name))
        for row, (reference, successor) in enumerate(columns["pairs"].tolist()):
            pid = f"{number:06d}"
            table.writerow((pid, name, reference, successor))
            for modality in TOKEN_SHAPES:
                buffer = io.BytesIO()
                np.save(buffer, columns[modality][row])
                write(modality, pid, f"{modality}.npy", buffer.getvalue())
            if record["captions"] != "none":
                caption = json.dumps({"caption": str(columns["captions"][row])}) + "\n"
                write("captions", pid, "captions.json", caption.encode())
            number += 1
    if not 0 < number <= _MAX_PAIRS:
        raise no_pairs(stage.parent, f"1 to {_MAX_PAIRS} pairs", number, record)
    content = text.getvalue().encode()
    digests["pairs.csv", ""] = hashlib.sha256(content).digest()
    return content, content_digest(digests)


def videos_digest(done: Path, names: list[str]) -> str:
    """SHA-256 of the finished videos ``names``, in this order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode())
        digest.update(hashlib.sha256(video_path(done, name).read_bytes()).digest())
    return digest.hexdigest()


def no_pairs(out: Path, expected: str, number: int, record: dict) -> DataError:
    """The error for too few pairs, or too many."""
    return data_error(
        out,
        expected=f"{expected} in all videos",
        actual=number,
        remedy=f"Raise or lower --ssim-threshold (now {record['ssim_threshold']}), or change the videos.",
    )


def meta_of(
    record: dict, tokenizer: dict, names: list[str], splits: dict[str, int], fractions: Sequence[float]
) -> dict:
    """The content of meta.json but for digests."""

    def vocab_size(name: str) -> int:
        return tokenizer["vocab_size"] if TABLE[name].kind == "image" else TABLE[name].vocab_size

    return {
        "format": FORMAT,
        "options": record,
        "tokenizer": tokenizer,
        "modalities": {
            name: {"shape": list(shape), "vocab_size": vocab_size(name)} for name, shape in TOKEN_SHAPES.items()
        },
        "fractions": list(fractions),
        "videos": len(names),
        "splits": splits,
    }
