"""Checkpoints of a run, written so that a kill at any instant leaves a whole one; and import of nano4M's weights."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import m4kernels
from m4.compat.nano4m_checkpoint import load_nano4m
from m4.config import TrainConfig, config_from_dict, config_to_dict
from m4.errors import CheckpointError
from m4.model.weights import first_not_finite, load_matching

__all__ = [
    "CheckpointError",
    "RunIdentity",
    "check_same_run",
    "checkpoint_meta",
    "clean_temporaries",
    "load_checkpoint",
    "load_nano4m",
    "load_run",
    "load_weights",
    "newest_whole",
    "save_checkpoint",
    "whole_checkpoints",
]

log = logging.getLogger(__name__)

MODEL_FILE, STATE_FILE, META_FILE = "model.safetensors", "state.pt", "meta.json"
FORMAT = 1
_META_KEYS = {"step": int, "data_fingerprint": str, "samples_per_step": int, "config": dict, "files": dict}

# What may change between a checkpoint and the run that resumes it. Everything else makes it another run: data, masks,
# model, samples of a step, seed, length and decay. docs/contracts.md says so too.
FREE_KEYS = {
    "run_name",
    "output_dir",
    "device",
    "compile",
    "cuda_graphs",
    "kernels",
    "parallel",
    "rank_timeout",
    "model.init",
    "stop_after_steps",
    "training_time",
    "keep_ckpts",
    "save_ckpt_freq",
    "eval_freq",
    "eval_samples",
    "eval_seed",
    "eval_generate_samples",
}
FREE_SECTIONS = {"data", "log"}  # the data's content is compared by its fingerprint
BOUND_KEYS = {"data.mirror"}  # of these sections: what training sees
# What checkpoints that lack a key were trained with: it came later.
BEFORE_KEYS = {"data.mirror": False, "vocab_lr_scale": 1.0}
# May change too, which the log says: what helps a run that diverged. Weights, moments and the order of samples keep
# their meaning under another learning rate, clipping or precision; the rate is a function of the tokens so far.
ANNOUNCED_KEYS = {"lr", "min_lr", "token_warmup", "clip_grad", "dtype"}
BATCH_KEYS = {"batch_size", "global_batch_size"}  # compared by their product, the samples a step


@dataclass(frozen=True)
class RunIdentity:
    """What a run is besides its configuration, and the number of ranks, which may change."""

    data_fingerprint: str
    samples_per_step: int
    ranks: int = 1


class HasWeights(Protocol):
    """A model, or what stands for one that is divided over ranks."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: HasWeights,
    state: dict[str, Any],
    config: TrainConfig,
    identity: RunIdentity,
) -> Path:
    """Write ``checkpoints/step-XXXXXXXX`` and drop all but the newest ``keep_ckpts``.

    The folder is written under a temporary name, flushed to disk and renamed, so it is either absent or whole.

    Args:
        state: optimizer, loop and random state: anything ``torch.load(weights_only=True)`` reads.
    Raises:
        CheckpointError: the disk is full or cannot be written; what was saved before is untouched.
    """
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    clean_temporaries(run_dir)
    final, temporary = _step_dir(run_dir, step), folder / f".tmp-{step:08d}-{os.getpid()}"
    try:
        temporary.mkdir()
        save_file({name: t.detach().contiguous() for name, t in model.state_dict().items()}, temporary / MODEL_FILE)
        _save_state(state, temporary / STATE_FILE)
        meta = {
            "format": FORMAT,
            "step": step,
            **asdict(identity),
            "config": config_to_dict(config),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": numpy.__version__,
                "m4kernels": m4kernels.__version__,
            },
            "files": {name: _digest(temporary / name) for name in (MODEL_FILE, STATE_FILE)},
        }
        (temporary / META_FILE).write_text(json.dumps(meta, indent=1))
        for name in (MODEL_FILE, STATE_FILE, META_FILE):
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
    older = sorted(path for path in _step_dirs(run_dir) if path.name <= final.name)
    for path in older[: -config.keep_ckpts]:
        _remove(path)
    return final


def whole_checkpoints(run_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The checkpoints of a run and their meta data, the newest first. Left out, and reported in the log, are those that
    are damaged and those whose weights are not finite."""
    for path in sorted(_step_dirs(run_dir), reverse=True):
        try:
            meta = _read_meta(path)
        except CheckpointError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
            continue
        with safe_open(path / MODEL_FILE, framework="pt") as file:
            spoilt = first_not_finite((name, file.get_tensor(name)) for name in list(file.keys()))
        if spoilt is not None:
            log.warning("skipping %s: the weights of %s are not finite, the run had diverged there", path, spoilt)
            continue
        yield path, meta


def newest_whole(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The first of `whole_checkpoints`, or None."""
    return next(whole_checkpoints(run_dir), None)


def checkpoint_meta(path: Path) -> dict[str, Any]:
    """Meta data of a checkpoint folder. Raises CheckpointError if it is damaged, or none."""
    return _read_meta(path)


def check_same_run(path: Path, meta: dict[str, Any], config: TrainConfig, identity: RunIdentity) -> list[str]:
    """Raise `CheckpointError` naming the first setting in which the checkpoint is of another run.

    Returns:
        A line for each setting that changed and may.
    """
    saved, now = BEFORE_KEYS | _trajectory(meta["config"]), _trajectory(config_to_dict(config))
    names = {
        "samples_per_step": "samples a step (batch_size times accumulation)",
        "data_fingerprint": "data fingerprint",
    }
    for key, name in names.items():
        saved[name], now[name] = meta[key], getattr(identity, key)
    changes = [(key, saved[key], now[key]) for key in now if key in saved and saved[key] != now[key]]
    differences = [change for change in changes if change[0] not in ANNOUNCED_KEYS]
    if differences:
        key, before, after = differences[0]
        more = (
            f" (and {len(differences) - 1} more: {', '.join(d[0] for d in differences[1:])})" if differences[1:] else ""
        )
        remedy = "set it back"
        if key == names["samples_per_step"]:
            remedy = _same_samples(before, config, identity.ranks)
        raise CheckpointError(
            f"{path}: checkpoint of another run: {key} is {before!r} there and {after!r} now{more}; "
            f"{remedy} to resume, or start a new run with run_name=NAME"
        )
    return [f"{key}: {before} in the checkpoint, {after} now" for key, before, after in changes]


def _same_samples(samples: int, config: TrainConfig, ranks: int) -> str:
    """What makes steps of so many samples again."""
    if samples % ranks:
        return f"{ranks} ranks cannot share {samples} samples: start a number of ranks that divides them"
    each = samples // ranks
    size = max(n for n in range(1, min(config.batch_size, each) + 1) if each % n == 0)
    return f"with {ranks} rank{'s' if ranks > 1 else ''} set batch_size={size} global_batch_size={samples}"


def load_checkpoint(path: Path, model: nn.Module) -> dict[str, Any]:
    """Load the weights into ``model`` (in place) and return the ``state`` given to `save_checkpoint`."""
    load_weights(path, model)
    return torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)


def checkpoint_bytes(model: nn.Module) -> int:
    """What a checkpoint takes on the disk: the weights, and two moments of each that is trained."""
    return sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in model.parameters())


def load_weights(path: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint folder into ``model``, in place."""
    load_matching(load_file(path / MODEL_FILE), model, str(path / MODEL_FILE))


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


def _trajectory(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted key → value of what must not change on resuming."""
    flat = {}
    for key, value in config.items():
        inside = {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
        flat.update({k: v for k, v in inside.items() if key not in FREE_SECTIONS or k in BOUND_KEYS})
    return {key: value for key, value in flat.items() if key not in FREE_KEYS | BATCH_KEYS}


def _read_meta(path: Path) -> dict[str, Any]:
    """Meta data of a checkpoint whose files are all there, of the right size and content."""
    try:
        meta = json.loads((path / META_FILE).read_text())
        files = meta["files"]
        if meta["format"] != FORMAT:
            raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, got {meta['format']}")
        for key, kind in _META_KEYS.items():
            if not isinstance(meta[key], kind):
                raise TypeError(f"{key} is a {type(meta[key]).__name__}, expected {kind.__name__}")
        for name in (MODEL_FILE, STATE_FILE):
            size = (path / name).stat().st_size
            if size != files[name]["bytes"]:
                raise CheckpointError(f"{path / name}: expected {files[name]['bytes']} bytes, got {size}")
            if _digest(path / name) != files[name]:
                raise CheckpointError(f"{path / name}: content does not match its checksum")
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path / META_FILE}: cannot be read ({reason})") from None
    return meta


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


class _NotingFile:
    """A file that keeps the error of a failed write."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.failure: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save_state(state: dict[str, Any], path: Path) -> None:
    """``torch.save``, which puts an error about its zip file in the place of a failed write. Raises OSError."""
    with open(path, "wb") as file:
        noting = _NotingFile(file)
        try:
            torch.save(state, cast(BinaryIO, noting))
        except RuntimeError as error:
            raise noting.failure or error from error


def _flush(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a kill midway leaves a temporary, not a broken checkpoint."""
    outdated = path.with_name(f".tmp-old-{path.name}")
    path.rename(outdated)
    shutil.rmtree(outdated)


def _step_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def _step_dirs(run_dir: Path) -> list[Path]:
    return [p for p in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8}", p.name)]
