"""An independent model with nano4M's semantics for the parity tests: functional, padded, one sample at a time.

It shares no code with m4 or m4kernels: it reads a state dict by nano4M's names and a padded batch, and loops over
samples, heads and tokens' masks in the most literal way.
"""

import math

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weight


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, head_dim: int) -> Tensor:
    """q (N, D), k and v (K, D), mask (N, K) True = may attend."""
    heads = []
    for h in range(q.shape[1] // head_dim):
        part = slice(h * head_dim, (h + 1) * head_dim)
        scores = torch.einsum("nd,kd->nk", q[:, part], k[:, part]) / math.sqrt(head_dim)
        weights = torch.where(mask, scores.exp(), torch.zeros_like(scores))
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0, weights / total.clamp_min(1e-300), torch.zeros_like(weights))
        heads.append(weights @ v[:, part])
    return torch.cat(heads, 1)


def may_attend(valid: Tensor, q_mods: Tensor, k_mods: Tensor, allow: list[list[int]] | None) -> Tensor:
    mask = valid[None, :].repeat(len(q_mods), 1)
    if allow is not None:
        for i, mq in enumerate(q_mods.tolist()):
            for j, mk in enumerate(k_mods.tolist()):
                mask[i, j] &= bool(allow[mq][mk])
    return mask


def logits_of_sample(w: dict[str, Tensor], b: dict[str, Tensor], head_dim: int, allow: dict) -> Tensor:
    """Logits (N, V) of one padded sample; `b` holds its rows, `allow` the patterns of encoder, decoder and cross."""
    half = w["pos_emb"].shape[1] // 2
    angles = torch.stack(
        [torch.arange(w["pos_emb"].shape[0], dtype=torch.float64) / 10000 ** (i / half) for i in range(half)], 1
    )
    position_table = torch.cat([torch.sin(angles), torch.cos(angles)], 1).to(w["pos_emb"].dtype)

    enc_pos = position_table[b["enc_positions"]]
    x = w["enc_tok_emb.weight"][b["enc_tokens"]] + w["enc_mod_emb.weight"][b["enc_modalities"]] + enc_pos
    mask = may_attend(b["enc_pad_mask"], b["enc_modalities"], b["enc_modalities"], allow.get("encoder"))
    i = 0
    while (p := f"encoder.blocks.{i}.") + "norm1.weight" in w:
        q, k, v = (layer_norm(x, w[p + "norm1.weight"]) @ w[p + "attn.qkv_proj.weight"].T).chunk(3, -1)
        x = x + attention(q, k, v, mask, head_dim) @ w[p + "attn.attn_out_proj.weight"].T
        x = x + gelu(layer_norm(x, w[p + "norm2.weight"]) @ w[p + "mlp.fc1.weight"].T) @ w[p + "mlp.fc2.weight"].T
        i += 1
    context = layer_norm(x, w["enc_norm.weight"]) @ w["dec_context_proj.weight"].T + w["dec_context_proj.bias"]
    context = context + enc_pos

    y = w["dec_mod_emb.weight"][b["dec_modalities"]] + position_table[b["dec_positions"]]
    self_mask = may_attend(b["dec_pad_mask"], b["dec_modalities"], b["dec_modalities"], allow.get("decoder"))
    cross_mask = may_attend(b["enc_pad_mask"], b["dec_modalities"], b["enc_modalities"], allow.get("cross"))
    i = 0
    while (p := f"decoder.blocks.{i}.") + "norm1.weight" in w:
        q, k, v = (layer_norm(y, w[p + "norm1.weight"]) @ w[p + "self_attn.qkv_proj.weight"].T).chunk(3, -1)
        y = y + attention(q, k, v, self_mask, head_dim) @ w[p + "self_attn.attn_out_proj.weight"].T
        q = layer_norm(y, w[p + "query_norm.weight"]) @ w[p + "cross_attn.q_proj.weight"].T
        k, v = (layer_norm(context, w[p + "context_norm.weight"]) @ w[p + "cross_attn.kv_proj.weight"].T).chunk(2, -1)
        y = y + attention(q, k, v, cross_mask, head_dim) @ w[p + "cross_attn.attn_out_proj.weight"].T
        y = y + gelu(layer_norm(y, w[p + "norm2.weight"]) @ w[p + "mlp.fc1.weight"].T) @ w[p + "mlp.fc2.weight"].T
        i += 1
    return layer_norm(y, w["dec_norm.weight"]) @ w["to_logits.weight"].T


def per_modality_losses(
    w: dict[str, Tensor], padded: dict[str, Tensor], vocab_sizes: tuple[int, ...], head_dim: int, allow: dict
) -> Tensor:
    """(M,) mean cross-entropy of each modality, 0 where it has no target."""
    sums = [w["pos_emb"].new_zeros(()) for _ in vocab_sizes]
    counts = [0] * len(vocab_sizes)
    for s in range(padded["enc_tokens"].shape[0]):
        logits = logits_of_sample(w, {name: value[s] for name, value in padded.items()}, head_dim, allow)
        for n in padded["dec_pad_mask"][s].nonzero().flatten().tolist():
            m = int(padded["dec_modalities"][s, n])
            row = logits[n, : vocab_sizes[m]]
            sums[m] = sums[m] + torch.logsumexp(row, 0) - row[padded["dec_tokens"][s, n]]
            counts[m] += 1
    return torch.stack([total / max(count, 1) for total, count in zip(sums, counts, strict=True)])
