"""Initial values of the weights: where training starts, not what the model is.

``normal`` is nano4M's. ``fourier`` puts into them what is known before any training: the next moment resembles the
reference moment, token by token. So an untrained model of it copies: every target looks at the visible token of its own
position and kind, and predicts what it sees, the surer the more alike the ids are.

- A coordinate is a bin of a scale, an image code six digits. The rows of the token embedding and of the output layer
  are projections of features: waves over the scale, which bins near each other share (Tancik et al., "Fourier Features
  Let Networks Learn High Frequency Functions in Low Dimensional Domains", 2020), and the digits, which codes share
  (Mentzer et al., "Finite Scalar Quantization", 2023). Both layers have the same rows but for their length, so that a
  token that reaches the output as it was read predicts itself.
- What a token is, where it stands and of which kind it is lie in directions at right angles to each other (`Space`), so
  that neither disturbs the other: position embeddings span less than half of the dimensions.
- Heads of the first cross-attention compare positions and kinds, and add to the target what the visible token is
  (identity maps as initial values: Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", 2023). They
  are sure, and so learn little. All other heads that read visible tokens look softly at tokens of their kind some way
  off (`OFFSETS`), which gives training something to begin with: the other coordinate of a joint, the block beside.
- The last block's MLP moves what was copied along the scale, and says how surely, by a few entries of the stream that
  are 0 before training (`m4.model.displacement`).

Names, shapes and semantics of the weights are the same, so checkpoints are too. What was measured, and what was tried
besides: docs/learning.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from m4.modalities import IMAGE_CODES, IMAGE_GRID, IMAGE_LEVELS, NUM_JOINTS, VISIBILITIES, Modality, RowLayout
from m4.model.config import ModelConfig
from m4.model.displacement import CHANNELS, keep_clear, set_displacements
from m4.model.layers import POSITION_BASE, CrossAttention, DecoderBlock, SelfAttention

INIT_STD = 0.02  # of nano4M

# Fourier features of a bin: waves over the whole scale, from half a period to 512 (a period of 16 bins). Each octave
# counts this much less than the one below it: how likely a joint is to be some way off falls with the way's logarithm.
FREQUENCIES, LOWEST, HIGHEST = 16, 0.5, 512.0
OCTAVE_FALL = 2**-0.25
# What no other bin shares: a random direction of so many. Labels often stay where they were to the bin.
OWN_DIRECTIONS = 40
# Channels of displacements are set apart where tokens keep this many dimensions for each of them.
LEAST_TOKENS = 4
# Standard deviation of an entry of the embeddings; position embeddings have 0.7.
TOKEN_STD, MODALITY_STD = 1.0, 0.5
OWN_SHARE = 0.3  # of a modality in its embedding, beside what its kind shares
# The fastest waves of the position embedding tell neighbours apart: so many, down to so many radians a position.
WAVES, SLOWEST_WAVE = 8, 0.4
# Attention logits of a target and a visible token, of the same position and of the same kind: heads that copy, other
# heads of cross-attention, and heads of the encoder.
COPYING, CROSS, SELF = (24.0, 16.0), (8.0, 8.0), (6.0, 6.0)
# Which way off the heads that do not copy look, in turns: y and visibility of the same joint for x, and back; the next
# joint or block; the row of blocks above or below.
OFFSETS = (NUM_JOINTS, -NUM_JOINTS, 1, -1, IMAGE_GRID, -IMAGE_GRID, 2 * NUM_JOINTS, -2 * NUM_JOINTS)
COPY = 2.0  # what a target adds of the visible token, in units of its normalised values
# Logit of the id that was copied, beside ids that have nothing in common with it: bins (what their waves and what their
# own directions give of it), and codes or visibilities. Those of bins are a guess at how far joints move, of animated
# and of real poses (docs/learning.md).
WAVES_LOGIT, OWN_LOGIT, CODE_LOGIT = 10.0, 3.0, 20.0


class Weights(Protocol):
    """What `fourier` sets of `m4.model.m4.M4`, and what it reads."""

    config: ModelConfig
    pos_emb: Tensor
    enc_tok_emb: nn.Embedding
    enc_mod_emb: nn.Embedding
    dec_mod_emb: nn.Embedding
    dec_context_proj: nn.Linear
    to_logits: nn.Linear

    @property
    def encoder(self) -> nn.Module: ...

    @property
    def decoder(self) -> nn.Module: ...


@torch.no_grad()
def normal(modules: Iterable[nn.Module], std: float = INIT_STD) -> None:
    """Weights from N(0, std²), biases 0. Norms, which are at 1, stay."""
    for module in modules:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def fourier(model: Weights, code_levels: Sequence[int] = IMAGE_LEVELS) -> None:
    """Overwrite what `normal` gave the embeddings, the output layer, and attention to visible tokens.

    code_levels: how many levels each digit of an image code has, fastest digit first.
    """
    if model.pos_emb.is_meta:
        return  # a model without values
    described = RowLayout.of(model.config).described
    space = Space.of(model.pos_emb, described)
    for row, embedding in enumerate(space.modalities(described)):
        model.enc_mod_emb.weight[row] = embedding
    model.dec_mod_emb.weight.copy_(model.enc_mod_emb.weight)

    token, modality, position = TOKEN_STD**2, MODALITY_STD**2 * (1 + OWN_SHARE**2), 0.5  # mean squares of the entries
    query = (modality + position) ** -0.5  # what the norm of the queries multiplies by
    encoded = (token + modality + position) ** -0.5
    context = (encoded**2 * (token + modality) + (encoded + 1) ** 2 * position) ** -0.5  # positions are added again
    copied = COPY * encoded * context * token**0.5
    stream = copied**2 + modality + position  # mean square of the decoder's residual stream
    of_output = copied * stream**-0.5  # how much of the output is the copied token

    directions = _vocabulary(model, space, of_output, code_levels)
    nn.init.eye_(model.dec_context_proj.weight)
    crossing = [module for module in model.decoder.modules() if isinstance(module, CrossAttention)]
    seeing = [module for module in model.encoder.modules() if isinstance(module, SelfAttention)]
    offsets = itertools.cycle(OFFSETS)
    looks = Looks(space, model.config.head_dim)
    # What a product of query and key is, of one wave's sine and cosine, and of a kind.
    wave, kind = query * context * (encoded + 1), query * context * encoded
    for block, cross in enumerate(crossing):
        keys, values = cross.kv_proj.weight.chunk(2)
        copying = looks.heads_that_copy if block == 0 else 0
        for head in range(looks.heads):
            logits, offset = (COPYING, 0) if head < copying else (CROSS, next(offsets))
            looks.set_head(head, cross.q_proj.weight, keys, logits, (wave, kind), offset)
            if head >= copying:
                looks.set_values(head, values)
        if copying:
            looks.copy(values, cross.attn_out_proj.weight)
    offsets = itertools.cycle(OFFSETS)
    for attention in seeing:
        queries, keys, values = attention.qkv_proj.weight.chunk(3)
        for head in range(looks.heads):
            looks.set_head(head, queries, keys, SELF, (encoded**2, encoded**2), next(offsets))
            looks.set_values(head, values)
    if directions is not None and len(space.channels):
        _displacements(model, space.channels, directions, stream**0.5)


@dataclass(frozen=True)
class Space:
    """The dimensions of the model in parts at right angles, each but the table an orthonormal basis (·, D).

    table: (P, D) the position embeddings. positions: what they span (all but 1e-5 of it), and the mean, which norms
    take away. kinds: a direction for each kind of modality (image, joints, and each that is neither). own: one for each
    modality. channels: those of displacements. tokens: the rest, for what a token is. A model too small for that has no
    channels, or kinds and own directions among those of tokens too.
    """

    table: Tensor
    positions: Tensor
    kinds: Tensor
    own: Tensor
    channels: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, pos_emb: Tensor, described: Sequence[Modality]) -> Space:
        """pos_emb: (P, D) position embeddings; half of the dimensions at most are left to them."""
        kinds = len(_kinds(described))
        dim = pos_emb.shape[1]
        table = torch.cat([pos_emb, pos_emb.new_ones(1, dim)]).double()
        _, size, bases = torch.linalg.svd(table, full_matrices=True)
        left = 1 - size.square().cumsum(0) / size.square().sum()
        rank = min(int((left > 1e-5).sum()) + 1, dim // 2)
        positions, rest = bases.to(pos_emb).split([rank, dim - rank])
        rest = nn.init.orthogonal_(torch.empty(len(rest), len(rest))).to(rest) @ rest
        apart = kinds + len(described)
        directions = rest[torch.arange(apart) % len(rest)]
        tokens = rest[apart:] if len(rest) >= 2 * apart else rest
        count = CHANNELS if len(tokens) >= LEAST_TOKENS * CHANNELS else 0
        channels, tokens = tokens.split([count, len(tokens) - count])
        return cls(pos_emb, positions, directions[:kinds], directions[kinds:], channels, tokens)

    def axes(self, entries: Tensor) -> Tensor:
        """(N, D): what reads these entries (N,) of a position embedding after a norm took its mean away, and nothing of
        what lies at right angles to positions.

        The entry itself would read it less the mean, which in the first positions is as large as the waves and no
        constant: some found their neighbours rather than themselves.
        """
        known = torch.cat([self.table, self.table.new_ones(1, self.table.shape[1])]) @ self.positions.T
        wanted = torch.cat([self.table[:, entries], self.table.new_zeros(1, len(entries))])
        return torch.linalg.lstsq(known.double(), wanted.double()).solution.T.to(self.table) @ self.positions

    def modalities(self, described: Sequence[Modality]) -> Tensor:
        """(M, D): their embeddings, alike for those of a kind."""
        kinds = _kinds(described)
        of_kind = torch.stack([self.kinds[kinds.index(_kind(modality))] for modality in described])
        return MODALITY_STD * math.sqrt(self.tokens.shape[1]) * (of_kind + OWN_SHARE * self.own)

    def directions(self, count: int) -> Tensor:
        """(count, D), random ones of tokens, at right angles if there are so many."""
        return nn.init.orthogonal_(torch.empty(count, len(self.tokens))).to(self.tokens) @ self.tokens


def _kind(modality: Modality) -> str:
    return modality.kind if modality.kind in ("image", "joints") else modality.name


def _kinds(described: Sequence[Modality]) -> list[str]:
    return list(dict.fromkeys(map(_kind, described)))


def bin_features(bins: int) -> Tensor:
    """float32 (bins, 2 * FREQUENCIES + OWN_DIRECTIONS), rows of length 1: sines, then cosines of the place on the
    scale, then each bin's own direction, which is random."""
    place = torch.linspace(0.0, 1.0, bins, dtype=torch.float64)
    octaves = torch.linspace(0, math.log2(HIGHEST / LOWEST), FREQUENCIES, dtype=torch.float64)
    angle = 2 * math.pi * LOWEST * place[:, None] * 2.0**octaves
    size = OCTAVE_FALL**octaves
    waves = nn.functional.normalize(torch.cat([size * angle.sin(), size * angle.cos()], dim=1)).float()
    own = nn.functional.normalize(torch.randn(bins, OWN_DIRECTIONS))
    return nn.functional.normalize(torch.cat([WAVES_LOGIT**0.5 * waves, OWN_LOGIT**0.5 * own], dim=1))


def code_features(code_levels: Sequence[int] = IMAGE_LEVELS) -> Tensor:
    """float32 (IMAGE_CODES, Σ (levels - 1)), rows of length 1: of every digit the cosines that a discrete cosine
    transform of its levels has, slowest first."""
    code = torch.arange(IMAGE_CODES)
    features = []
    for levels in code_levels:
        place = (code % levels).double() / (levels - 1)
        features.append(torch.cos(math.pi * place[:, None] * torch.arange(1, levels)))
        code = code // levels
    return nn.functional.normalize(torch.cat(features, dim=1)).float()


def _vocabulary(model: Weights, space: Space, of_output: float, code_levels: Sequence[int]) -> Tensor | None:
    """Rows (V, D) of the token embedding and the output layer that are coordinate bins or image codes.

    of_output: share of the decoder's output, a vector of length √D, that is the token it copied.

    Returns:
        (F, D), the direction of each feature of a bin, None where there are no bins.
    """
    embedding, output, dim = model.enc_tok_emb.weight, model.to_logits.weight, model.config.dim
    layout = RowLayout.of(model.config)
    vocab_sizes = {modality.kind: size for modality, size in zip(layout.described, layout.vocab_sizes, strict=True)}

    def set_rows(first: int, features: Tensor, logit: float) -> Tensor:
        directions = space.directions(features.shape[1])
        rows = nn.functional.normalize(features.to(embedding) @ directions)
        embedding[first : first + len(rows)] = TOKEN_STD * math.sqrt(dim) * rows
        output[first : first + len(rows)] = logit / (of_output * math.sqrt(dim)) * rows
        return directions

    bins, of_bins = layout.bins, None
    if bins:
        of_bins = set_rows(0, bin_features(bins), WAVES_LOGIT + OWN_LOGIT)
        # Visibility is no scale, and as bins its ids would be neighbours.
        set_rows(0, torch.eye(VISIBILITIES)[:bins], CODE_LOGIT)
    if vocab_sizes.get("image", 0) >= IMAGE_CODES:
        # Ids below `bins` stay coordinates. Of the tokenizer fsq hardly any image has such codes.
        set_rows(bins, code_features(code_levels)[bins:], CODE_LOGIT)
    return of_bins


def _displacements(model: Weights, channels: Tensor, directions: Tensor, stream: float) -> None:
    """Channels for how far joints move, by `m4.model.displacement`.

    Args:
        directions: (F, D), of the features of a bin.
        stream: root mean square of the decoder's residual stream.
    """
    blocks = [block for block in model.decoder.modules() if isinstance(block, DecoderBlock)]
    last = blocks[-1].mlp
    waves, own = directions.split([2 * FREQUENCIES, OWN_DIRECTIONS])
    set_displacements(last.fc1.weight, last.fc2.weight, channels, waves.unflatten(0, (2, FREQUENCIES)), own, stream)
    for block in blocks:
        keep_clear(channels, (block.self_attn.attn_out_proj, block.cross_attn.attn_out_proj, block.mlp.fc2))


class Looks:
    """The rows of heads, head_dim each, by which queries find keys.

    The axes, (2·waves, D), read the sines, then the cosines of some fast waves of a position embedding, and nothing of
    what lies at right angles to positions: as many as a head has dimensions for beside those of kinds, at least one.
    """

    def __init__(self, space: Space, head_dim: int) -> None:
        self.space, self.head_dim = space, head_dim
        self.dim = space.positions.shape[1]
        self.heads = self.dim // head_dim
        self.heads_that_copy = min(self.heads, -(-len(space.tokens) // head_dim))  # they carry what a token is
        waves = max(1, min(WAVES, (head_dim - len(space.kinds)) // 2))
        slowest = math.log(1 / SLOWEST_WAVE) / math.log(POSITION_BASE) * self.dim / 2  # its place among the waves
        self._chosen = torch.linspace(0, min(max(slowest, waves - 1), self.dim // 2 - 1), waves).round().long()
        self.axes = space.axes(torch.cat([self._chosen, self.dim // 2 + self._chosen]))

    def set_head(
        self,
        head: int,
        queries: Tensor,
        keys: Tensor,
        logits: tuple[float, float],
        products: tuple[float, float],
        offset: int,
    ) -> None:
        """Make queries (D, D) find keys (D, D) that are ``offset`` positions further and of their kind.

        Args:
            logits: of a key there, and of a key of the kind.
            products: what query and key have in common there: of a wave, and of a kind (its own mean square left out).
        """
        waves = len(self._chosen)
        sines, cosines = self.axes.split(waves)
        frequency = POSITION_BASE ** (-2 * self._chosen / self.dim)
        far, near = torch.sin(frequency * offset)[:, None], torch.cos(frequency * offset)[:, None]
        there = torch.cat([near * sines + far * cosines, near * cosines - far * sines])  # the waves' sines and cosines
        at, of_kind = (
            math.sqrt(logit * math.sqrt(self.head_dim) / product)
            for logit, product in zip(
                logits, (products[0] * waves, products[1] * self.dim * MODALITY_STD**2), strict=True
            )
        )
        for weight, axes in ((queries, there), (keys, self.axes)):
            rows = torch.cat([at * axes, of_kind * self.space.kinds])[: self.head_dim]
            weight[head * self.head_dim :][: len(rows)] = rows

    def set_values(self, head: int, values: Tensor) -> None:
        """Let a head pass on what it sees in random directions, all the same length."""
        rows = values[head * self.head_dim :][: self.head_dim]
        rows.copy_(nn.init.orthogonal_(torch.empty(rows.shape)))

    def copy(self, values: Tensor, output: Tensor) -> None:
        """Let the heads that copy add what a token is, COPY times, to the target; values, output: (D, D)."""
        carried = self.heads_that_copy * self.head_dim
        spread = nn.init.orthogonal_(torch.empty(carried, len(self.space.tokens)))  # over all of them
        values[:carried] = spread @ self.space.tokens
        output[:, :carried] = COPY * self.space.tokens.T @ spread.T
