"""What the tokens of a modality mean: one table, and where each modality stands in a row of tokens.

A run names its modalities and their lengths; the table says what ours are. A name that is not in the table, or has a
length there that its shape does not allow (an image of other than 16x16 codes, joints that are no three rows), is
plain: ``max_seq_len`` categorical tokens, of which nothing is known but their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

CANVAS = 256  # pixels: the side of the square that images and joints share
IMAGE_GRID = 16  # codes along each side of an image
# The finite scalar quantisation of Cosmos-0.1-Tokenizer-DI16x16, which all image tokenizers share: a code is the
# mixed-radix number of six levels, the first changing fastest.
IMAGE_LEVELS = (8, 8, 8, 5, 5, 5)
IMAGE_CODES = math.prod(IMAGE_LEVELS)
JOINTS = (
    "head",
    "left shoulder",
    "right shoulder",
    "left elbow",
    "right elbow",
    "left wrist",
    "right wrist",
    "left hip",
    "right hip",
    "left knee",
    "right knee",
    "left ankle",
    "right ankle",
)
NUM_JOINTS = len(JOINTS)
BINS = 8192  # of joint coordinates, per axis
VISIBILITIES = 2  # ids of a joint's visibility: 0 hidden, 1 visible


@dataclass(frozen=True)
class Modality:
    """What one sample of a modality is.

    kind: "image", a grid of codes; "joints", the rows x, y (bins, an ordinal scale) and visibility (0 or 1); "text",
    stored as text and not tokenised here; "plain", categorical tokens. shape: of the tokens, () for text. vocab_size:
    of the data that m4.data prepares (of joints the bins), 0 where nothing is known.
    """

    name: str
    kind: Literal["image", "joints", "text", "plain"]
    shape: tuple[int, ...]
    vocab_size: int = 0

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return math.prod(self.shape) if self.shape else 0

    @property
    def coordinates(self) -> slice:
        """Which of a sample's tokens are steps of a scale: x and y of joints, else none."""
        return slice(0, self.length // 3 * 2 if self.kind == "joints" else 0)

    @property
    def visibility(self) -> slice:
        """Which of a sample's tokens say whether a joint is visible: none but for joints."""
        return slice(self.length // 3 * 2 if self.kind == "joints" else self.length, self.length)


def _image(name: str) -> Modality:
    return Modality(name, "image", (IMAGE_GRID, IMAGE_GRID), IMAGE_CODES)


def _joints(name: str) -> Modality:
    return Modality(name, "joints", (3, NUM_JOINTS), BINS)


# A moment is an image and the joints in it. M4 predicts the next moment from the reference moment, name by name.
REFERENCE, NEXT = ("tok_rgb", "coords"), ("tok_rgb_next", "coords_next")
SUCCESSORS = dict(zip(REFERENCE, NEXT, strict=True))
TABLE: dict[str, Modality] = {
    modality.name: modality
    for modality in (
        *(make(name) for moment in (REFERENCE, NEXT) for make, name in zip((_image, _joints), moment, strict=True)),
        Modality("captions", "text", ()),
    )
}
_OTHER_SIDE = {"left": "right", "right": "left"}
# Which joint of a pose becomes each joint of the mirrored pose: left and right change places.
MIRRORED_JOINTS = tuple(JOINTS.index(" ".join(_OTHER_SIDE.get(word, word) for word in name.split())) for name in JOINTS)
# Labels put a hidden joint of which nothing is known at the origin, within so many pixels of it on either axis.
NO_POSITION = 2
TOKEN_SHAPES = {name: modality.shape for name, modality in TABLE.items() if modality.kind != "text"}


def modality_of(name: str, length: int) -> Modality:
    """The modality ``name`` of a run that gives it ``length`` tokens a sample."""
    known = TABLE.get(name)
    if known is not None and known.length == length:
        return known
    if known is not None and known.kind == "joints" and length > 0 and length % 3 == 0:
        return replace(known, shape=(3, length // 3))
    return Modality(name, "plain", (length,))


def mirror_image(tokens: Tensor, codes: Tensor) -> Tensor:
    """The tokens of images mirrored left to right: columns reversed, each code mirrored.

    Args:
        tokens: int64 (…, 256).
        codes: int64 (C,), what the image tokenizer makes of each code's block mirrored (`m4.data.tokenizers`).
    """
    return codes[tokens.unflatten(-1, (IMAGE_GRID, IMAGE_GRID)).flip(-1)].flatten(-2)


def mirror_joints(tokens: Tensor, bins: int) -> Tensor:
    """The tokens of poses mirrored left to right, int64 (…, 3·13): x to bins − 1 − x, left and right joints exchanged.

    A hidden joint at the origin (`NO_POSITION`) stays there, as it would in the label of the mirrored video. The result
    is `quantize_coords` of the mirrored coordinates, but for those exactly between two bins: with 8,192 bins, rounding
    half to even takes such a coordinate and its mirror image to bins that are one off from mirrored.
    """
    rows = tokens.unflatten(-1, (3, NUM_JOINTS))
    x, y, visible = torch.stack([rows[..., joint] for joint in MIRRORED_JOINTS], dim=-1).unbind(-2)
    corner = NO_POSITION * (bins - 1) // CANVAS
    nowhere = (visible == 0) & (x <= corner) & (y <= corner)
    return torch.stack([torch.where(nowhere, x, bins - 1 - x), y, visible], dim=-2).flatten(-2)


def data_vocab_size(name: str, meta: Mapping[str, Any]) -> int:
    """Ids of a modality in data with this meta.json (``{}`` for data without): what it says, else the table's, else 0.

    Of joints the bins.
    """
    recorded = meta.get("modalities", {}).get(name)
    if recorded is not None:
        return recorded["vocab_size"]
    return TABLE[name].vocab_size if name in TABLE else 0


class HasModalities(Protocol):
    """A configuration that names modalities: `m4.config.TrainConfig`, `m4.model.ModelConfig`."""

    @property
    def modalities(self) -> Sequence[str]: ...

    @property
    def max_seq_lens(self) -> Sequence[int]: ...

    @property
    def vocab_sizes(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class RowLayout:
    """A row of L = Σ max_seq_lens tokens, modality after modality.

    Args:
        modalities: names, in the order of the row.
        max_seq_lens: tokens of each.
        vocab_sizes: ids of each that a model knows.
    Raises:
        ValueError: the three differ in length, or a name stands twice.
    """

    modalities: tuple[str, ...]
    max_seq_lens: tuple[int, ...]
    vocab_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = len(self.modalities), len(self.max_seq_lens), len(self.vocab_sizes)
        if len(set(sizes)) > 1 or len(set(self.modalities)) < len(self.modalities):
            raise ValueError(
                f"modalities {list(self.modalities)}: expected different names, each with a length and a vocabulary; "
                f"got {sizes[0]} names, {sizes[1]} max_seq_lens, {sizes[2]} vocab_sizes"
            )

    @classmethod
    def of(cls, config: HasModalities) -> RowLayout:
        """The layout of a run's rows."""
        return cls(tuple(config.modalities), tuple(config.max_seq_lens), tuple(config.vocab_sizes))

    @property
    def length(self) -> int:
        """L."""
        return sum(self.max_seq_lens)

    @cached_property
    def described(self) -> tuple[Modality, ...]:
        """What each modality is, in order."""
        return tuple(modality_of(*pair) for pair in zip(self.modalities, self.max_seq_lens, strict=True))

    def __getitem__(self, name: str) -> Modality:
        """What the modality ``name`` of this row is. Raises KeyError for a name that the row does not have."""
        return self.described[self._index(name)]

    def span(self, name: str) -> slice:
        """Where in the row the modality's tokens are. Raises KeyError for a name that the row does not have."""
        index = self._index(name)
        start = sum(self.max_seq_lens[:index])
        return slice(start, start + self.max_seq_lens[index])

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """`span` of every modality, in order."""
        return tuple(self.span(name) for name in self.modalities)

    @cached_property
    def bins(self) -> int:
        """Coordinates are ids below it, and visibilities too; 0 in a row without joints."""
        pairs = zip(self.described, self.vocab_sizes, strict=True)
        return min(BINS, max((size for modality, size in pairs if modality.kind == "joints"), default=0))

    def modality_ids(self) -> Tensor:
        """int64 (L,): each token's modality, an index into ``modalities``."""
        return torch.repeat_interleave(torch.arange(len(self.modalities)), torch.tensor(self.max_seq_lens))

    def positions(self) -> Tensor:
        """int64 (L,): each token's position in its modality."""
        return torch.cat([torch.arange(length) for length in self.max_seq_lens])

    def ordinal(self) -> Tensor:
        """bool (L,): where ids are steps of a scale, x and y of joints."""
        marks = torch.zeros(self.length, dtype=torch.bool)
        for modality, span in zip(self.described, self.spans, strict=True):
            marks[span][modality.coordinates] = True
        return marks

    def pictures(self) -> Tensor:
        """bool (L,): where ids are image codes."""
        marks = torch.zeros(self.length, dtype=torch.bool)
        for modality, span in zip(self.described, self.spans, strict=True):
            marks[span] = modality.kind == "image"
        return marks

    def id_limits(self, meta: Mapping[str, Any]) -> Tensor:
        """int64 (L,): the ids of data with this meta.json are below it; of visibility 2. At most the vocabulary."""
        limits = torch.empty(self.length, dtype=torch.int64)
        for modality, span, vocab_size in zip(self.described, self.spans, self.vocab_sizes, strict=True):
            limits[span] = min(vocab_size, data_vocab_size(modality.name, meta) or vocab_size)
            limits[span][modality.visibility] = min(vocab_size, VISIBILITIES)
        return limits

    def _index(self, name: str) -> int:
        if name not in self.modalities:
            raise KeyError(f"{name}: not among the modalities {', '.join(self.modalities)}")
        return self.modalities.index(name)
