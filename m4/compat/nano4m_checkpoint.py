"""Weights of nano4M's checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from m4.errors import CheckpointError
from m4.model import M4, ModelConfig
from m4.model.weights import load_matching, read_weights


def load_nano4m(source: str | Path | dict[str, torch.Tensor], config: ModelConfig) -> M4:
    """An `M4` with the weights of a nano4M model.

    Args:
        source: a ``.safetensors`` file; a ``.pth`` file (``torch.save`` of a state dict, or of a dict that holds it
            under ``model``); or the state dict itself. Names and shapes are nano4M's. LayerNorm ``bias`` buffers
            are accepted where they are zero.
    Raises:
        ValueError: the file cannot be read, or keys are missing, unexpected or of another shape (all are listed).
    """
    origin = "state dict" if isinstance(source, dict) else str(source)
    weights = source if isinstance(source, dict) else read_weights(Path(source))
    for prefix in ("_orig_mod.", "module."):  # torch.compile and DistributedDataParallel
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    model = M4(config)
    expected = model.state_dict()
    kept = {}
    for name, tensor in weights.items():
        if name not in expected and re.search(r"norm\w*\.bias$", name):
            if torch.count_nonzero(tensor):
                raise CheckpointError(
                    f"{origin}: {name}: expected a zero LayerNorm bias, got non-zero values; "
                    "the model here has no LayerNorm biases"
                )
        else:
            kept[name] = tensor
    kept.setdefault("pos_emb", model.pos_emb)  # a formula, which some exports leave out
    load_matching(kept, model, origin)
    return model
