"""NVIDIA's Cosmos-0.1-Tokenizer-DI16x16, from its TorchScript files ``encoder.jit`` and ``decoder.jit``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from m4.data.tokenizers.base import GRID, IMAGE_SIZE, VOCAB_SIZE, check_images, check_tokens
from m4.device import DTYPES, default_device, default_dtype
from m4.errors import data_error

_REPOSITORY = "nvidia/Cosmos-0.1-Tokenizer-DI16x16"
_FILES = ("encoder.jit", "decoder.jit")
_GET_WEIGHTS = (
    f"Get the weights: pip install 'm4kernels[cosmos]'; accept the licence of {_REPOSITORY} on huggingface.co; "
    f"`huggingface-cli download {_REPOSITORY} --local-dir DIR`, and pass --cosmos-dir DIR (without --local-dir they go "
    "to the Hugging Face cache, where they are found by themselves)."
)
_BATCH = 32  # pictures at a time


class CosmosTokenizer:
    """The published discrete tokenizer. Each half is loaded when first used; pictures go through it in batches.

    folder: where the two files lie, or None for the Hugging Face cache. device: default the GPU of this process
    (``LOCAL_RANK`` under torchrun), else the CPU. dtype: "bf16" or "fp32"; None means bf16 on a GPU and fp32 on a CPU.
    Raises DataError, which says how to obtain the weights, where they are absent.
    """

    id = "cosmos-0.1-di16x16"
    vocab_size = VOCAB_SIZE

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: str | None = None,
    ):
        self.folder = _cached() if folder is None else Path(folder)
        for name in _FILES:
            if not (self.folder / name).is_file():
                raise data_error(self.folder / name, expected="a file", actual="none", remedy=_GET_WEIGHTS)
        self.device = default_device() if device is None else torch.device(device)
        self.dtype_name = default_dtype(self.device) if dtype is None else dtype
        if self.dtype_name not in DTYPES:
            raise data_error("dtype", expected=" or ".join(DTYPES), actual=repr(dtype), remedy="Choose one of these.")
        self.dtype = DTYPES[self.dtype_name]
        self._modules: dict[str, torch.jit.ScriptModule] = {}

    def weights(self) -> str:
        """SHA-256 of the encoder's file: data sets made by equal weights have it in common."""
        digest = hashlib.sha256()
        with open(self.folder / "encoder.jit", "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, 256, 256, 3) RGB → int64 (B, 16, 16). Raises DataError if the module yields anything else."""
        images = check_images(images)
        grids = [self._encode(batch) for batch in _batches(images)]
        return np.concatenate(grids) if grids else np.zeros((0, GRID, GRID), np.int64)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Integer (B, 16, 16) → uint8 (B, 256, 256, 3) RGB.

        Raises DataError for an id outside [0, 64000), which the module would decode to a wrong picture without a word,
        and if the module yields anything but pictures.
        """
        tokens = check_tokens(tokens, self.vocab_size)
        pictures = [self._decode(batch) for batch in _batches(tokens)]
        return np.concatenate(pictures) if pictures else np.zeros((0, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)

    def _encode(self, images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
        # In [-1, 1]; divided before it is rounded to the module's type.
        result = self._run("encoder.jit", (pixels.float() / 127.5 - 1).to(self.dtype))
        # The published encoder returns (indices, codes).
        tokens = result[0] if isinstance(result, (tuple, list)) and result else result
        expected = (len(images), GRID, GRID)
        if not isinstance(tokens, torch.Tensor) or tuple(tokens.shape) != expected or tokens.is_floating_point():
            raise self._unexpected("encoder.jit", f"integers {expected}", _describe(tokens))
        tokens = tokens.to("cpu", torch.int64)
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            extremes = f"{int(tokens.min())} … {int(tokens.max())}"
            raise self._unexpected("encoder.jit", f"ids in [0, {self.vocab_size})", extremes)
        return tokens.numpy()

    def _decode(self, tokens: np.ndarray) -> np.ndarray:
        pixels = self._run("decoder.jit", torch.from_numpy(tokens).to(self.device, torch.int32))
        expected = (len(tokens), 3, IMAGE_SIZE, IMAGE_SIZE)
        if not isinstance(pixels, torch.Tensor) or tuple(pixels.shape) != expected:
            raise self._unexpected("decoder.jit", f"{expected}", _describe(pixels))
        pixels = pixels.float()
        if not bool(pixels.isfinite().all()):
            raise self._unexpected("decoder.jit", "finite pixels", f"NaN or infinite ones in {self.dtype_name}")
        pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().numpy()

    def _run(self, name: str, argument: torch.Tensor) -> object:
        module = self._module(name)
        try:
            with torch.inference_mode():
                return module(argument)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, torch.jit.Error) as error:
            raise data_error(
                self.folder / name,
                expected=f"a module that takes {_describe(argument)} on {self.device}",
                actual=_last_line(error),
                remedy=f"Try --cosmos-dtype {'bf16' if self.dtype_name == 'fp32' else 'fp32'}. {_GET_WEIGHTS}",
            ) from error

    def _module(self, name: str) -> torch.jit.ScriptModule:
        if name not in self._modules:
            path = self.folder / name
            try:
                module = torch.jit.load(str(path), map_location=self.device)
            except (RuntimeError, ValueError, OSError) as error:
                raise data_error(
                    path, expected="a TorchScript file", actual=_last_line(error), remedy=_GET_WEIGHTS
                ) from error
            self._modules[name] = module.eval().to(self.dtype)
        return self._modules[name]

    def _unexpected(self, name: str, expected: str, actual: str) -> Exception:
        return data_error(self.folder / name, expected=expected, actual=actual, remedy=_GET_WEIGHTS)


def _cached() -> Path:
    """The newest snapshot with both files in the Hugging Face cache (``HF_HUB_CACHE``, ``HF_HOME`` are obeyed)."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    repository = cache / f"models--{_REPOSITORY.replace('/', '--')}"
    found = [path for path in (repository / "snapshots").glob("*") if all((path / name).is_file() for name in _FILES)]
    if not found:
        raise data_error(
            "--cosmos-dir",
            expected="the folder of Cosmos' weights, or the weights in the Hugging Face cache",
            actual=f"no folder given, and no {' and '.join(_FILES)} in {repository}",
            remedy=_GET_WEIGHTS,
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def _batches(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + _BATCH] for start in range(0, len(array), _BATCH))


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
