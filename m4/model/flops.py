"""What a training step computes, by the usual convention: the products of the weights with the tokens they apply to."""

from __future__ import annotations

from collections.abc import Sequence

from m4.model.config import ModelConfig


def training_flop(model: ModelConfig, inputs: float, targets: Sequence[float]) -> float:
    """Floating-point operations of forward and backward: 6 · Σ tokens · weights that multiply them.

    A product and a sum count as two; the backward pass as twice the forward pass, whether or not blocks are computed
    again in it. Counted are the linear layers and the output layer, a target's with the classes of its modality. Not
    counted: products of queries, keys and values (below 3 % for M4), norms, embeddings, and the optimiser.

    Args:
        inputs: visible tokens.
        targets: (M,), targets of each modality.
    """
    dim, hidden = model.dim, int(model.dim * model.mlp_ratio)
    visible = model.enc_depth * (4 * dim**2 + 2 * dim * hidden)  # queries, keys, values, output; the MLP
    visible += dim**2 + model.dec_depth * 2 * dim**2  # as context: its projection, keys and values of every block
    target = model.dec_depth * (6 * dim**2 + 2 * dim * hidden)  # … and queries and output of cross-attention
    classes = sum(n * size for n, size in zip(targets, model.vocab_sizes, strict=True))
    return 6.0 * (inputs * visible + sum(targets) * target + classes * dim)
