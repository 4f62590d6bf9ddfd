"""Statistics of a prepared data set: counts, tokens, joints, captions, duplicates and leaks.

Works on any root in the token layout; what only ``python -m m4.data prepare`` writes (pairs.csv, meta.json) is used
where it is there, and missed aloud where it is not.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from m4.data import layout
from m4.data.layout import content_digest, find_pids, find_splits, read_caption, read_meta, token_file
from m4.data.packed.index import is_packed, read_index
from m4.data.packed.samples import read_samples, split_samples
from m4.data.penn_action import JOINTS
from m4.data.reading import MAX_VOCAB, read_rows
from m4.data.store import open_store
from m4.errors import DataError, data_error
from m4.modalities import BINS, CANVAS, TABLE, TOKEN_SHAPES, Modality, RowLayout, data_vocab_size
from m4kernels import dequantize_coords

_BARS = " ▁▂▃▄▅▆▇█"
_HISTOGRAM_BINS = 40
_NOT_KNOWN = "Statistics are of modalities that m4.modalities knows."


@dataclass(frozen=True, eq=False)
class Split:
    """One split: names of its samples and the tokens of each modality, int64 (N, length), in their order."""

    name: str
    pids: list[str]
    tokens: dict[str, np.ndarray]
    notes: dict[str, list[str]]
    captions: list[str] | None


def read_split(root: Path, split: str, modalities: list[str]) -> Split:
    """A split with all its tokens. Raises DataError for a sample that cannot be read."""
    pids = find_pids(root, split, modalities)
    tokens, notes = {}, {}
    for modality in modalities:
        paths = [token_file(root / split / modality / pid).path for pid in pids]
        tokens[modality], notes[modality] = read_rows(root, modality, paths, TABLE[modality].length)
    captions = None
    if (root / split / "captions").is_dir():
        find_pids(root, split, [modalities[0], "captions"])
        captions = [read_caption(Path(token_file(root / split / "captions" / pid).path)) for pid in pids]
    return Split(split, pids, tokens, notes, captions)


def read_all(root: Path) -> list[Split]:
    """Every split that is there. Raises DataError for a root without data or a sample that cannot be read."""
    if is_packed(root):
        return [_read_packed(root, split) for split in find_splits(root)]
    return [read_split(root, split, _token_modalities(root, split)) for split in find_splits(root)]


def _read_packed(root: Path, split: str) -> Split:
    index = read_index(root)
    known = [c.name for c in index.columns if c.name in TOKEN_SHAPES and c.length == TABLE[c.name].length]
    if not known:
        names = ", ".join(f"{c.name} of {c.length}" for c in index.columns)
        raise data_error(root, expected=f"some of {', '.join(TOKEN_SHAPES)}", actual=names, remedy=_NOT_KNOWN)
    store = open_store(root, split, known, [MAX_VOCAB] * len(known), [TABLE[name].length for name in known])
    spans = RowLayout(tuple(known), tuple(TABLE[name].length for name in known), (MAX_VOCAB,) * len(known))
    tokens = {name: store.tokens[:, spans.span(name)].astype(np.int64) for name in known}
    notes: dict[str, list[str]] = {name: [] for name in known}
    for name, _, note in (text.partition(": ") for text in dict.fromkeys(n for s in index.shards for n in s.notes)):
        if name in notes:
            notes[name].append(note)
    samples = split_samples(root, index, split)
    captions = [caption for caption in samples.captions if caption is not None]
    return Split(split, samples.names, tokens, notes, captions if len(captions) == len(store) else None)


def read_pairs(root: Path) -> dict[str, tuple[str, int, int]]:
    """pid → (video, reference frame, successor frame), counted from 1; {} where that is not recorded."""
    if not is_packed(root):
        return layout.read_pairs(root)
    samples = read_samples(root, read_index(root))
    every = zip(samples.names, samples.videos, samples.frames, strict=True)
    return {name: (video, frames[0], frames[1]) for name, video, frames in every if video is not None and frames}


def statistics(root: str | os.PathLike) -> str:
    """Everything there is to say without the frames, as text. Raises DataError as `read_all` does."""
    root = Path(root)
    return describe(root, read_all(root))


def describe(root: Path, splits: list[Split]) -> str:
    """`statistics` of splits that have been read."""
    meta = read_meta(root)
    pairs = read_pairs(root)
    lines = [f"{root}"]
    for split in splits:
        videos = {pairs[pid][0] for pid in split.pids if pid in pairs}
        lines.append(f"{split.name}: {len(split.pids)} samples" + (f" of {len(videos)} videos" if videos else ""))
        for name, values in split.tokens.items():
            modality = TABLE[name]
            lines.append(f"  {name}: {_usage(values, modality, data_vocab_size(name, meta))}")
            if modality.kind == "joints":
                lines += [f"    {line}" for line in _joints(values)]
            lines += [f"    note: {note}" for note in split.notes[name]]
        if split.captions is not None:
            lines.append(f"  captions: {_captions(split.captions)}")
    lines += _duplicates(splits, pairs)
    if is_packed(root):
        lines.append(
            f"content: {read_index(root).digest[:16]}, packed; the digests of all files are those of its index"
        )
    elif meta:
        lines.append(_fingerprint(root, splits, meta))
    if meta:
        lines.append(f"prepared with {', '.join(f'{key} {value}' for key, value in meta['options'].items())}")
    return "\n".join(lines)


def _token_modalities(root: Path, split: str) -> list[str]:
    present = [modality for modality in TOKEN_SHAPES if (root / split / modality).is_dir()]
    if not present:
        raise data_error(
            root / split, expected=f"some of {', '.join(TOKEN_SHAPES)}", actual="none", remedy="Prepare the data again."
        )
    return present


def _usage(rows: np.ndarray, modality: Modality, vocabulary: int) -> str:
    values = np.delete(rows, modality.visibility, axis=1)  # which is counted by itself
    ids, counts = np.unique(values, return_counts=True)
    share = counts / counts.sum()
    entropy = float(-(share * np.log(share)).sum())
    commonest = int(counts.argmax())
    unused = vocabulary - int((ids < vocabulary).sum())
    size = max(vocabulary, int(ids.max()) + 1)
    bars = np.histogram(values, bins=_HISTOGRAM_BINS, range=(0, size))[0]
    heights = np.ceil(bars / bars.max() * (len(_BARS) - 1)).astype(int)
    return (
        f"{rows.shape[1]} tokens each, ids {ids[0]} … {ids[-1]}, {len(ids):,} different, {unused:,} of "
        f"{vocabulary:,} unused, entropy {entropy:.2f} nats, commonest {ids[commonest]} ({share[commonest]:.1%})\n"
        f"    |{''.join(_BARS[height] for height in heights)}| histogram over 0 … {size - 1}"
    )


def _joints(values: np.ndarray) -> list[str]:
    xy, visible = dequantize_coords(torch.from_numpy(values), canvas=float(CANVAS), bins=BINS)
    if not visible.any():
        return ["no joint visible"]
    low, high = xy[visible].min(0).values.tolist(), xy[visible].max(0).values.tolist()
    shares = visible.float().mean(0)
    each = ", ".join(f"{name} {share:.0%}" for name, share in zip(JOINTS, shares.tolist(), strict=True))
    hidden = int((~visible).all(1).sum())
    return [
        f"visible {float(visible.float().mean()):.0%}, x {low[0]:.1f} … {high[0]:.1f}, y {low[1]:.1f} … {high[1]:.1f} "
        f"px" + (f"; no joint visible in {hidden} samples" if hidden else ""),
        f"visible by joint: {each}",
    ]


def _captions(captions: list[str]) -> str:
    counts = Counter(captions)
    commonest, number = counts.most_common(1)[0]
    words = np.array([len(caption.split()) for caption in captions])
    return (
        f"{len(counts)} different, {words.min()} … {words.max()} words, {sum(not text.strip() for text in captions)} "
        f"empty; commonest ({number}): {commonest!r}"
    )


def _duplicates(splits: list[Split], pairs: dict[str, tuple[str, int, int]]) -> list[str]:
    """Samples and videos that are there twice, and what is in more than one split."""
    lines = []
    repeated_pids = sorted(pid for pid, count in Counter(pid for s in splits for pid in s.pids).items() if count > 1)
    if repeated_pids:
        lines.append(f"WARNING: {len(repeated_pids)} pids are in more than one split, such as {repeated_pids[0]}")
    samples: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    videos: dict[str, dict[str, list[bytes]]] = defaultdict(lambda: defaultdict(list))
    for split in splits:
        rows = np.concatenate(list(split.tokens.values()), axis=1)
        for pid, row in zip(split.pids, rows, strict=True):
            digest = hashlib.sha256(row.tobytes()).digest()
            samples[digest].append((split.name, pid))
            if pid in pairs:
                videos[pairs[pid][0]][split.name].append(digest)
    twice = [places for places in samples.values() if len(places) > 1]
    across = [places for places in twice if len({split for split, _ in places}) > 1]
    lines.append(
        f"duplicates: {sum(len(places) - 1 for places in twice)} samples are copies of another"
        + (f", such as {' and '.join(pid for _, pid in twice[0][:2])}" if twice else "")
    )
    if across:
        (first, pid), (second, other) = across[0][0], next(place for place in across[0] if place[0] != across[0][0][0])
        lines.append(f"WARNING: {len(across)} samples are in two splits, such as {first}/{pid} = {second}/{other}")
    if not pairs:
        return [*lines, "videos: no pairs.csv, so nothing is known of which samples share a video"]
    leaked = sorted(video for video, by_split in videos.items() if len(by_split) > 1)
    by_content: dict[bytes, list[str]] = defaultdict(list)
    for video, by_split in videos.items():
        by_content[b"".join(digest for digests in by_split.values() for digest in digests)].append(video)
    copies = [names for names in by_content.values() if len(names) > 1]
    lines.append(
        f"videos: {len(videos)}, {sum(len(names) - 1 for names in copies)} copies of another"
        + (f" such as {' = '.join(copies[0][:2])}" if copies else "")
        + f", {len(leaked)} in more than one split"
        + (f" such as {leaked[0]}; split with --unit video to keep them apart" if leaked else "")
    )
    unknown = [pid for split in splits for pid in split.pids if pid not in pairs]
    if unknown:
        lines.append(f"WARNING: {len(unknown)} samples are not in pairs.csv, such as {unknown[0]}")
    return lines


def _fingerprint(root: Path, splits: list[Split], meta: dict) -> str:
    """Whether the files are those that ``prepare`` wrote."""
    if "content" not in meta or "videos_digest" not in meta:
        return "content: prepared before fingerprints were kept"
    digests = {}
    for split in splits:
        modalities = [*split.tokens, *(["captions"] if split.captions is not None else [])]
        for modality in modalities:
            for pid in split.pids:
                content = Path(token_file(root / split.name / modality / pid).path).read_bytes()
                digests[modality, pid] = hashlib.sha256(content).digest()
    if (root / "pairs.csv").is_file():
        digests["pairs.csv", ""] = hashlib.sha256((root / "pairs.csv").read_bytes()).digest()
    if content_digest(digests) == meta["content"]:
        return f"content: {meta['content'][:16]}, as meta.json says"
    return "WARNING: content differs from what meta.json says: samples were changed, added or removed since"


__all__ = ["DataError", "Split", "describe", "read_all", "read_pairs", "read_split", "statistics"]
