"""Initial values of the weights: where training starts, not what the model is.

``normal`` is nano4M's. ``fourier`` puts into them what is known before any training:

- A coordinate is a bin of a scale, and an image code six digits. So the rows of the token embedding and of the output
  layer start as random projections of features: waves over the scale, which bins near each other share (Tancik et al.,
  "Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains", 2020), and the digits,
  which codes share (Mentzer et al., "Finite Scalar Quantization", 2023). Both layers start with the same projection, so
  that a token that reaches the output as it was read predicts itself.
- The next moment resembles the reference moment token by token. So cross-attention starts with every target looking at
  the visible tokens of its own position and adding what it sees there to itself (identity maps as initial values:
  Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", 2023).

Names, shapes and semantics of the weights are the same, so checkpoints are too. What was measured, and what was tried
besides: docs/learning.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from m4.modalities import BINS, IMAGE_CODES, IMAGE_LEVELS, VISIBILITIES, RowLayout
from m4.model.config import ModelConfig
from m4.model.layers import CrossAttention

INIT_STD = 0.02  # of nano4M

# Fourier features of a bin: waves over the whole scale, from half a period to 64 (a period of 4 pixels).
FREQUENCIES, LOWEST, HIGHEST = 32, 0.5, 64.0
# Standard deviation of an entry of the embeddings; position embeddings have 0.7.
TOKEN_STD, MODALITY_STD = 1.0, 0.5
OWN_SHARE = 0.3  # of a modality in its embedding, beside what its kind shares
HEAD_SCALE = 0.2  # the output layer's rows beside projections of standard deviation 1
# Attention logit of a target and a visible token of its position, and how many times less the slowest wave of the
# position embedding counts there than the fastest: slow waves hardly tell neighbours apart.
POSITION_LOGIT, SLOWEST_WAVE = 24.0, 10**-1.5
COPY = 2.0  # what all blocks of the decoder together add of a visible token, in units of its normalised values


@torch.no_grad()
def normal(modules: Iterable[nn.Module]) -> None:
    """Weights from N(0, 0.02²), biases 0. Norms, which are at 1, stay."""
    for module in modules:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def bin_features(bins: int) -> Tensor:
    """float32 (bins, 1 + 2 * FREQUENCIES), rows of length 1: a constant, sines, cosines of the place."""
    place = torch.linspace(0.0, 1.0, bins, dtype=torch.float64)
    octaves = torch.linspace(math.log2(LOWEST), math.log2(HIGHEST), FREQUENCIES, dtype=torch.float64)
    angle = 2 * math.pi * place[:, None] * 2.0**octaves
    features = torch.cat([torch.ones(bins, 1, dtype=torch.float64), angle.sin(), angle.cos()], dim=1)
    return nn.functional.normalize(features).float()


def code_features() -> Tensor:
    """float32 (IMAGE_CODES, 1 + Σ (levels - 1)), rows of length 1: a constant, and of every digit the cosines that a
    discrete cosine transform of its levels has, slowest first."""
    code = torch.arange(IMAGE_CODES)
    features = [torch.ones(IMAGE_CODES, 1, dtype=torch.float64)]
    for levels in IMAGE_LEVELS:
        place = (code % levels).double() / (levels - 1)
        features.append(torch.cos(math.pi * place[:, None] * torch.arange(1, levels)))
        code = code // levels
    return nn.functional.normalize(torch.cat(features, dim=1)).float()


@torch.no_grad()
def fourier_rows(embedding: nn.Embedding, output: nn.Linear, config: ModelConfig) -> None:
    """Rows (V, D) of the token embedding and the output layer that are coordinate bins or image codes."""
    layout = RowLayout.of(config)
    vocab_sizes = {modality.kind: size for modality, size in zip(layout.described, layout.vocab_sizes, strict=True)}

    def set_rows(first: int, features: Tensor) -> None:
        projected = features.to(embedding.weight) @ torch.randn(features.shape[1], config.dim).to(embedding.weight)
        embedding.weight[first : first + len(features)] = TOKEN_STD * projected
        output.weight[first : first + len(features)] = HEAD_SCALE * projected

    bins = min(BINS, vocab_sizes.get("joints", 0))
    if bins:
        set_rows(0, bin_features(bins))
        # Visibility is no scale, and as bins its ids would be neighbours.
        set_rows(0, torch.eye(VISIBILITIES)[:bins])
    if vocab_sizes.get("image", 0) >= IMAGE_CODES:
        # Ids below `bins` stay coordinates: few image codes are that low, those of blocks much darker at the bottom.
        set_rows(bins, code_features()[bins:])


@torch.no_grad()
def modality_embeddings(encoder: nn.Embedding, decoder: nn.Embedding, config: ModelConfig) -> None:
    """Both (M, D): the same in encoder and decoder, alike for modalities of a kind (the images; the joints), so that
    targets look at visible tokens of their kind first."""
    shared = {kind: torch.randn(config.dim) for kind in ("image", "joints")}
    for row, modality in enumerate(RowLayout.of(config).described):
        of_kind, own = shared.get(modality.kind, torch.randn(config.dim)), torch.randn(config.dim)
        encoder.weight[row] = MODALITY_STD * (of_kind + OWN_SHARE * own)
    decoder.weight.copy_(encoder.weight)


@torch.no_grad()
def copy_by_position(context: nn.Linear, attentions: Sequence[CrossAttention]) -> None:
    """Cross-attention by position, whose values reach the residual stream as they are.

    Args:
        context: the (D, D) projection of the encoder's output.
        attentions: the cross-attention of every block of the decoder.
    """
    nn.init.eye_(context.weight)
    dim = context.out_features
    # Waves of the position embedding, fastest first, in both halves: sines, then cosines.
    emphasis = SLOWEST_WAVE ** (torch.arange(dim // 2) / (dim // 2)).repeat(2)
    emphasis *= (dim / emphasis.square().sum()).sqrt()
    for attention in attentions:
        # Normalised vectors of length √dim that agree give a head dim * (head_dim / dim) * scale² / √head_dim.
        scale = math.sqrt(POSITION_LOGIT / math.sqrt(attention.head_dim))
        similar = scale * emphasis * nn.init.orthogonal_(torch.empty(dim, dim))
        attention.q_proj.weight.copy_(similar)
        same = nn.init.orthogonal_(torch.empty(dim, dim))
        attention.kv_proj.weight.copy_(torch.cat([similar, same]))
        attention.attn_out_proj.weight.copy_(COPY / len(attentions) * same.T)
