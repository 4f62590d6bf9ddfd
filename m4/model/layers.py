"""The layers of the trunk, over packed tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m4.model.config import ModelConfig
from m4kernels import Segments, cross_modal_attention

LAYER_NORM_EPS = 1e-6
POSITION_BASE = 10000.0  # of the wavelengths of position embeddings


def norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=LAYER_NORM_EPS, bias=False)


class SelfAttention(nn.Module):
    """Multi-head self-attention over packed tokens (T, D)."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, segments: Segments, allow: Tensor | None) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        return self.attn_out_proj(cross_modal_attention(q, k, v, segments, segments, allow=allow).flatten(1))


class CrossAttention(nn.Module):
    """Multi-head attention from packed tokens x (Tq, D) to packed tokens context (Tk, D)."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.kv_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.attn_out_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, context: Tensor, x_segments: Segments, context_segments: Segments, allow: Tensor | None
    ) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k, v = self.kv_proj(context).unflatten(-1, (2, -1, self.head_dim)).unbind(1)
        return self.attn_out_proj(cross_modal_attention(q, k, v, x_segments, context_segments, allow=allow).flatten(1))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class EncoderBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = norm(config.dim)
        self.attn = SelfAttention(config.dim, config.head_dim)
        self.norm2 = norm(config.dim)
        self.mlp = MLP(config.dim, int(config.dim * config.mlp_ratio))

    def forward(self, x: Tensor, segments: Segments, allow: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), segments, allow)
        return x + self.mlp(self.norm2(x))


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
        x = x + self.self_attn(self.norm1(x), x_segments, allow)
        query, context = self.query_norm(x), self.context_norm(context)
        x = x + self.cross_attn(query, context, x_segments, context_segments, allow_cross)
        return x + self.mlp(self.norm2(x))


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
