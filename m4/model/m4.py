"""The M4 model: an encoder-decoder transformer over packed, masked multimodal tokens (4M, Mizrahi et al. 2023).

The encoder reads the visible tokens of every modality together; the decoder predicts the target tokens from their
modality and position alone, in one parallel step. Parameter names and semantics are nano4M's, so its checkpoints load
by name (see `m4.checkpoint.load_nano4m`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4.device import total_memory
from m4.modalities import IMAGE_LEVELS
from m4.model import init
from m4.model.config import ModelConfig, allow_matrix
from m4.model.layers import POSITION_BASE, DecoderBlock, EncoderBlock, Trunk, norm, normed
from m4.model.padded import padded_losses
from m4kernels import MaskedBatch, PackedTokens, Segments, embedding, linear, linear_cross_entropy

LOSS_WORKSPACE = 2**28  # bytes: on a CPU, and at least
MOST_LOSS_WORKSPACE = 2**30  # on a GPU: more does not make M4's loss faster (H200, benchmarks/NOTES.md)


class CountedLosses(NamedTuple):
    """As `Losses`, with the right predictions."""

    total: Tensor
    per_modality: Tensor
    counts: Tensor
    correct: Tensor  # (M,) float32, targets of each modality whose id is the likeliest; detached


class Losses(NamedTuple):
    """What a forward pass returns; M = number of modalities."""

    total: Tensor  # (), the mean of per_modality; differentiable
    per_modality: Tensor  # (M,) float32, mean token cross-entropy in nats; 0 for a modality without targets; detached
    counts: Tensor  # (M,) int64, targets of each modality


def sincos_positions(length: int, dim: int) -> Tensor:
    """float32 (length, dim): [sin(p / 10000^(2i/dim)) for all i, then cos of the same], i in 0 .. dim/2 - 1."""
    frequency = POSITION_BASE ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def sum_by_modality(values: Tensor, modalities: Tensor, count: int) -> Tensor:
    """float32 (count,): sums of values (T,) by modality (T,).

    No index_add_, whose order of summation varies on a GPU; no product, which autocast would round to bfloat16; no
    F.one_hot, which asks a CPU for values.
    """
    chosen = modalities.unsqueeze(1) == torch.arange(count, device=modalities.device)
    return values.float().unsqueeze(1).masked_fill(~chosen, 0.0).sum(0)


def loss_workspace(device: torch.device) -> int:
    """Bytes that the loss may take besides its gradients: a sixteenth of a GPU's memory but at most
    `MOST_LOSS_WORKSPACE`, elsewhere `LOSS_WORKSPACE`.

    The logits of M4's micro-batch of 96 samples, 1.4 GB in bfloat16, are then two chunks on GPUs from 16 GB on. A share
    of all memory, not of what is free: chunks decide the order of sums, and the bits of a resumed run must not depend
    on who else uses the GPU.
    """
    if device.type != "cuda":
        return LOSS_WORKSPACE
    return min(MOST_LOSS_WORKSPACE, max(LOSS_WORKSPACE, total_memory(device) // 16))


class M4(nn.Module):
    """The model. `model(masked_batch)` gives the training loss, `model.logits(masked_batch)` the predictions."""

    pos_emb: Tensor
    vocab_limits: Tensor
    allow_encoder: Tensor | None
    allow_decoder: Tensor | None
    allow_cross: Tensor | None

    def __init__(self, config: ModelConfig, code_levels: Sequence[int] = IMAGE_LEVELS) -> None:
        """code_levels: how many levels each digit of an image code has, fastest first, for the initial values."""
        super().__init__()
        self.config, self.code_levels = config, tuple(code_levels)
        dim, modalities = config.dim, len(config.modalities)
        self.enc_tok_emb = nn.Embedding(config.vocabulary, dim)
        self.enc_mod_emb = nn.Embedding(modalities, dim)
        self.dec_mod_emb = nn.Embedding(modalities, dim)
        self.register_buffer("pos_emb", sincos_positions(max(config.max_seq_lens), dim))
        self.encoder = Trunk([EncoderBlock(config) for _ in range(config.enc_depth)], config.activation_checkpointing)
        self.enc_norm = norm(dim)
        self.dec_context_proj = nn.Linear(dim, dim, bias=True)
        self.decoder = Trunk([DecoderBlock(config) for _ in range(config.dec_depth)], config.activation_checkpointing)
        self.dec_norm = norm(dim)
        self.to_logits = nn.Linear(dim, config.vocabulary, bias=False)
        for name in ("encoder", "decoder", "cross"):
            pattern = allow_matrix(getattr(config.attention, name), modalities, f"attention.{name}")
            self.register_buffer(f"allow_{name}", pattern, persistent=False)
        self.register_buffer("vocab_limits", torch.tensor(list(config.vocab_sizes)), persistent=False)
        self.loss_workspace = loss_workspace(self.to_logits.weight.device)
        self.init_weights()

    def _apply(self, *args: Any, **others: Any) -> "M4":
        """What `to` and `cuda` call: the model may be on another device then. (torch.compile cannot ask for its memory
        within `forward`.)"""
        super()._apply(*args, **others)
        self.loss_workspace = loss_workspace(self.to_logits.weight.device)
        return self

    def init_weights(self) -> None:
        """Initial values by ``config.init``, drawn from the global generator."""
        init.normal(self.modules())
        nn.init.zeros_(self.to_logits.weight)
        if self.config.init == "fourier":
            init.fourier(self, self.code_levels)

    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self, batch: MaskedBatch, target_counts: Tensor | None = None, *, count_correct: bool = False
    ) -> Losses | CountedLosses:
        """Training loss of a masked batch.

        Args:
            batch: visible tokens and targets.
            target_counts: (M,), denominators of the per-modality means in place of the batch's own counts. With the
                counts of a global batch the totals of its micro-batches add up to the global batch's loss.
            count_correct: return `CountedLosses`.
        """
        if self.config.kernels != "auto":
            losses = CountedLosses(*padded_losses(self, batch, target_counts))
        else:
            losses = self.counted_loss(self.decode(batch), batch.decoder, target_counts)
        return losses if count_correct else Losses(*losses[:3])

    def embed_inputs(self, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
        """(token + modality + position embedding (T, D), position embedding (T, D)) of visible tokens."""
        positions = F.embedding(tokens.positions, self.pos_emb)
        # M4KERNELS_BACKEND may name one that this op lacks.
        embedded = embedding(self.enc_tok_emb.weight, tokens.ids, backend="auto")
        return embedded + self.enc_mod_emb(tokens.modalities) + positions, positions

    def embed_queries(self, tokens: PackedTokens) -> Tensor:
        """Modality + position embedding (T, D): all that the decoder knows of a target."""
        return self.dec_mod_emb(tokens.modalities) + F.embedding(tokens.positions, self.pos_emb)

    def decode(self, batch: MaskedBatch) -> Tensor:
        """Decoder output (T_dec, D) for every target."""
        return self.answer(batch.decoder, self.context(batch.encoder), batch.encoder.segments)

    def encode(self, visible: PackedTokens) -> tuple[Tensor, Tensor]:
        """(encoder output (T_enc, D), position embedding (T_enc, D)) of visible tokens."""
        x, positions = self.embed_inputs(visible)
        x, update = self.encoder(x, visible.segments, self.allow_encoder)
        return normed(self.enc_norm, x, update)[0], positions

    def context(self, visible: PackedTokens) -> Tensor:
        """What the decoder reads of visible tokens (T_enc, D)."""
        x, positions = self.encode(visible)
        return linear(x, self.dec_context_proj.weight, self.dec_context_proj.bias, residual=positions)

    def answer(self, targets: PackedTokens, context: Tensor, context_segments: Segments) -> Tensor:
        """Decoder output (T_dec, D) for every target, from the `context` of visible tokens."""
        y, update = self.decoder(
            self.embed_queries(targets),
            context,
            targets.segments,
            context_segments,
            self.allow_decoder,
            self.allow_cross,
        )
        # In the stream's dtype under autocast too: the loss rounds what it multiplies, and its gradient is not rounded.
        return normed(self.dec_norm, y, update, y.dtype)[0]

    def vocab_limit(self, tokens: PackedTokens) -> Tensor | None:
        """Classes of each token's modality (T,), None where all modalities have the whole vocabulary."""
        if min(self.config.vocab_sizes) == self.config.vocabulary:
            return None
        return self.vocab_limits[tokens.modalities]

    def loss(self, y: Tensor, targets: PackedTokens, target_counts: Tensor | None = None) -> Losses:
        """Mean over modalities of the mean token cross-entropy; a modality without targets counts as 0."""
        return Losses(*self.counted_loss(y, targets, target_counts)[:3])

    def counted_loss(self, y: Tensor, targets: PackedTokens, target_counts: Tensor | None = None) -> CountedLosses:
        """As `loss`."""
        counts = targets.segments.counts.sum(0, dtype=torch.int64)
        denominators = (counts if target_counts is None else target_counts).clamp(min=1).float()
        weight = 1.0 / (len(self.config.modalities) * denominators)
        result = linear_cross_entropy(
            y,
            self.to_logits.weight,
            targets.ids,
            token_weight=weight[targets.modalities],
            vocab_limit=self.vocab_limit(targets),
            max_workspace_bytes=self.loss_workspace,
        )
        nll, correct = (sum_by_modality(x, targets.modalities, len(counts)) for x in (result.nll, result.correct))
        return CountedLosses(result.loss, nll / denominators, counts, correct)

    def logits(self, batch: MaskedBatch) -> Tensor:
        """Logits (T_dec, V) of every target, -inf beyond the vocabulary of its modality. Holds them whole: meant for
        generation, not for training."""
        logits = self.to_logits(self.decode(batch))
        limit = self.vocab_limit(batch.decoder)
        if limit is None:
            return logits
        return logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= limit[:, None], -torch.inf)
