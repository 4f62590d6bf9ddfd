"""The files of a checkpoint: read once and compared with their digests, written so that a full disk is what it is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import torch
from safetensors.torch import save_file

from m4.errors import CheckpointError


class HasWeights(Protocol):
    """A model, or what stands for one that is divided over ranks."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...


class Weights:
    """Stands for a model: its weights by name."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self._weights = weights

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._weights


def content(path: Path, expected: dict[str, Any]) -> bytes:
    """What is in a file whose digest is known: read once, to be compared and used. Raises CheckpointError."""
    content = path.read_bytes()
    if {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} != expected:
        raise CheckpointError(f"{path}: content does not match its checksum")
    return content


def digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, read in pieces."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return {"bytes": path.stat().st_size, "sha256": found.hexdigest()}


def save_weights(model: HasWeights, path: Path) -> None:
    """Weights as safetensors. Raises OSError, or safetensors' own error around one."""
    save_file({name: t.detach().contiguous() for name, t in model.state_dict().items()}, path)


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


def save_state(state: dict[str, Any], path: Path) -> None:
    """``torch.save``, which puts an error about its zip file in the place of a failed write. Raises OSError."""
    with open(path, "wb") as file:
        noting = _NotingFile(file)
        try:
            torch.save(state, cast(BinaryIO, noting))
        except RuntimeError as error:
            raise noting.failure or error from error


def flush(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
