"""The baseline of every end-to-end figure: M4's loss on padded batches, with dense boolean masks and whole logits.

It runs the weights of an `m4.model.m4.M4` the way nano4M trains: samples padded to a common width, attention either as
PyTorch's scaled_dot_product_attention with a dense mask (`kernels: reference`) or as matmul + masked softmax
(`kernels: reference-matmul`), logits of every slot at once. Plain PyTorch; no kernel of ours is called.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4.model.config import ModelConfig
from m4.model.layers import MLP, CrossAttention, SelfAttention, Trunk
from m4kernels import MaskedBatch
from m4kernels.segments import IGNORE_INDEX


class Weights(Protocol):
    """What is read here of an `m4.model.m4.M4`."""

    config: ModelConfig
    enc_tok_emb: nn.Embedding
    enc_mod_emb: nn.Embedding
    dec_mod_emb: nn.Embedding
    pos_emb: Tensor
    encoder: Trunk
    enc_norm: nn.LayerNorm
    dec_context_proj: nn.Linear
    decoder: Trunk
    dec_norm: nn.LayerNorm
    to_logits: nn.Linear
    vocab_limits: Tensor
    allow_encoder: Tensor | None
    allow_decoder: Tensor | None
    allow_cross: Tensor | None


def padded_losses(model: Weights, batch: MaskedBatch, target_counts: Tensor | None) -> tuple[Tensor, ...]:
    """(total, per_modality, counts, correct) as in `m4.model.m4.CountedLosses`."""
    p = batch.padded()
    matmul = model.config.kernels == "reference-matmul"
    enc_mask, dec_mask = p["enc_pad_mask"], p["dec_pad_mask"]  # (B, N), True = valid
    enc_mods, dec_mods = p["enc_modalities"], p["dec_modalities"]

    enc_to_enc = dense_mask(enc_mask, enc_mods, enc_mods, model.allow_encoder)
    dec_to_dec = dense_mask(dec_mask, dec_mods, dec_mods, model.allow_decoder)
    dec_to_enc = dense_mask(enc_mask, dec_mods, enc_mods, model.allow_cross)

    positions = F.embedding(p["enc_positions"], model.pos_emb)
    x = model.enc_tok_emb(p["enc_tokens"]) + model.enc_mod_emb(enc_mods) + positions
    block: Any
    for block in model.encoder.blocks:
        x = x + self_attention(block.attn, block.norm1(x), enc_to_enc, matmul)
        x = x + mlp(block.mlp, block.norm2(x))
    context = model.dec_context_proj(model.enc_norm(x)) + positions

    y = model.dec_mod_emb(dec_mods) + F.embedding(p["dec_positions"], model.pos_emb)
    for block in model.decoder.blocks:
        y = y + self_attention(block.self_attn, block.norm1(y), dec_to_dec, matmul)
        y = y + cross_attention(block.cross_attn, block.query_norm(y), block.context_norm(context), dec_to_enc, matmul)
        y = y + mlp(block.mlp, block.norm2(y))
    logits = model.to_logits(model.dec_norm(y))  # (B, N, V)
    if min(model.config.vocab_sizes) < model.config.vocabulary:
        classes = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill(classes >= model.vocab_limits[dec_mods].unsqueeze(-1), -torch.inf)

    targets = p["dec_tokens"].masked_fill(~dec_mask, IGNORE_INDEX)
    nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    of_modality = dec_mods.flatten().unsqueeze(-1) == torch.arange(len(model.config.modalities), device=nll.device)
    of_modality &= dec_mask.flatten().unsqueeze(-1)
    counts = of_modality.sum(0)
    denominators = (counts if target_counts is None else target_counts).clamp(min=1).float()
    per_modality = nll.unsqueeze(-1).masked_fill(~of_modality, 0.0).sum(0) / denominators
    right = (logits.detach().argmax(-1) == p["dec_tokens"]).flatten()
    correct = (of_modality & right.unsqueeze(-1)).sum(0).float()
    return per_modality.mean(), per_modality.detach(), counts, correct


def dense_mask(key_valid: Tensor, q_mods: Tensor, k_mods: Tensor, allow: Tensor | None) -> Tensor:
    """bool (B, 1, Nq, Nk), True where the query may attend to the key."""
    mask = key_valid[:, None, None, :].expand(-1, 1, q_mods.shape[1], -1)
    return mask if allow is None else mask & allow[q_mods.unsqueeze(-1), k_mods.unsqueeze(-2)].unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, matmul: bool) -> Tensor:
    """q (B, H, Nq, Dh), k and v (B, H, Nk, Dh), mask (B, 1, Nq, Nk) → (B, Nq, H Dh); 0 for a row without any key."""
    has_key = mask.any(-1, keepdim=True)
    mask = mask | ~has_key  # a softmax over nothing would be NaN; such a row is set to 0 below
    if matmul:
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return (out * has_key).transpose(1, 2).flatten(2)


def split_heads(x: Tensor, parts: int, head_dim: int) -> tuple[Tensor, ...]:
    """(B, N, parts H Dh) → parts tensors (B, H, N, Dh)."""
    return x.unflatten(-1, (parts, -1, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def self_attention(layer: SelfAttention, x: Tensor, mask: Tensor, matmul: bool) -> Tensor:
    q, k, v = split_heads(layer.qkv_proj(x), 3, layer.head_dim)
    return layer.attn_out_proj(attend(q, k, v, mask, matmul))


def cross_attention(layer: CrossAttention, x: Tensor, context: Tensor, mask: Tensor, matmul: bool) -> Tensor:
    (q,) = split_heads(layer.q_proj(x), 1, layer.head_dim)
    k, v = split_heads(layer.kv_proj(context), 2, layer.head_dim)
    return layer.attn_out_proj(attend(q, k, v, mask, matmul))


def mlp(layer: MLP, x: Tensor) -> Tensor:
    return layer.fc2(F.gelu(layer.fc1(x)))
