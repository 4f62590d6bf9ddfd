"""Checkpoints of a run, written so that a kill at any instant leaves a whole one; and nano4M's weights, in and out."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import nn

import m4kernels
from m4.checkpoint_files import HasWeights
from m4.checkpoint_files import content as _content
from m4.checkpoint_files import digest as _digest
from m4.checkpoint_files import flush as _flush
from m4.checkpoint_files import save_state as _save_state
from m4.checkpoint_files import save_weights as _save_weights
from m4.compat.nano4m_checkpoint import load_nano4m, save_nano4m
from m4.config import TrainConfig, config_from_dict, config_to_dict
from m4.errors import CheckpointError
from m4.model.weights import first_not_finite, load_matching
from m4.same_run import RunIdentity, check_same_run

__all__ = [
    "CheckpointError",
    "RunIdentity",
    "SavedCheckpoint",
    "best_checkpoint",
    "check_same_run",
    "checkpoint_meta",
    "clean_temporaries",
    "load_checkpoint",
    "load_nano4m",
    "load_run",
    "load_weights",
    "newest_whole",
    "read_checkpoint",
    "read_checkpoints",
    "save_checkpoint",
    "save_nano4m",
    "step_folders",
    "whole_checkpoints",
]

log = logging.getLogger(__name__)

MODEL_FILE, STATE_FILE, META_FILE = "model.safetensors", "state.pt", "meta.json"
EMA_FILE = "ema.safetensors"  # averaged weights, where there are some
FORMAT = 1
_META_KEYS = {"step": int, "data_fingerprint": str, "samples_per_step": int, "config": dict, "files": dict}


@dataclass(frozen=True)
class SavedCheckpoint:
    """A whole checkpoint, read and compared with its digests in one go."""

    path: Path
    meta: dict[str, Any]
    weights: dict[str, torch.Tensor]
    state: dict[str, Any]  # as given to `save_checkpoint`
    averaged: dict[str, torch.Tensor] | None = None


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: HasWeights,
    state: dict[str, Any],
    config: TrainConfig,
    identity: RunIdentity,
    evaluation_loss: float | None = None,
    averaged: HasWeights | None = None,
) -> Path:
    """Write ``checkpoints/step-XXXXXXXX``; keep the newest ``keep_ckpts`` and the ``keep_best`` with the lowest losses.

    The folder is written under a temporary name, flushed to disk and renamed, so it is either absent or whole.

    Args:
        state: optimizer, loop and random state: anything ``torch.load(weights_only=True)`` reads.
        evaluation_loss: of these very weights; None where they were not evaluated, and so are not among the best.
        averaged: the model with averaged weights.
    Raises:
        CheckpointError: the disk is full or cannot be written; what was saved before is untouched.
    """
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    clean_temporaries(run_dir)
    final, temporary = _step_dir(run_dir, step), folder / f".tmp-{step:08d}-{os.getpid()}"
    try:
        temporary.mkdir()
        names = [MODEL_FILE, STATE_FILE]
        _save_weights(model, temporary / MODEL_FILE)
        if averaged is not None:
            names.append(EMA_FILE)
            _save_weights(averaged, temporary / EMA_FILE)
        _save_state(state, temporary / STATE_FILE)
        meta = {
            "format": FORMAT,
            "step": step,
            **asdict(identity),
            "evaluation_loss": evaluation_loss,
            "config": config_to_dict(config),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": numpy.__version__,
                "m4kernels": m4kernels.__version__,
            },
            "files": {name: _digest(temporary / name) for name in names},
        }
        (temporary / META_FILE).write_text(json.dumps(meta, indent=1))
        for name in (*names, META_FILE):
            _flush(temporary / name)
        _flush(temporary)
        if final.exists():  # a damaged one of the same step
            _remove(final)
        temporary.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors wraps a failed write in an error of its own.
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        free = shutil.disk_usage(folder).free / 1e9
        raise CheckpointError(
            f"{final}: cannot be written: {error}; the unfinished copy is removed and earlier checkpoints are intact. "
            f"{free:.2f} GB are free there: make room (or set output_dir) and start the same command again"
        ) from error
    _drop_others(run_dir, final, config)
    return final


def _drop_others(run_dir: Path, final: Path, config: TrainConfig) -> None:
    """Remove what is neither among the newest nor among the best up to ``final``."""
    here = [path for path in step_folders(run_dir) if path.name <= final.name]
    best = sorted((loss, -place) for place, path in enumerate(here) if (loss := _evaluation_loss(path)) is not None)
    kept = {*here[-config.keep_ckpts :], *(here[-place] for _, place in best[: config.keep_best])}
    for path in here:
        if path not in kept:
            _remove(path)


def _evaluation_loss(path: Path) -> float | None:
    """What the meta data of a checkpoint say, damaged or not."""
    try:
        loss = json.loads((path / META_FILE).read_bytes())["evaluation_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def read_checkpoint(path: Path) -> SavedCheckpoint:
    """Read a checkpoint folder, each file once. Raises CheckpointError if it is damaged or its weights not finite."""
    meta = _read_meta(path)
    weights = _finite_weights(path, meta, MODEL_FILE)
    averaged = _finite_weights(path, meta, EMA_FILE) if EMA_FILE in meta["files"] else None
    content = io.BytesIO(_content(path / STATE_FILE, meta["files"][STATE_FILE]))
    state = torch.load(content, map_location="cpu", weights_only=True)
    return SavedCheckpoint(path, meta, weights, state, averaged)


def _finite_weights(path: Path, meta: dict[str, Any], name: str) -> dict[str, torch.Tensor]:
    weights = load(_content(path / name, meta["files"][name]))
    spoilt = first_not_finite(weights.items())
    if spoilt is not None:
        raise CheckpointError(f"{path}: the weights of {spoilt} are not finite, the run had diverged there")
    return weights


def read_checkpoints(run_dir: Path) -> Iterator[SavedCheckpoint]:
    """The checkpoints of a run that `read_checkpoint` takes, the newest first; the log says which are left out."""
    for path in reversed(step_folders(run_dir)):
        try:
            saved = read_checkpoint(path)
        except CheckpointError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
            continue
        yield saved


def whole_checkpoints(run_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """As `read_checkpoints`, where and with which meta data only."""
    for path in reversed(step_folders(run_dir)):
        try:
            meta = _check_content(path)
        except CheckpointError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
            continue
        yield path, meta


def newest_whole(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The first of `whole_checkpoints`, or None."""
    return next(whole_checkpoints(run_dir), None)


def best_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The whole checkpoint with the lowest evaluation loss, the newer of equal ones; None where none was evaluated."""
    found = [one for one in whole_checkpoints(run_dir) if one[1].get("evaluation_loss") is not None]
    return min(found, key=lambda one: one[1]["evaluation_loss"], default=None)


def checkpoint_meta(path: Path) -> dict[str, Any]:
    """Meta data of a checkpoint folder. Raises CheckpointError if it is damaged, or none, or its weights not finite."""
    return _check_content(path)


def load_checkpoint(path: Path, model: nn.Module) -> dict[str, Any]:
    """Load the weights into ``model`` (in place) and return the ``state`` given to `save_checkpoint`."""
    saved = read_checkpoint(path)
    load_matching(saved.weights, model, str(path / MODEL_FILE))
    return saved.state


def checkpoint_bytes(model: nn.Module, *, averaged: bool = False) -> int:
    """What a checkpoint takes on the disk: the weights, two moments of each that is trained, and averaged weights."""
    return sum(p.numel() * p.element_size() * ((3 if p.requires_grad else 1) + averaged) for p in model.parameters())


def load_weights(path: Path, model: nn.Module, *, averaged: bool = False) -> None:
    """Load the weights of a checkpoint folder, or the averaged ones, into ``model``, in place."""
    file = path / (EMA_FILE if averaged else MODEL_FILE)
    load_matching(load_file(file), model, str(file))


def load_run(run_dir: str | Path) -> tuple[TrainConfig, Path]:
    """The configuration of a run as saved in its newest whole checkpoint, and that checkpoint's folder."""
    found = newest_whole(Path(run_dir))
    if found is None:
        raise CheckpointError(f"{run_dir}: holds no whole checkpoint (checkpoints/step-…); train the run first")
    path, meta = found
    return config_from_dict(meta["config"]), path


def clean_temporaries(run_dir: Path) -> None:
    """Remove what a killed process left half written or half deleted."""
    for path in (run_dir / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(path)


def _read_meta(path: Path) -> dict[str, Any]:
    """Meta data of a checkpoint whose files are all there and of the right size."""
    try:
        meta = json.loads((path / META_FILE).read_text())
        files = meta["files"]
        if meta["format"] != FORMAT:
            raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, got {meta['format']}")
        for key, kind in _META_KEYS.items():
            if not isinstance(meta[key], kind):
                raise TypeError(f"{key} is a {type(meta[key]).__name__}, expected {kind.__name__}")
        for name in {MODEL_FILE: 0, STATE_FILE: 0, **files}:
            size = (path / name).stat().st_size
            if size != files[name]["bytes"]:
                raise CheckpointError(f"{path / name}: expected {files[name]['bytes']} bytes, got {size}")
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path / META_FILE}: cannot be read ({reason})") from None
    return meta


def _check_content(path: Path) -> dict[str, Any]:
    """Meta data of a whole checkpoint with finite weights; raises CheckpointError."""
    meta = _read_meta(path)
    for name in (MODEL_FILE, EMA_FILE):
        if name in meta["files"]:
            _finite_weights(path, meta, name)
    if _digest(path / STATE_FILE) != meta["files"][STATE_FILE]:
        raise CheckpointError(f"{path / STATE_FILE}: content does not match its checksum")
    return meta


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a kill midway leaves a temporary, not a broken checkpoint."""
    outdated = path.with_name(f".tmp-old-{path.name}")
    path.rename(outdated)
    shutil.rmtree(outdated)


def _step_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_folders(run_dir: Path) -> list[Path]:
    """The folders of a run's checkpoints, whole or not, the oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))
