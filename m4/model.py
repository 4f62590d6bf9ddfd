"""The M4 model: an encoder-decoder transformer over packed, masked multimodal tokens (4M, Mizrahi et al. 2023).

The encoder reads the visible tokens of every modality together; the decoder predicts the target tokens from their
modality and position alone, in one parallel step. Parameter names and semantics are nano4M's, so its checkpoints load
by name (see `m4.checkpoint.load_nano4m`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4.padded import padded_losses
from m4kernels import MaskedBatch, PackedTokens, Segments, cross_modal_attention, linear_cross_entropy

LAYER_NORM_EPS = 1e-6
INIT_STD = 0.02
KERNELS = ("auto", "reference", "reference-matmul")


@dataclass
class AttentionConfig:
    """Which modality may attend to which: "full", "within_modality", or M rows of M zeros and ones (row = query)."""

    encoder: Any = "full"
    decoder: Any = "full"
    cross: Any = "full"


@dataclass
class ModelConfig:
    """The shape of an M4 model; M = number of modalities.

    Args:
        modalities: names, in the order of their tokens within a sample.
        vocab_sizes: (M,), the classes of each modality; the shared vocabulary is the largest.
        max_seq_lens: (M,), the longest sequence of each modality.
        dim: width of the trunk, a multiple of head_dim.
        enc_depth, dec_depth: number of blocks.
        head_dim: width of an attention head.
        mlp_ratio: hidden width of the MLP over dim.
        attention: modality sparsity.
        kernels: "auto" runs packed batches through m4kernels; "reference" is the padded pure-PyTorch path with a dense
            boolean mask, SDPA and whole logits; "reference-matmul" the same with an explicit masked softmax.

    Raises:
        ValueError: a value does not fit; the message names the key.
    """

    modalities: Sequence[str]
    vocab_sizes: Sequence[int]
    max_seq_lens: Sequence[int]
    dim: int = 640
    enc_depth: int = 8
    dec_depth: int = 8
    head_dim: int = 64
    mlp_ratio: float = 4.0
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    kernels: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_sizes", "max_seq_lens"):
            values = getattr(self, name)
            if len(values) != len(self.modalities):
                raise ValueError(f"{name} has {len(values)} entries, modalities has {len(self.modalities)}")
            if any(value < 1 for value in values):
                raise ValueError(f"{name} must be positive, got {list(values)}")
        if not self.modalities:
            raise ValueError("modalities must name at least one modality")
        if self.dim < 2 or self.dim % 2 or self.head_dim < 1 or self.dim % self.head_dim:
            raise ValueError(f"dim must be even and a multiple of head_dim={self.head_dim}, got {self.dim}")
        for name in ("enc_depth", "dec_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if int(self.dim * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {self.kernels!r}")
        for name in ("encoder", "decoder", "cross"):
            allow_matrix(getattr(self.attention, name), len(self.modalities), f"attention.{name}")

    @property
    def vocabulary(self) -> int:
        return max(self.vocab_sizes)


class Losses(NamedTuple):
    """What a forward pass returns; M = number of modalities."""

    total: Tensor  # (), the mean of per_modality; differentiable
    per_modality: Tensor  # (M,) float32, mean token cross-entropy in nats; 0 for a modality without targets; detached
    counts: Tensor  # (M,) int64, targets of each modality


def allow_matrix(pattern: Any, modalities: int, key: str) -> Tensor | None:
    """bool (M, M) of an attention pattern, None for "full".

    Raises:
        ValueError: the pattern is neither known nor an M x M matrix of 0 and 1.
    """
    if pattern == "full":
        return None
    if pattern == "within_modality":
        return torch.eye(modalities, dtype=torch.bool)
    rows = None if isinstance(pattern, str) else [list(row) for row in pattern]
    if rows is None or len(rows) != modalities or any(len(row) != modalities for row in rows):
        raise ValueError(
            f"{key} must be 'full', 'within_modality' or {modalities} rows of {modalities} zeros and ones, "
            f"got {pattern!r}"
        )
    if any(value not in (0, 1) for row in rows for value in row):
        raise ValueError(f"{key} must hold only 0 and 1, got {pattern!r}")
    return torch.tensor(rows, dtype=torch.bool)


def sincos_positions(length: int, dim: int) -> Tensor:
    """float32 (length, dim): [sin(p / 10000^(2i/dim)) for all i, then cos of the same], i in 0 .. dim/2 - 1."""
    frequency = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def sum_by_modality(values: Tensor, modalities: Tensor, count: int) -> Tensor:
    """float32 (count,): sums of values (T,) by modality (T,).

    No index_add_, whose order of summation varies on a GPU; no product, which autocast would round to bfloat16; no
    F.one_hot, which asks a CPU for values.
    """
    chosen = modalities.unsqueeze(1) == torch.arange(count, device=modalities.device)
    return values.float().unsqueeze(1).masked_fill(~chosen, 0.0).sum(0)


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
    """A stack of blocks; exists so that parameters are called `encoder.blocks.0...` as in nano4M."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, *context)
        return x


class M4(nn.Module):
    """The model. `model(masked_batch)` gives the training loss, `model.logits(masked_batch)` the predictions."""

    pos_emb: Tensor
    vocab_limits: Tensor
    allow_encoder: Tensor | None
    allow_decoder: Tensor | None
    allow_cross: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim, modalities = config.dim, len(config.modalities)
        self.enc_tok_emb = nn.Embedding(config.vocabulary, dim)
        self.enc_mod_emb = nn.Embedding(modalities, dim)
        self.dec_mod_emb = nn.Embedding(modalities, dim)
        self.register_buffer("pos_emb", sincos_positions(max(config.max_seq_lens), dim))
        self.encoder = Trunk([EncoderBlock(config) for _ in range(config.enc_depth)])
        self.enc_norm = norm(dim)
        self.dec_context_proj = nn.Linear(dim, dim, bias=True)
        self.decoder = Trunk([DecoderBlock(config) for _ in range(config.dec_depth)])
        self.dec_norm = norm(dim)
        self.to_logits = nn.Linear(dim, config.vocabulary, bias=False)
        for name in ("encoder", "decoder", "cross"):
            pattern = allow_matrix(getattr(config.attention, name), modalities, f"attention.{name}")
            self.register_buffer(f"allow_{name}", pattern, persistent=False)
        self.register_buffer("vocab_limits", torch.tensor(list(config.vocab_sizes)), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights from N(0, 0.02²); norms at 1, biases and the output layer at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(self.dec_context_proj.bias)
        nn.init.zeros_(self.to_logits.weight)

    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, batch: MaskedBatch, target_counts: Tensor | None = None) -> Losses:
        """Training loss of a masked batch.

        Args:
            batch: visible tokens and targets.
            target_counts: (M,), denominators of the per-modality means in place of the batch's own counts. With the
                counts of a global batch the totals of its micro-batches add up to the global batch's loss.
        """
        if self.config.kernels != "auto":
            return Losses(*padded_losses(self, batch, target_counts))
        return self.loss(self.decode(batch), batch.decoder, target_counts)

    def embed_inputs(self, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
        """(token + modality + position embedding (T, D), position embedding (T, D)) of visible tokens."""
        positions = F.embedding(tokens.positions, self.pos_emb)
        return self.enc_tok_emb(tokens.ids) + self.enc_mod_emb(tokens.modalities) + positions, positions

    def embed_queries(self, tokens: PackedTokens) -> Tensor:
        """Modality + position embedding (T, D): all that the decoder knows of a target."""
        return self.dec_mod_emb(tokens.modalities) + F.embedding(tokens.positions, self.pos_emb)

    def decode(self, batch: MaskedBatch) -> Tensor:
        """Decoder output (T_dec, D) for every target."""
        visible, targets = batch.encoder, batch.decoder
        x, positions = self.embed_inputs(visible)
        x = self.enc_norm(self.encoder(x, visible.segments, self.allow_encoder))
        context = self.dec_context_proj(x) + positions
        y = self.decoder(
            self.embed_queries(targets),
            context,
            targets.segments,
            visible.segments,
            self.allow_decoder,
            self.allow_cross,
        )
        return self.dec_norm(y)

    def vocab_limit(self, tokens: PackedTokens) -> Tensor | None:
        """Classes of each token's modality (T,), None where all modalities have the whole vocabulary."""
        if min(self.config.vocab_sizes) == self.config.vocabulary:
            return None
        return self.vocab_limits[tokens.modalities]

    def loss(self, y: Tensor, targets: PackedTokens, target_counts: Tensor | None = None) -> Losses:
        """Mean over modalities of the mean token cross-entropy; a modality without targets counts as 0."""
        counts = targets.segments.counts.sum(0, dtype=torch.int64)
        denominators = (counts if target_counts is None else target_counts).clamp(min=1).float()
        weight = 1.0 / (len(self.config.modalities) * denominators)
        result = linear_cross_entropy(
            y,
            self.to_logits.weight,
            targets.ids,
            token_weight=weight[targets.modalities],
            vocab_limit=self.vocab_limit(targets),
        )
        return Losses(result.loss, sum_by_modality(result.nll, targets.modalities, len(counts)) / denominators, counts)

    def logits(self, batch: MaskedBatch) -> Tensor:
        """Logits (T_dec, V) of every target, -inf beyond the vocabulary of its modality. Holds them whole: meant for
        generation, not for training."""
        logits = self.to_logits(self.decode(batch))
        limit = self.vocab_limit(batch.decoder)
        if limit is None:
            return logits
        return logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= limit[:, None], -torch.inf)
