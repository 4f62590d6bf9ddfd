"""What an installed wheel must do, without pytest and without the repository: `python tests/smoke.py`.

Ops of the extension beside their references at small shapes: quantising, masking, attention, a layer and the loss.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

import m4kernels
from m4kernels import _ext

SPEC = m4kernels.MaskingSpec(
    max_seq_lens=(16, 9),
    input_alphas=(1.0, 1.0),
    target_alphas=(1.0, 1.0),
    input_tokens_range=(4, 9),
    target_tokens_range=(4, 9),
)


def results(backend: str) -> list[Tensor]:
    """Outputs and gradients, the same for every backend but for roundings."""
    torch.manual_seed(0)
    tokens = m4kernels.quantize_coords(256 * torch.rand(5, 13, 2), torch.rand(5, 13) > 0.2, backend=backend)
    rows = torch.arange(25).repeat(4, 1)
    masked = m4kernels.mask_tokens(rows, SPEC, seed=1, sample_ids=torch.arange(4), backend=backend).encoder

    q, k, v = (torch.randn(len(masked.ids), 2, 8, requires_grad=True) for _ in range(3))
    attended = m4kernels.cross_modal_attention(q, k, v, masked.segments, masked.segments, backend=backend)
    x, weight = torch.randn(33, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
    layer = m4kernels.linear(x, weight, gelu=True, backend=backend)
    targets = torch.randint(100, (33,))
    loss = m4kernels.linear_cross_entropy(x, weight, targets, backend=backend).loss
    total = loss + attended.square().mean() + layer.square().mean()
    return [tokens, masked.ids, attended, layer, loss, *torch.autograd.grad(total, (q, k, v, x, weight))]


def main() -> int:
    where = Path(m4kernels.__file__).resolve()
    print(f"m4kernels {m4kernels.__version__} of {where.parent}, torch {torch.__version__}, Python {sys.version}")
    print(f"extension: {_ext.require().simd_level()}")
    for ours, expected in zip(results("cpp"), results("reference"), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
