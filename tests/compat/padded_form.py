"""nano4M's model written for the tests: padded batches, dense boolean masks, matmul and masked softmax, whole logits.

It shares no code with m4 or m4kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """LayerNorm whose bias is a buffer of zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_buffer("bias", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-6)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int) -> Tensor:
    """q (B, N, D), k and v (B, K, D), mask (B, N, K)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.heads = dim // head_dim
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attn_out_proj(attend(*self.qkv_proj(x).chunk(3, -1), mask, self.heads))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.heads = dim // head_dim
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.kv_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.attn_out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        return self.attn_out_proj(attend(self.q_proj(x), *self.kv_proj(context).chunk(2, -1), mask, self.heads))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = Norm(dim), SelfAttention(dim, head_dim)
        self.norm2, self.mlp = Norm(dim), Mlp(dim, hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    def __init__(self, dim: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.query_norm, self.context_norm, self.norm2 = Norm(dim), Norm(dim), Norm(dim), Norm(dim)
        self.self_attn, self.cross_attn = SelfAttention(dim, head_dim), CrossAttention(dim, head_dim)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, context: Tensor, self_mask: Tensor, cross_mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x), self_mask)
        x = x + self.cross_attn(self.query_norm(x), self.context_norm(context), cross_mask)
        return x + self.mlp(self.norm2(x))


class Trunk(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class PaddedFourM(nn.Module):
    """``loss, metrics = model(batch)`` as nano4M has it, under its names of parameters and buffers."""

    def __init__(
        self,
        modalities: list[str],
        vocab_sizes: list[int],
        max_seq_lens: list[int],
        dim: int,
        enc_depth: int,
        dec_depth: int,
        head_dim: int,
        mlp_ratio: float = 4.0,
        per_modality_loss_avg: bool = True,
    ) -> None:
        super().__init__()
        self.modalities, self.per_modality_loss_avg = modalities, per_modality_loss_avg
        vocabulary, hidden = max(vocab_sizes), int(dim * mlp_ratio)
        angle = torch.arange(max(max_seq_lens))[:, None] / 10000 ** (torch.arange(dim // 2) / (dim // 2))
        self.register_buffer("pos_emb", torch.cat([angle.sin(), angle.cos()], dim=1))
        self.enc_tok_emb = nn.Embedding(vocabulary, dim)
        self.enc_mod_emb = nn.Embedding(len(modalities), dim)
        self.dec_mod_emb = nn.Embedding(len(modalities), dim)
        self.encoder = Trunk([Block(dim, head_dim, hidden) for _ in range(enc_depth)])
        self.decoder = Trunk([DecoderBlock(dim, head_dim, hidden) for _ in range(dec_depth)])
        self.dec_context_proj = nn.Linear(dim, dim)
        self.to_logits = nn.Linear(dim, vocabulary, bias=False)
        self.enc_norm, self.dec_norm = Norm(dim), Norm(dim)

    def encode(self, tokens: Tensor, modalities: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        positions = self.pos_emb[positions]
        x = self.enc_tok_emb(tokens) + self.enc_mod_emb(modalities) + positions
        for block in self.encoder.blocks:
            x = block(x, mask[:, None].expand(-1, x.shape[1], -1))
        return self.enc_norm(x), positions

    def logits(self, b: dict[str, Tensor]) -> Tensor:
        enc_mask = b.get("enc_pad_mask", torch.ones_like(b["enc_tokens"], dtype=torch.bool))
        dec_mask = b.get("dec_pad_mask", torch.ones_like(b["dec_positions"], dtype=torch.bool))
        x, positions = self.encode(b["enc_tokens"], b["enc_modalities"], b["enc_positions"], enc_mask)
        context = self.dec_context_proj(x) + positions
        y = self.dec_mod_emb(b["dec_modalities"]) + self.pos_emb[b["dec_positions"]]
        for block in self.decoder.blocks:
            width = y.shape[1]
            y = block(y, context, dec_mask[:, None].expand(-1, width, -1), enc_mask[:, None].expand(-1, width, -1))
        return self.to_logits(self.dec_norm(y))

    def forward(self, b: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits, targets = self.logits(b).flatten(0, 1), b["dec_tokens"].flatten()
        if not self.per_modality_loss_avg:
            return F.cross_entropy(logits, targets, ignore_index=-100), {}
        losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
        metrics = {}
        for index, name in enumerate(self.modalities):
            chosen = (b["dec_modalities"].flatten() == index) & (targets != -100)
            metrics[name] = losses[chosen].mean() if chosen.any() else losses.new_zeros(())
        return sum(metrics.values()) / len(metrics), metrics
