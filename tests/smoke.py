"""What an installed wheel must do, without pytest and without the repository: `python tests/smoke.py`.

Every kernel of the extension beside its reference, forward and backward, at small shapes.
"""

import sys
from pathlib import Path

import torch

import m4kernels
from m4kernels import _ext


def main() -> int:
    where = Path(m4kernels.__file__).resolve()
    print(f"m4kernels {m4kernels.__version__} of {where.parent}, torch {torch.__version__}, Python {sys.version}")
    print(f"extension: {_ext.require().simd_level()}")
    torch.manual_seed(0)

    x, weight = torch.randn(33, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
    targets = torch.randint(100, (33,))
    found = {}
    for backend in ("cpp", "reference"):
        loss = m4kernels.linear_cross_entropy(x, weight, targets, backend=backend).loss
        found[backend] = (loss.detach(), *torch.autograd.grad(loss, (x, weight)))
    for ours, expected in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)

    spec = m4kernels.MaskingSpec(
        max_seq_lens=(16, 9), input_alphas=(1.0, 1.0), target_alphas=(1.0, 1.0), input_tokens_range=(4, 9),
        target_tokens_range=(4, 9),
    )  # fmt: skip
    ids = torch.arange(25).repeat(4, 1)
    masked = [
        m4kernels.mask_tokens(ids, spec, seed=1, sample_ids=torch.arange(4), backend=backend)
        for backend in ("cpp", "reference")
    ]
    for ours, expected in ((one.encoder, other.encoder) for one, other in [masked]):
        assert torch.equal(ours.ids, expected.ids)
        segments = ours.segments
    q = torch.randn(len(masked[0].encoder.ids), 2, 8)
    ours, expected = (
        m4kernels.cross_modal_attention(q, q, q, segments, segments, backend=backend)
        for backend in ("cpp", "reference")
    )
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
