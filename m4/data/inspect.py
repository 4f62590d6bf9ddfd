"""Statistics of a prepared data set, and a contact sheet of decoded frames with their skeletons."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from m4.data.errors import data_error
from m4.data.framing import CANVAS
from m4.data.layout import TokenReader, find_pids, find_splits, token_file
from m4.data.options import BINS
from m4.data.tokenise import SHAPES
from m4.data.tokenizers import make_tokenizer
from m4.viz import contact_sheet, draw_skeleton
from m4kernels import dequantize_coords


def read_split(root: Path, split: str, modalities: list[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Sample names and the tokens of each modality, int64 (N, length)."""
    pids = find_pids(root, split, modalities)
    tokens = {}
    for modality in modalities:
        reader = TokenReader(int(np.prod(SHAPES[modality])))
        rows = [reader.read(token_file(root / split / modality / pid).path) for pid in pids]
        tokens[modality] = np.stack(rows).astype(np.int64)
    return pids, tokens


def statistics(root: str | os.PathLike) -> str:
    """Counts per split and modality, token usage, joint ranges and visibility, as text.

    Raises DataError for a root without data or a sample that cannot be read.
    """
    root = Path(root)
    lines = [f"{root}"]
    for split in find_splits(root):
        modalities = _token_modalities(root, split)
        pids, tokens = read_split(root, split, modalities)
        lines.append(f"{split}: {len(pids)} samples")
        for modality in modalities:
            values = tokens[modality]
            lines.append(f"  {modality}: {_usage(values)}")
            if modality.startswith("coords"):
                lines.append(f"    {_joints(values)}")
    meta = _meta(root)
    if meta:
        lines.append(f"prepared with {', '.join(f'{key} {value}' for key, value in meta['options'].items())}")
    return "\n".join(lines)


def draw_sheet(root: str | os.PathLike, samples: int = 12, cosmos_dir: str | None = None) -> Image.Image:
    """Decoded reference and successor of evenly spaced samples of the first split, with their skeletons."""
    root = Path(root)
    split = find_splits(root)[0]
    modalities = list(SHAPES)
    pids, tokens = read_split(root, split, modalities)
    chosen = np.unique(np.linspace(0, len(pids) - 1, samples).astype(int))
    name = _meta(root).get("options", {}).get("tokenizer", "fsq")
    tokenizer = make_tokenizer(name, cosmos_dir)
    pictures = []
    for pixels, joints in (("tok_rgb", "coords"), ("tok_rgb_next", "coords_next")):
        images = tokenizer.decode(tokens[pixels][chosen].reshape(-1, *SHAPES[pixels]))
        xy, visible = dequantize_coords(torch.from_numpy(tokens[joints][chosen]), canvas=float(CANVAS), bins=BINS)
        poses = zip(images, xy.numpy(), visible.numpy(), strict=True)
        pictures.append([draw_skeleton(image, *pose) for image, *pose in poses])
    rows = list(zip(*pictures, strict=True))
    return contact_sheet(rows, ("reference", "next"), columns=3 if len(rows) >= 3 else 1)


def _meta(root: Path) -> dict:
    path = root / "meta.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise data_error(path, expected="JSON", actual=str(error), remedy="Prepare the data again.") from error


def _token_modalities(root: Path, split: str) -> list[str]:
    present = [modality for modality in SHAPES if (root / split / modality).is_dir()]
    if not present:
        raise data_error(
            root / split, expected=f"some of {', '.join(SHAPES)}", actual="none", remedy="Prepare the data again."
        )
    return present


def _usage(values: np.ndarray) -> str:
    _, counts = np.unique(values, return_counts=True)
    share = counts / counts.sum()
    entropy = float(-(share * np.log(share)).sum())
    return (
        f"{values.shape[1]} tokens each, ids {values.min()} … {values.max()}, {len(counts)} different, "
        f"entropy {entropy:.2f} nats"
    )


def _joints(values: np.ndarray) -> str:
    xy, visible = dequantize_coords(torch.from_numpy(values), canvas=float(CANVAS), bins=BINS)
    if not visible.any():
        return "no joint visible"
    low, high = xy[visible].min(0).values.tolist(), xy[visible].max(0).values.tolist()
    share = float(visible.float().mean())
    return f"visible {share:.0%}, x {low[0]:.1f} … {high[0]:.1f}, y {low[1]:.1f} … {high[1]:.1f} px"
