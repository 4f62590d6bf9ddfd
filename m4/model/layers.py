"""The layers of the trunk, over packed tokens.

Linear layers and norms hold their parameters under nano4M's names; `m4kernels` computes, several steps at once. On a
CPU a layer's product adds its result to the residual stream as it writes it. On a GPU the products are the library's,
and the norm that comes next adds, which reads the stream anyway: there the stream is a tensor and what it still lacks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m4.model.config import ModelConfig
from m4kernels import (
    Segments,
    add_layer_norm,
    cross_modal_attention_kvpacked,
    cross_modal_attention_qkvpacked,
    layer_norm,
    linear,
)

LAYER_NORM_EPS = 1e-6
POSITION_BASE = 10000.0  # of the wavelengths of position embeddings


def norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=LAYER_NORM_EPS, bias=False)


def norms_add(x: Tensor) -> bool:
    """Whether the norms add a layer's result to the residual stream x (T, D), not the layer's last product.

    While torch compiles they do not: it fuses norms of its own with what surrounds them, and of ops that it knows
    nothing of it writes down all that leads to their arguments, twice as much with every one in a row.
    """
    return x.is_cuda and not torch.compiler.is_compiling()


def add_to(x: Tensor, layer: nn.Linear, y: Tensor, *, gelu: bool = False) -> tuple[Tensor, Tensor | None]:
    """The residual stream x (T, D) after a layer whose last product is of y (T, K), or GELU(y): what is there of it
    (T, D), and what is still to be added to that (T, D), None for nothing."""
    if norms_add(x):
        return x, linear(y, layer.weight, gelu=gelu)
    return linear(y, layer.weight, gelu=gelu, residual=x), None


def normed(
    layer: nn.LayerNorm, x: Tensor, update: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(the residual stream x + update (T, D) normed, for the next layer; x + update).

    Args:
        dtype: of the normed rows; default what the next product multiplies, which is autocast's dtype where that is at
            work. For norms that add; others give what PyTorch's do.
    """
    if not norms_add(x):
        return layer(x), x
    if dtype is None and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    if update is None:
        return layer_norm(x, layer.weight, eps=layer.eps, out_dtype=dtype), x
    return add_layer_norm(x, update, layer.weight, eps=layer.eps, out_dtype=dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention over packed tokens (T, D), added to the residual stream (T, D) (see `add_to`)."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, residual: Tensor, segments: Segments, allow: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        qkv = linear(x, self.qkv_proj.weight).unflatten(-1, (3, -1, self.head_dim))
        attended = cross_modal_attention_qkvpacked(qkv, segments, allow=allow).flatten(1)
        return add_to(residual, self.attn_out_proj, attended)


class CrossAttention(nn.Module):
    """Multi-head attention from packed tokens x (Tq, D) to packed tokens context (Tk, D), added to the residual stream
    (Tq, D)."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.kv_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.attn_out_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        residual: Tensor,
        x_segments: Segments,
        context_segments: Segments,
        allow: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        q = linear(x, self.q_proj.weight).unflatten(-1, (-1, self.head_dim))
        kv = linear(context, self.kv_proj.weight).unflatten(-1, (2, -1, self.head_dim))
        attended = cross_modal_attention_kvpacked(q, kv, x_segments, context_segments, allow=allow).flatten(1)
        return add_to(residual, self.attn_out_proj, attended)


class MLP(nn.Module):
    """Two linear layers with GELU between them, over packed tokens (T, D), added to the residual stream (T, D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        return add_to(residual, self.fc2, linear(x, self.fc1.weight), gelu=True)


class EncoderBlock(nn.Module):
    """Takes the residual stream and what is still to be added to it, and returns both."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = norm(config.dim)
        self.attn = SelfAttention(config.dim, config.head_dim)
        self.norm2 = norm(config.dim)
        self.mlp = MLP(config.dim, int(config.dim * config.mlp_ratio))

    def forward(
        self, x: Tensor, update: Tensor | None, segments: Segments, allow: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        y, x = normed(self.norm1, x, update)
        x, update = self.attn(y, x, segments, allow)
        y, x = normed(self.norm2, x, update)
        return self.mlp(y, x)


class DecoderBlock(nn.Module):
    """Takes the residual stream and what is still to be added to it, and returns both."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = norm(config.dim)
        self.self_attn = SelfAttention(config.dim, config.head_dim)
        self.query_norm = norm(config.dim)
        self.context_norm = norm(config.dim)
        self.cross_attn = CrossAttention(config.dim, config.head_dim)
        self.norm2 = norm(config.dim)
        self.mlp = MLP(config.dim, int(config.dim * config.mlp_ratio))

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        context: Tensor,
        x_segments: Segments,
        context_segments: Segments,
        allow: Tensor | None,
        allow_cross: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        y, x = normed(self.norm1, x, update)
        x, update = self.self_attn(y, x, x_segments, allow)
        y, x = normed(self.query_norm, x, update)
        context, _ = normed(self.context_norm, context)
        x, update = self.cross_attn(y, context, x, x_segments, context_segments, allow_cross)
        y, x = normed(self.norm2, x, update)
        return self.mlp(y, x)


class Trunk(nn.Module):
    """A stack of blocks; exists so that parameters are called `encoder.blocks.0...` as in nano4M.

    Args:
        recompute: keep only the input of each block for the backward pass, which then runs the block once more.
    """

    def __init__(self, blocks: list[nn.Module], recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.recompute = recompute

    def forward(self, x: Tensor, *context: Any) -> tuple[Tensor, Tensor | None]:
        """The residual stream after all blocks, and what is still to be added to it."""
        stream: tuple[Tensor, Tensor | None] = (x, None)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                # Nothing in a block is random.
                stream = checkpoint(block, *stream, *context, use_reentrant=False, preserve_rng_state=False)
            else:
                stream = block(*stream, *context)
        return stream
