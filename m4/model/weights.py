"""Weights in files, loaded by name."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from m4.distributed.shards import like, local_part
from m4.errors import CheckpointError


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a .pth or .safetensors checkpoint")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # nano4M stores its arguments beside the weights
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as weights: {reason}; "
            "expected a .safetensors file, or a torch.save of tensors only"
        ) from error
    weights = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not all(isinstance(t, torch.Tensor) for t in weights.values()):
        raise CheckpointError(f"{path}: expected a state dict, or a dict with one under 'model'")
    return weights


def load_matching(weights: dict[str, torch.Tensor], model: nn.Module, source: str) -> None:
    """Load by name; one error lists every missing, unexpected and wrong-shaped key. Of a model that is divided over
    ranks, each loads its part."""
    expected = model.state_dict()
    faults = [f"missing {name} {tuple(tensor.shape)}" for name, tensor in expected.items() if name not in weights]
    for name, tensor in weights.items():
        if name not in expected:
            faults.append(f"unexpected {name} {tuple(tensor.shape)}")
        elif tensor.shape != expected[name].shape:
            faults.append(f"{name}: expected shape {tuple(expected[name].shape)}, got {tuple(tensor.shape)}")
    if faults:
        raise CheckpointError(f"{source}: does not fit the model: {'; '.join(faults)}")
    model.load_state_dict({name: like(tensor, expected[name]) for name, tensor in weights.items()})


def first_not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Name of the first tensor that holds an infinity or NaN, or None; a GPU is asked once for all (of one device). Of
    divided tensors this rank's part is meant."""
    names, finite = [], []
    for name, tensor in named:
        names.append(name)
        finite.append(torch.isfinite(local_part(tensor)).all())
    answers = torch.stack(finite).tolist() if finite else []
    return next((name for name, answer in zip(names, answers, strict=True) if not answer), None)
