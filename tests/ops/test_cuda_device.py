"""What the CUDA C++ backends have beyond the tests of all backends: tiles of every kind, a side stream, an ordinary
error where the device is waited for anyway."""

import pytest
import torch
from torch import Tensor

from m4kernels import _ext, dequantize_coords, mask_tokens, quantize_coords
from tests.ops.masking import SMALL, make_inputs

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def extension_with_cuda() -> None:
    if not _ext.require().has_cuda:
        pytest.fail("there is a GPU, but the extension was built without CUDA: `M4KERNELS_CUDA=1 pip install -e .`")


def make_joints(n: int, j: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + j)
    xy = torch.rand(n, j, 2, generator=g, dtype=torch.float64) * 400 - 70
    xy[torch.rand(xy.shape, generator=g) < 0.02] = float("nan")
    xy[torch.rand(xy.shape, generator=g) < 0.02] = float("inf")
    return xy.to(dtype), torch.rand(n, j, generator=g) < 0.8, (torch.rand(n, 2, generator=g) + 0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "j"), [(0, 13), (96, 13), (100_000, 13), (5, 1), (3, 513), (2, 3000), (1, 200_000)])
def test_coords_equal_the_cpu_bit_for_bit(n: int, j: int, dtype: torch.dtype) -> None:
    xy, visible, pairs = make_joints(n, j, dtype)
    for scale, offset in ((None, None), (pairs, (pairs - 1) * 30)):
        call = [xy, visible, scale, offset]
        expected = quantize_coords(*call, backend="reference")
        on_gpu = [None if x is None else x.cuda() for x in call]
        first = quantize_coords(*on_gpu, backend="cuda")
        assert torch.equal(first.cpu(), expected)
        for _ in range(9):
            assert torch.equal(quantize_coords(*on_gpu), first)
        back, seen = dequantize_coords(first, backend="cuda")
        want = dequantize_coords(expected, backend="reference")
        assert torch.equal(back.cpu(), want[0])
        assert torch.equal(seen.cpu(), want[1])


def test_on_a_side_stream() -> None:
    xy, visible, _ = make_joints(200_000, 13, torch.float32)
    expected = quantize_coords(xy, visible, backend="reference")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_gpu, seen = xy.cuda(non_blocking=True), visible.cuda(non_blocking=True)
        tokens = quantize_coords(on_gpu, seen, backend="cuda")
    stream.synchronize()
    assert torch.equal(tokens.cpu(), expected)


def test_bad_length_without_capacity_is_an_ordinary_error() -> None:
    tokens, ids, lengths = make_inputs(SMALL, 5, ragged=True)
    lengths[3, 2] = 2
    with pytest.raises(ValueError, match=r"lengths\[3, 2\] must be 0 to 1 .*got 2"):
        mask_tokens(tokens.cuda(), SMALL, seed=0, sample_ids=ids.cuda(), lengths=lengths.cuda(), backend="cuda")
