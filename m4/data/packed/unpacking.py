"""A packed data set as folders again, the layout in which data is exchanged."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np

from m4.bars import tqdm
from m4.data.checks import check_apart
from m4.data.layout import UNFINISHED
from m4.data.locking import LOCK, locked
from m4.data.packed.check import Cache, tokens_of, verify
from m4.data.packed.index import Index, is_packed, read_index
from m4.data.packed.samples import Samples, split_samples
from m4.errors import data_error
from m4.files import writable_folder, write_atomically

_BLOCK = 2**12  # rows read at once


def unpack(root: Path, out: Path, progress: bool = True) -> dict[str, int]:
    """Write ``{out}/{split}/{modality}/{pid}/{file}``, captions, pairs.csv and meta.json; the samples of each split.

    Token files have the shape and dtype of the first file that was packed. Until all is written readers refuse ``out``,
    and the same call goes on with it. Raises DataError for a damaged data set, or an ``out`` that holds something else.
    """
    if not is_packed(root):
        raise data_error(root, expected="a packed data set", actual="none", remedy="Check the path.")
    check_apart(out, root)
    index = read_index(root)
    verify(root, index, Cache(root))
    marker, mark = out / UNFINISHED, f"unpack {index.digest}\n".encode()
    ours = marker.is_file() and marker.read_bytes() == mark
    if not ours and out.is_dir() and any(entry.name != LOCK for entry in out.iterdir()):
        raise data_error(
            out, expected="an empty folder", actual="one that holds something else", remedy="Choose another --out."
        )
    writable_folder(out)
    with locked(out / LOCK, str(out)):
        write_atomically(marker, mark)
        everyone = Samples()
        for split in index.splits:
            samples = split_samples(root, index, split)
            _write_split(root, out, index, split, samples, progress)
            everyone.extend(samples)
        table = _pairs(everyone)
        if table is not None:
            write_atomically(out / "pairs.csv", table)
        if index.meta:
            write_atomically(out / "meta.json", (json.dumps(index.meta, indent=1) + "\n").encode())
        marker.unlink()
    return {split: rows.rows for split, rows in index.splits.items()}


def _write_split(root: Path, out: Path, index: Index, split: str, samples: Samples, progress: bool) -> None:
    tokens = tokens_of(root, index, split)
    ends = np.cumsum([column.length for column in index.columns])[:-1]
    bar = tqdm(
        total=len(tokens),
        desc=f"unpack {split}",
        unit="sample",
        disable=not progress,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )
    with bar:
        for start in range(0, len(tokens), _BLOCK):
            block = np.asarray(tokens[start : start + _BLOCK])
            for column, part in zip(index.columns, np.split(block, ends, axis=1), strict=True):
                for name, row in zip(samples.names[start : start + _BLOCK], part.astype(column.dtype), strict=True):
                    folder = out / split / column.name / name
                    folder.mkdir(parents=True, exist_ok=True)
                    np.save(folder / f"{column.name}.npy", row.reshape(column.shape))
            for name, caption in list(zip(samples.names, samples.captions, strict=True))[start : start + _BLOCK]:
                if caption is not None:
                    folder = out / split / "captions" / name
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / "captions.json").write_text(json.dumps({"caption": caption}) + "\n")
            bar.update(len(block))


def _pairs(samples: Samples) -> bytes | None:
    """The content of pairs.csv; None where nothing is known of any sample."""
    every = sorted(zip(samples.names, samples.videos, samples.frames, strict=True), key=lambda sample: sample[0])
    rows = [(name, video, *frames) for name, video, frames in every if video is not None and frames is not None]
    if not rows:
        return None
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("pid", "video", "reference_frame", "successor_frame"))
    table.writerows(rows)
    return text.getvalue().encode()
