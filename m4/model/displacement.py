"""Initial values of the last decoder block's MLP: what it knows of displacements before any training.

Where the next moment is not the reference moment again, it is near: what a model has to learn is how far and how surely
each joint moves from where it is, and that is the same question at every place of the canvas. Rows of bins are waves
over the scale (`m4.model.init`), so one answer can serve all places. With the sine and cosine of a copied bin v in the
stream, a bin u has the logit Σ aₖ² cos(ωₖ(u − v)) over the waves k. Adding c times (cosine, −sine) of some waves to
(sine, cosine) adds c Σ aₖ² sin(ωₖ(u − v)): bins on one side get likelier, those on the other less. Adding c times the
waves themselves makes the distribution narrower, or wider. So log-probabilities are a fixed function of the way
u − v, and of each *channel* c another one times c: an exponential family with c as natural parameters, which attention
and the MLPs before have to predict. Every channel is one direction of the residual stream.

The products c · t of a channel and an entry t of the stream are those of four hidden units: of
e(x) = GELU(x) + GELU(−x), which is even and √(2/π) x² near 0, e(c + t) − e(c − t) ≈ 4 √(2/π) c t. Where channels are
0, as in an untrained model, it is 0 exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

BANDS = 3  # of waves, slow to fast, with a channel each for the way and for the width
CHANNELS = 2 * BANDS + 1  # and one for whether the joint stays to the bin
UNIT = 0.5  # what a hidden unit has of the channel, and of the entry
# Signs of the channel, the entry and the output in the four units: e(c + t) - e(c - t).
SIGNS = ((1, 1, 1), (-1, -1, 1), (1, -1, -1), (-1, 1, -1))


@torch.no_grad()
def set_displacements(
    hidden: Tensor, output: Tensor, channels: Tensor, waves: Tensor, own: Tensor, stream: float
) -> None:
    """Give the first units of an MLP what multiplies channels and waves; the others keep what they have.

    Where the MLP has no room for all of them, the last ones are left out: first whether joints stay, then widths.

    Args:
        hidden: (H, D), its first layer's weight, which multiplies the normed stream.
        output: (D, H), its second layer's weight.
        channels: (CHANNELS, D) directions of the stream.
        waves: (2, F, D), directions of the sines and of the cosines, slowest first.
        own: (P, D), directions of what each bin has of its own.
        stream: root mean square of the stream's entries, by which the norm divides.
    """
    sines, cosines = waves
    bands = [slice(len(sines) * band // BANDS, len(sines) * (band + 1) // BANDS) for band in range(BANDS)]
    products = [(torch.cat([cosines[some], sines[some]]), torch.cat([sines[some], -cosines[some]])) for some in bands]
    products += [(torch.cat([sines[some], cosines[some]]),) * 2 for some in bands]
    products += [(own, own)]
    size = stream / (4 * math.sqrt(2 / math.pi) * UNIT**2)
    first = 0
    for channel, (read, written) in zip(channels, products, strict=True):
        if first + len(SIGNS) * len(read) > len(hidden):
            return
        for of_channel, of_entry, of_output in SIGNS:
            units = slice(first, first + len(read))
            hidden[units] = UNIT * (of_channel * channel + of_entry * read)
            output[:, units] = of_output * size * written.T
            first = units.stop


@torch.no_grad()
def keep_clear(channels: Tensor, layers: Iterable[nn.Linear]) -> None:
    """Take from what layers write whatever lies in the channels (C, D): they are 0 then until training writes there."""
    for layer in layers:
        layer.weight.sub_(channels.T @ (channels @ layer.weight))
