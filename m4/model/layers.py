"""The layers of the trunk, over packed tokens.

Linear layers hold their parameters under nano4M's names; `m4kernels.linear` multiplies, which takes in what surrounds a
product: GELU before it, the residual after it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m4.model.config import ModelConfig
from m4kernels import Segments, cross_modal_attention, linear

LAYER_NORM_EPS = 1e-6
POSITION_BASE = 10000.0  # of the wavelengths of position embeddings


def norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=LAYER_NORM_EPS, bias=False)


class SelfAttention(nn.Module):
    """Multi-head self-attention over packed tokens (T, D), plus a residual (T, D)."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, residual: Tensor, segments: Segments, allow: Tensor | None) -> Tensor:
        q, k, v = linear(x, self.qkv_proj.weight).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        attended = cross_modal_attention(q, k, v, segments, segments, allow=allow).flatten(1)
        return linear(attended, self.attn_out_proj.weight, residual=residual)


class CrossAttention(nn.Module):
    """Multi-head attention from packed tokens x (Tq, D) to packed tokens context (Tk, D), plus a residual (Tq, D)."""

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
    ) -> Tensor:
        q = linear(x, self.q_proj.weight).unflatten(-1, (-1, self.head_dim))
        k, v = linear(context, self.kv_proj.weight).unflatten(-1, (2, -1, self.head_dim)).unbind(1)
        attended = cross_modal_attention(q, k, v, x_segments, context_segments, allow=allow).flatten(1)
        return linear(attended, self.attn_out_proj.weight, residual=residual)


class MLP(nn.Module):
    """Two linear layers with GELU between them, over packed tokens (T, D), plus a residual (T, D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return linear(linear(x, self.fc1.weight), self.fc2.weight, gelu=True, residual=residual)


class EncoderBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = norm(config.dim)
        self.attn = SelfAttention(config.dim, config.head_dim)
        self.norm2 = norm(config.dim)
        self.mlp = MLP(config.dim, int(config.dim * config.mlp_ratio))

    def forward(self, x: Tensor, segments: Segments, allow: Tensor | None) -> Tensor:
        x = self.attn(self.norm1(x), x, segments, allow)
        return self.mlp(self.norm2(x), x)


class DecoderBlock(nn.Module):
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
        context: Tensor,
        x_segments: Segments,
        context_segments: Segments,
        allow: Tensor | None,
        allow_cross: Tensor | None,
    ) -> Tensor:
        x = self.self_attn(self.norm1(x), x, x_segments, allow)
        query, context = self.query_norm(x), self.context_norm(context)
        x = self.cross_attn(query, context, x, x_segments, context_segments, allow_cross)
        return self.mlp(self.norm2(x), x)


class Trunk(nn.Module):
    """A stack of blocks; exists so that parameters are called `encoder.blocks.0...` as in nano4M.

    Args:
        recompute: keep only the input of each block for the backward pass, which then runs the block once more.
    """

    def __init__(self, blocks: list[nn.Module], recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.recompute = recompute

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                # Nothing in a block is random.
                x = checkpoint(block, x, *context, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *context)
        return x
