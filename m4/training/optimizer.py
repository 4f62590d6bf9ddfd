"""AdamW with decay groups, and the learning rate as a function of counted tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from m4.config import TrainConfig
from m4.distributed.shards import like

BETAS = (0.9, 0.95)
EPS = 1e-8
VOCABULARY = ("enc_tok_emb.weight", "to_logits.weight")  # a row for every id


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weights and embeddings decay, norms and biases (fewer than two dimensions) do not.

    The rows of the vocabulary (token embedding and output layer) have a group of their own where their learning rate
    is another, ``config.vocab_lr_scale`` times the rate.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [(name, p) for name, p in named if p.ndim >= 2]
    apart = VOCABULARY if config.vocab_lr_scale != 1 else ()
    groups = [
        {"params": [p for name, p in weights if name not in apart], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        {
            "params": [p for name, p in weights if name in apart],
            "weight_decay": config.weight_decay,
            "lr_scale": config.vocab_lr_scale,
        },
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=BETAS, eps=EPS, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of every group, times its ``lr_scale``; in place where it is a tensor, which a captured step reads."""
    for group in optimizer.param_groups:
        scaled = rate * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Moments and step counts of a checkpoint; the groups' settings stay those of this run and device.

    Of parameters that are divided over ranks, each takes its part.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {
            kind: like(value, parameters[number]) if getattr(value, "ndim", 0) else value
            for kind, value in of_one.items()
        }
        for number, of_one in saved["state"].items()
    }
    kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict({**saved, "state": state})
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)
