"""The layers of the trunk, over packed tokens.

Linear layers and norms hold their parameters under nano4M's names; `m4kernels` computes, several steps at once. On a
CPU a layer's product adds its result to the residual stream as it writes it. On a GPU the products are the library's,
and the norm that comes next adds, which reads the stream anyway: there the stream is a tensor and what it still lacks.

All blocks of the decoder norm the same context, each with a weight of its own. Where it has many rows they are
standardised once, and a norm's weight is multiplied into the matrix that follows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m4.model.config import ModelConfig
from m4kernels import Segments, add_layer_norm, cross_modal_attention, layer_norm, linear

LAYER_NORM_EPS = 1e-6
POSITION_BASE = 10000.0  # of the wavelengths of position embeddings
# Rows of the context a column from which on they are standardised once: twice those of kv_proj. Fewer gain nothing on a
# CPU: kv_proj times the norm's weight, and what its gradients take, is fresh memory (benchmarks/NOTES.md).
MANY_ROWS = 4


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
    dtype = _multiplied_dtype(x) if dtype is None else dtype
    if update is None:
        return layer_norm(x, layer.weight, eps=layer.eps, out_dtype=dtype), x
    return add_layer_norm(x, update, layer.weight, eps=layer.eps, out_dtype=dtype)


def _multiplied_dtype(x: Tensor) -> torch.dtype | None:
    """What the next product multiplies of x: autocast's dtype, None for x's own."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def standardised(x: Tensor) -> Tensor:
    """Rows of x (T, D) with mean 0 and variance 1, a norm without its weight; in the dtype that `normed` gives."""
    if not norms_add(x):
        return F.layer_norm(x, x.shape[1:], eps=LAYER_NORM_EPS)
    return layer_norm(x, x.new_ones(x.shape[1]), eps=LAYER_NORM_EPS, out_dtype=_multiplied_dtype(x))


def read_by(x: Tensor, readers: int) -> Sequence[Tensor]:
    """x for each of its readers. In 16 bits their gradients are added up in float32 and rounded once; autograd would
    round every partial sum."""
    if x.dtype.itemsize > 2 or readers < 2:
        return [x] * readers
    return x.expand(readers, *x.shape).unbind()


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
        q, k, v = linear(x, self.qkv_proj.weight).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        attended = cross_modal_attention(q, k, v, segments, segments, allow=allow).flatten(1)
        return add_to(residual, self.attn_out_proj, attended)


class CrossAttention(nn.Module):
    """Multi-head attention from packed tokens x (Tq, D) to packed tokens context (Tk, D), multiplied by context_gain
    (D,) where there is one, added to the residual stream (Tq, D)."""

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
        context_gain: Tensor | None,
        residual: Tensor,
        x_segments: Segments,
        context_segments: Segments,
        allow: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        q = linear(x, self.q_proj.weight).unflatten(-1, (-1, self.head_dim))
        kv_weight = self.kv_proj.weight if context_gain is None else self.kv_proj.weight * context_gain
        k, v = linear(context, kv_weight).unflatten(-1, (2, -1, self.head_dim)).unbind(1)
        attended = cross_modal_attention(q, k, v, x_segments, context_segments, allow=allow).flatten(1)
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
        is_standardised: bool,
        x_segments: Segments,
        context_segments: Segments,
        allow: Tensor | None,
        allow_cross: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        y, x = normed(self.norm1, x, update)
        x, update = self.self_attn(y, x, x_segments, allow)
        y, x = normed(self.query_norm, x, update)
        gain = self.context_norm.weight if is_standardised else None
        if gain is None:
            context, _ = normed(self.context_norm, context)
        x, update = self.cross_attn(y, context, gain, x, x_segments, context_segments, allow_cross)
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

    def forward(self, x: Tensor, *others: Any) -> tuple[Tensor, Tensor | None]:
        """The residual stream after all blocks, which take the same others, and what is still to be added to it."""
        return self._through(x, [others] * len(self.blocks))

    def _through(self, x: Tensor, others: Sequence[tuple[Any, ...]]) -> tuple[Tensor, Tensor | None]:
        """As `forward`, with the others of every block."""
        stream: tuple[Tensor, Tensor | None] = (x, None)
        for block, its in zip(self.blocks, others, strict=True):
            if self.recompute and torch.is_grad_enabled():
                # Nothing in a block is random.
                stream = checkpoint(block, *stream, *its, use_reentrant=False, preserve_rng_state=False)
            else:
                stream = block(*stream, *its)
        return stream


class Decoder(Trunk):
    """Blocks that all read one context (T, D)."""

    def forward(self, x: Tensor, context: Tensor, *others: Any) -> tuple[Tensor, Tensor | None]:
        """As `Trunk.forward`, of a context that is not standardised."""
        if len(context) < MANY_ROWS * context.shape[1]:
            return super().forward(x, context, False, *others)
        reads = read_by(standardised(context), len(self.blocks))
        return self._through(x, [(read, True, *others) for read in reads])
