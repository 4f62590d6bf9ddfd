"""Lays out tokenised videos as samples: numbers them, writes a folder per modality and sample, splits, moves them."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from m4.data.errors import data_error
from m4.data.files import write_atomically
from m4.data.layout import SPLITS
from m4.data.options import BINS, PrepareOptions
from m4.data.split import split_output_dataset
from m4.data.tokenise import SHAPES
from m4.data.tokenizers import make_tokenizer

VIDEOS = ".videos"  # folder of finished videos below the output
FRACTIONS = (0.8, 0.1, 0.1)
_FORMAT = "m4-tokens-v1"
_STAGE = ".stage"
_MAX_PAIRS = 1_000_000  # sample names have six digits


def video_path(done: Path, name: str) -> Path:
    """Where the tokens of video ``name`` lie."""
    return done / f"{name}.npz"


def pack_video(arrays: dict[str, np.ndarray]) -> bytes:
    """The arrays as an .npz file that, unlike numpy's own, does not carry the time of writing."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())
    return buffer.getvalue()


@contextmanager
def locked(done: Path) -> Iterator[None]:
    """Holds the output for one process; the lock falls with the process, however it ends."""
    with open(done / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def assemble(out: Path, options: PrepareOptions, names: list[str]) -> tuple[dict, bool]:
    """Lay out the videos ``names`` (in this order) below ``out``; return meta.json's content and whether it is new.

    A layout of the same videos that stands already is left alone. Raises DataError if there is no pair at all.
    """
    done = out / VIDEOS
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode())
        digest.update(hashlib.sha256(video_path(done, name).read_bytes()).digest())
    content = digest.hexdigest()
    meta_path = out / "meta.json"
    if meta_path.exists():
        meta = json.loads(meta_path.read_text())
        if meta.get("content") == content and all((out / split).is_dir() for split in meta["splits"]):
            return meta, False
    stage = out / _STAGE
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    table = _write_samples(stage, done, options, names)
    (stage / "pairs.csv").write_bytes(table)
    splits = split_output_dataset(stage, FRACTIONS, options.seed, options.split_unit)
    meta = _meta(options, names, splits, content)
    # meta.json goes first and comes last: it marks the layout as whole.
    meta_path.unlink(missing_ok=True)
    for split in SPLITS:
        shutil.rmtree(out / split, ignore_errors=True)
        if (stage / split).is_dir():
            (stage / split).rename(out / split)
    write_atomically(out / "pairs.csv", table)
    write_atomically(meta_path, (json.dumps(meta, indent=1) + "\n").encode())
    shutil.rmtree(stage)
    return meta, True


def _write_samples(stage: Path, done: Path, options: PrepareOptions, names: list[str]) -> bytes:
    """Write ``{stage}/{modality}/{pid}/{file}`` for all pairs; return the content of pairs.csv."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("pid", "video", "reference_frame", "successor_frame"))
    number = 0
    for name in names:
        with np.load(video_path(done, name)) as arrays:
            columns = {key: arrays[key] for key in arrays.files}
        for row, (reference, successor) in enumerate(columns["pairs"].tolist()):
            pid = f"{number:06d}"
            table.writerow((pid, name, reference, successor))
            for modality in SHAPES:
                folder = stage / modality / pid
                folder.mkdir(parents=True)
                np.save(folder / f"{modality}.npy", columns[modality][row])
            if options.captions != "none":
                folder = stage / "captions" / pid
                folder.mkdir(parents=True)
                (folder / "captions.json").write_text(json.dumps({"caption": str(columns["captions"][row])}) + "\n")
            number += 1
    if not 0 < number <= _MAX_PAIRS:
        raise data_error(
            stage.parent,
            expected=f"1 to {_MAX_PAIRS} pairs in all videos",
            actual=number,
            remedy=f"Raise or lower --ssim-threshold (now {options.ssim_threshold}), or change the videos.",
        )
    return text.getvalue().encode()


def _meta(options: PrepareOptions, names: list[str], splits: dict[str, int], content: str) -> dict:
    tokenizer = make_tokenizer(options.tokenizer, options.cosmos_dir)
    sizes = {"coords": BINS, "coords_next": BINS}
    return {
        "format": _FORMAT,
        "options": options.record(),
        "tokenizer": {"id": tokenizer.id, "vocab_size": tokenizer.vocab_size},
        "modalities": {
            modality: {"shape": list(shape), "vocab_size": sizes.get(modality, tokenizer.vocab_size)}
            for modality, shape in SHAPES.items()
        },
        "fractions": list(FRACTIONS),
        "videos": len(names),
        "splits": splits,
        "content": content,
    }
