"""What the processor multiplies in bfloat16, and by which instructions."""

import torch

from m4kernels import _ext


def dots_bf16() -> bool:
    """Whether the extension multiplies bfloat16 numbers by the processor's instructions (AVX512-BF16)."""
    return _ext.require().simd_level() == "avx512bf16"


def has_amx() -> bool:
    """Whether the processor has AMX: tiles of bfloat16, which PyTorch's products (oneDNN) use and the extension does
    not."""
    return torch.cpu._is_amx_tile_supported()


def slow_bf16() -> str | None:
    """Why bfloat16 is no faster than float32 on this CPU; None where it is."""
    if has_amx() or torch.cpu._is_avx512_bf16_supported():
        return None
    # Another architecture may have instructions of its own; a torch without oneDNN, such as macOS', does not say.
    known = torch.backends.mkldnn.is_available() and not torch.cpu._is_avx2_supported()
    if known and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return "it has no instructions for products of bfloat16 (AVX512-BF16 or AMX), so they are computed as float32"
