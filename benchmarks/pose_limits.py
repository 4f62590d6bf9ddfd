"""`python -m benchmarks.pose_limits --data ROOT`: how well the next pose can be told from the reference pose alone.

A goal for a model of the next pose is worth what can be known. Here small networks (and nearest neighbours) see nothing
but the 13 joints of the reference moment, and nothing of the 4M way of doing it: what they reach on held-out videos is
there to be reached; what they do not, frames must tell, or nobody can.

- ``regression``: a network that regresses how far each joint moves, by the mean absolute error.
- ``by_tokens``: the same by a transformer with a token for each joint, as wide as that of M4-small.yaml. Tokens hold
  waves of where the joint is on the canvas (``places``, as M4's do), or of where it is in the pose (``relative``).
- ``neighbours``: the median way of the joints in the training pairs whose reference poses are most alike.
- ``information``: nats a token by which a network betters the histogram of displacements of each joint and axis. Both
  say only in which of some 30 classes of displacement a joint's is (not at all; else quantiles of the training set's),
  so that fine structure, such as the grid of labels, counts for neither; and whether a joint is visible.

Every figure is the best of some taken on the way on the held-out pairs themselves: rather too good than too bad.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.results import machine
from m4.arguments import CommandParser, whole
from m4.build import open_split
from m4.cli import run_command
from m4.config import TrainConfig
from m4.files import writable_file, write_atomically
from m4.modalities import BINS, CANVAS, NUM_JOINTS, RowLayout, mirror_joints

PIXEL = CANVAS / (BINS - 1)  # of a bin
COORDINATES = 2 * NUM_JOINTS
CLASSES = 32  # of displacement, at most, beside "not at all"
BATCH, LOOKS, WIDTH, BLOCKS, DROPOUT = 256, 6, 256, 3, 0.2
TOKEN_WIDTH, HEADS = 128, 4  # of the transformer, which has as many blocks
# Of waves of places, radians over half of the canvas: half a period to 16 over all of it; of relative places.
CANVAS_WAVES = tuple(math.pi * 2.0**octave for octave in range(-1, 5))
RELATIVE_WAVES = (4.0, 12.0)
NEIGHBOURS = (1, 4, 16, 64)


class Pairs(NamedTuple):
    """Reference and next poses, int64 (N, 39): x, y (bins), visibility."""

    reference: Tensor
    following: Tensor

    @property
    def moved(self) -> Tensor:
        """int64 (N, 26): bins."""
        return (self.following - self.reference)[:, :COORDINATES]

    @property
    def judged(self) -> Tensor:
        """bool (N, 13): visible in both."""
        return (self.reference[:, COORDINATES:] > 0) & (self.following[:, COORDINATES:] > 0)

    def error(self, moved: Tensor) -> float:
        """Mean distance in pixels to a prediction of how far joints move, (N, 26) pixels."""
        off = (moved - self.moved * PIXEL).unflatten(1, (2, NUM_JOINTS)).norm(dim=1)
        return float(off[self.judged].mean())

    def mirrored(self) -> Pairs:
        return Pairs(*(mirror_joints(pose, BINS) for pose in self))

    def take(self, chosen: Tensor) -> Pairs:
        return Pairs(*(pose[chosen] for pose in self))


def read_pairs(root: Path, split: str) -> Pairs:
    """All pairs of a split of prepared data."""
    config = TrainConfig()
    layout = RowLayout.of(config)
    store = open_split(config, root, split)
    rows = store.batch(np.arange(len(store))).long()
    return Pairs(rows[:, layout.span("coords")], rows[:, layout.span("coords_next")])


def described(pose: Tensor) -> Tensor:
    """float32 (N, 169): places on the canvas, visibility, and places relative to the visible joints' mean with two
    waves of them."""
    place, relative, visible = places(pose)
    parts = (place, visible[:, None], relative, *waves(relative, RELATIVE_WAVES))
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def places(pose: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32: where joints are on the canvas (N, 2, 13), -1 ... 1; relative to the visible joints' mean (N, 2, 13);
    visibility (N, 13)."""
    place, visible = pose[:, :COORDINATES].float() / (BINS - 1) * 2 - 1, pose[:, COORDINATES:].float()
    by_axis = place.unflatten(1, (2, NUM_JOINTS))
    middle = (by_axis * visible[:, None]).sum(2, keepdim=True) / visible.sum(1).clamp(min=1)[:, None, None]
    return by_axis, by_axis - middle, visible


def waves(place: Tensor, fast: Sequence[float]) -> list[Tensor]:
    """The sine and the cosine of each multiple of places."""
    return [wave(place * times) for times in fast for wave in (torch.sin, torch.cos)]


class Perceptron(nn.Module):
    """A multilayer perceptron with residual connections, which sees all joints at once; it starts at 0."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        inputs = COORDINATES * 6 + NUM_JOINTS
        last = _zero(WIDTH, outputs)
        self.layers = nn.Sequential(nn.Linear(inputs, WIDTH), *(_Block() for _ in range(BLOCKS)), last)

    def forward(self, pose: Tensor) -> Tensor:
        """(N, outputs) of poses (N, 39)."""
        return self.layers(described(pose))


def _zero(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that starts at 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide = 2 * WIDTH
        parts = (nn.LayerNorm(WIDTH), nn.Linear(WIDTH, wide), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(wide, WIDTH))
        self.change = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


def joint_tokens(pose: Tensor, relative: bool) -> Tensor:
    """float32 (N, 13, F), what the tokens of `Transformer` hold of poses (N, 39): places, waves and visibility."""
    place, in_pose, visible = places(pose)
    if relative:
        parts = [place, in_pose, *waves(in_pose, RELATIVE_WAVES)]
    else:
        parts = [place, *waves(place, CANVAS_WAVES)]
    return torch.cat([*parts, visible[:, None]], dim=1).transpose(1, 2)


class Transformer(nn.Module):
    """A transformer over a pose's joints, of which every one says how far it moves; it starts at 0.

    Args:
        relative: whether tokens hold waves of places relative to the middle of the pose, not of those on the canvas.
    """

    def __init__(self, relative: bool) -> None:
        super().__init__()
        self.relative = relative
        features = joint_tokens(torch.zeros(1, COORDINATES + NUM_JOINTS), relative).shape[-1]
        self.embed = nn.Linear(features, TOKEN_WIDTH)
        self.joints = nn.Parameter(0.5 * torch.randn(NUM_JOINTS, TOKEN_WIDTH))
        block = nn.TransformerEncoderLayer(
            TOKEN_WIDTH, HEADS, 4 * TOKEN_WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        last = nn.LayerNorm(TOKEN_WIDTH)
        self.blocks = nn.TransformerEncoder(block, BLOCKS, norm=last, enable_nested_tensor=False)
        self.moves = _zero(TOKEN_WIDTH, 2)

    def forward(self, pose: Tensor) -> Tensor:
        """(N, 26), x and y of all joints, of poses (N, 39)."""
        tokens = joint_tokens(pose, self.relative)
        return self.moves(self.blocks(self.embed(tokens) + self.joints)).transpose(1, 2).flatten(1)


def trained(
    model: nn.Module, loss: Callable[[nn.Module, Pairs], Tensor], train: Pairs, steps: int, batch: int
) -> Iterator[int]:
    """Train in random batches, every other one mirrored; yields the steps done, LOOKS times, in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    mirrored = train.mirrored()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        chosen = torch.randint(len(train.reference), (batch,))
        model.train()
        optimizer.zero_grad()
        loss(model, (mirrored if step % 2 else train).take(chosen)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) * LOOKS // steps > step * LOOKS // steps:
            model.eval()
            with torch.no_grad():
                yield step + 1


def regression(model: nn.Module, train: Pairs, held: Pairs, steps: int, batch: int) -> float:
    """Error in pixels of a network that regresses displacements (N, 26) from poses (N, 39)."""
    unit = 8.0  # pixels

    def loss(model: nn.Module, pairs: Pairs) -> Tensor:
        off = (model(pairs.reference) - pairs.moved * PIXEL / unit).abs()
        judged = pairs.judged.repeat(1, 2)
        return (off * judged).sum() / judged.sum().clamp(min=1)

    return min(held.error(model(held.reference) * unit) for _ in trained(model, loss, train, steps, batch))


def neighbours(train: Pairs, held: Pairs) -> float:
    """Error in pixels of the median displacement of the most alike training pairs; over the best of NEIGHBOURS."""
    known, moved = described(train.reference)[:, COORDINATES:], train.moved * PIXEL
    nearest = torch.cat(
        [
            torch.cdist(described(some)[:, COORDINATES:], known).topk(min(NEIGHBOURS[-1], len(known)), largest=False)[1]
            for some in held.reference.split(256)
        ]
    )
    return min(held.error(moved[nearest[:, :count]].median(dim=1).values) for count in NEIGHBOURS)


def information(train: Pairs, held: Pairs, steps: int, batch: int) -> dict[str, float]:
    """Nats a token, all 39 of them: of a network, and of the histogram of each joint and axis."""
    some = train.moved[train.moved != 0].float()
    some = some[torch.randperm(len(some))[:1_000_000]]
    edges = torch.quantile(some, torch.linspace(0, 1, CLASSES + 1)[1:-1]).unique()
    classes = len(edges) + 2

    def classed(moved: Tensor) -> Tensor:
        return torch.where(moved == 0, len(edges) + 1, torch.bucketize(moved.float(), edges))

    def nats(model: nn.Module, pairs: Pairs) -> Tensor:
        moves, visible = model(pairs.reference).split([COORDINATES * classes, NUM_JOINTS], dim=1)
        stays = 8 * (pairs.reference[:, COORDINATES:].float() - 0.5)
        of_moves = F.cross_entropy(
            moves.unflatten(1, (COORDINATES, classes)).flatten(0, 1), classed(pairs.moved).flatten(), reduction="sum"
        )
        of_visibility = F.binary_cross_entropy_with_logits(
            visible + stays, pairs.following[:, COORDINATES:].float(), reduction="sum"
        )
        return (of_moves + of_visibility) / pairs.reference.numel()

    def histogram(column: Tensor, held_column: Tensor, size: int) -> Tensor:
        counts = torch.bincount(column, minlength=size).double() + 0.5
        return -(counts / counts.sum()).log()[held_column].sum()

    baseline = torch.zeros((), dtype=torch.float64)
    train_classes, held_classes = classed(train.moved), classed(held.moved)
    for column in range(COORDINATES):
        baseline += histogram(train_classes[:, column], held_classes[:, column], classes)
    for column in range(COORDINATES, COORDINATES + NUM_JOINTS):
        for seen in (0, 1):
            of_train, of_held = train.reference[:, column] == seen, held.reference[:, column] == seen
            baseline += histogram(train.following[of_train, column], held.following[of_held, column], 2)
    model = Perceptron(COORDINATES * classes + NUM_JOINTS)
    best = min(float(nats(model, held)) for _ in trained(model, nats, train, steps, batch))
    of_histogram = float(baseline) / held.reference.numel()
    return {"network": best, "histogram": of_histogram, "better_by": of_histogram - best}


def limits(train: Pairs, held: Pairs, steps: int, batch: int = BATCH, seed: int = 0) -> dict[str, Any]:
    """All figures; error_px of copying is that of `m4.evaluate`."""
    torch.manual_seed(seed)
    error: dict[str, Any] = {
        "copying": held.error(torch.zeros(1, COORDINATES)),
        "regression": regression(Perceptron(COORDINATES), train, held, steps, batch),
        "neighbours": neighbours(train, held),
    }
    nats = information(train, held, steps, batch)
    by_tokens = {
        what: regression(Transformer(what == "relative"), train, held, steps, batch) for what in ("places", "relative")
    }
    return {
        "pairs": [len(train.reference), len(held.reference)],
        "error_px": {**error, "by_tokens": by_tokens},
        "nats_a_token": nats,
    }


def main() -> int:
    parser = CommandParser(prog="python -m benchmarks.pose_limits", description="What the reference pose alone tells.")
    parser.add_argument("--data", type=Path, required=True, help="prepared data, as of python -m m4.data prepare")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--eval-split", default="eval")
    parser.add_argument("--steps", type=whole(LOOKS), default=1200, help="of training, --batch pairs each")
    parser.add_argument("--batch", type=whole(1), default=BATCH)
    parser.add_argument("--out", type=writable_file, help="file for the figures, JSON")
    arguments = parser.parse_args()
    train, held = (read_pairs(arguments.data, split) for split in (arguments.train_split, arguments.eval_split))
    figures = limits(train, held, arguments.steps, arguments.batch)
    print(json.dumps(figures, indent=1))
    if arguments.out is not None:
        settings = {"machine": machine(), "steps": arguments.steps, "batch": arguments.batch}
        text = json.dumps({**settings, **figures}, indent=1)
        write_atomically(arguments.out, (text + "\n").encode())
    return 0


if __name__ == "__main__":
    run_command(main)
