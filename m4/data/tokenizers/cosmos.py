"""NVIDIA's Cosmos-0.1-Tokenizer-DI16x16, from its TorchScript files ``encoder.jit`` and ``decoder.jit``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from m4.data.errors import data_error
from m4.data.tokenizers.base import GRID, IMAGE_SIZE, VOCAB_SIZE, check_images, check_tokens

_REPOSITORY = "nvidia/Cosmos-0.1-Tokenizer-DI16x16"
_GET_WEIGHTS = (
    f"Get the weights: accept the licence of {_REPOSITORY} on huggingface.co, then "
    f"`huggingface-cli download {_REPOSITORY} --local-dir DIR`, and pass --cosmos-dir DIR."
)


class CosmosTokenizer:
    """The published discrete tokenizer; bfloat16 on a GPU, float32 on a CPU. Each half is loaded when first used."""

    id = "cosmos-0.1-di16x16"
    vocab_size = VOCAB_SIZE

    def __init__(self, folder: str | os.PathLike | None, device: str | torch.device | None = None):
        if folder is None:
            raise data_error(
                "--cosmos-dir", expected="the folder of Cosmos' weights", actual="none given", remedy=_GET_WEIGHTS
            )
        self.folder = Path(folder)
        for name in ("encoder.jit", "decoder.jit"):
            if not (self.folder / name).is_file():
                raise data_error(self.folder / name, expected="a file", actual="none", remedy=_GET_WEIGHTS)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self._modules: dict[str, torch.jit.ScriptModule] = {}

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, 256, 256, 3) RGB → int64 (B, 16, 16). Raises DataError if the module yields anything else."""
        pixels = torch.from_numpy(check_images(images)).to(self.device).permute(0, 3, 1, 2)
        with torch.inference_mode():
            result = self._module("encoder.jit")(pixels.to(self.dtype) / 127.5 - 1)
        # The published encoder returns (indices, codes).
        tokens = result[0] if isinstance(result, (tuple, list)) else result
        expected = (len(images), GRID, GRID)
        if tuple(tokens.shape) != expected or tokens.is_floating_point():
            raise self._unexpected("encoder.jit", f"integers {expected}", f"{tokens.dtype} {tuple(tokens.shape)}")
        tokens = tokens.to("cpu", torch.int64)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            extremes = f"{int(tokens.min())} … {int(tokens.max())}"
            raise self._unexpected("encoder.jit", f"ids in [0, {self.vocab_size})", extremes)
        return tokens.numpy()

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Integer (B, 16, 16) → uint8 (B, 256, 256, 3) RGB. Raises DataError if the module yields anything else."""
        indices = torch.from_numpy(check_tokens(tokens, self.vocab_size)).to(self.device, torch.int32)
        with torch.inference_mode():
            pixels = self._module("decoder.jit")(indices)
        expected = (len(indices), 3, IMAGE_SIZE, IMAGE_SIZE)
        if not isinstance(pixels, torch.Tensor) or tuple(pixels.shape) != expected:
            raise self._unexpected("decoder.jit", f"{expected}", f"{getattr(pixels, 'shape', type(pixels))}")
        pixels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().numpy()

    def _module(self, name: str) -> torch.jit.ScriptModule:
        if name not in self._modules:
            path = self.folder / name
            try:
                module = torch.jit.load(str(path), map_location=self.device)
            except (RuntimeError, ValueError, OSError) as error:
                reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
                raise data_error(path, expected="a TorchScript file", actual=reason, remedy=_GET_WEIGHTS) from error
            self._modules[name] = module.eval().to(self.dtype)
        return self._modules[name]

    def _unexpected(self, name: str, expected: str, actual: str) -> Exception:
        return data_error(self.folder / name, expected=expected, actual=actual, remedy=_GET_WEIGHTS)
