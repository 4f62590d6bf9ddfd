"""Weights of nano4M's checkpoints, read and written."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from m4.compat.fourm import DEFAULT_READ_KEYS, FourM
from m4.errors import CheckpointError
from m4.files import writable_file, write_atomically
from m4.model import M4, ModelConfig
from m4.model.config import allow_matrix
from m4.model.weights import first_not_finite, load_matching, read_weights
from m4kernels.segments import IGNORE_INDEX

NANO4M_CLASS = "nanofm.models.fourm.FourM"


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


def save_nano4m(model: M4, path: str | Path, *, target: str = NANO4M_CLASS) -> Path:
    """Write the weights of an `M4` or `FourM` as nano4M's own loaders read them.

    Args:
        path: ends with ``.pth``: a ``torch.save`` with the state dict under ``model``, which nano4M's training resumes
            from (``resume``), its optimizer anew. Or with ``.safetensors``: the state dict, and as metadata what the
            class is constructed with, for nano4M's ``load_model_from_safetensors``. The file is whole or absent.
        target: the class that the latter names.

    Returns:
        path
    Raises:
        ValueError: the ending is another, the model has what nano4M's has not, a weight is not finite, or the file
            cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise CheckpointError(f"{path}: expected a name that ends with .pth or .safetensors")
    for name in ("encoder", "decoder", "cross"):
        pattern = getattr(model.config.attention, name)
        allow = allow_matrix(pattern, len(model.config.modalities), f"attention.{name}")
        if allow is not None and not bool(allow.all()):
            raise CheckpointError(f"{path}: nano4M has full attention only, but attention.{name} is {pattern!r}")
    state = _nano4m_state(model)
    spoilt = first_not_finite(state.items())
    if spoilt is not None:
        raise CheckpointError(f"{path}: not written, since the weights of {spoilt} are not finite")
    try:
        writable_file(path)
        if path.suffix == ".pth":
            content = io.BytesIO()
            torch.save({"model": state}, content)
            write_atomically(path, content.getvalue())
        else:
            described = {"_target_": target, **_constructed_with(model)}
            write_atomically(path, save(state, {name: str(value) for name, value in described.items()}))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from error
    return path


def _nano4m_state(model: M4) -> dict[str, Tensor]:
    """The state dict with the zero ``bias`` of every norm, on the CPU."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            state.setdefault(f"{name}.bias", torch.zeros_like(state[f"{name}.weight"]))
    return state


def _constructed_with(model: M4) -> dict[str, Any]:
    """Arguments of nano4M's FourM for this model."""
    c = model.config
    keys, sizes, averaged, padding = DEFAULT_READ_KEYS, c.vocab_sizes, True, IGNORE_INDEX
    if isinstance(model, FourM):
        keys, sizes = model.read_keys, model.vocab_sizes
        averaged, padding = model.per_modality_loss_avg, model.padding_idx
    lists = {"modalities": list(c.modalities), "vocab_sizes": list(sizes), "max_seq_lens": list(c.max_seq_lens)}
    shape = {name: getattr(c, name) for name in ("dim", "enc_depth", "dec_depth", "head_dim", "mlp_ratio")}
    return {**keys, **lists, **shape, "padding_idx": padding, "per_modality_loss_avg": averaged}
