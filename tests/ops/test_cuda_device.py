"""The CUDA C++ backends on a GPU: bit for bit as on the CPU, repeatable, without waiting, capturable, and with
assertions that name the op."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from m4kernels import MaskedBatch, MaskingSpec, _ext, dequantize_coords, mask_tokens, quantize_coords

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

M4 = MaskingSpec((256, 39, 256, 39), (1.5, 1.5, 0.5, 0.5), (0.5, 0.5, 1.5, 1.5), (96, 256), (39, 256))
SMALL = MaskingSpec((5, 9, 1, 17), (0.3, 2.0, 5.0, 1.0), (1.0, 0.05, 0.0, 10.0), (0, 20), (1, 30))
MANY = MaskingSpec((3,) * 40, (1.0,) * 40, (0.2, 0.0) * 20, (60, 70), (50, 60))


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


def tensors(batch: MaskedBatch) -> list[Tensor]:
    out = []
    for half in (batch.encoder, batch.decoder):
        out += [half.ids, half.positions, half.modalities, half.segments.cu_seqlens, half.segments.counts]
    return out


def assert_equal(actual: MaskedBatch, expected: MaskedBatch) -> None:
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a.cpu(), e.cpu())


def make_samples(spec: MaskingSpec, batch: int, start: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(start)
    longest = torch.tensor(spec.max_seq_lens)
    return {
        "tokens": torch.randint(0, 65536, (batch, spec.num_tokens), generator=g).to(torch.uint16),
        "sample_ids": torch.arange(start, start + batch) * 0x1E3779B97F4A7C15,
        "lengths": (torch.rand(batch, len(longest), generator=g) * (longest + 1)).long(),
    }


def to_gpu(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cuda() for name, x in samples.items()}


@pytest.mark.parametrize(
    ("spec", "samples"), [(M4, 60_000), (SMALL, 60_000), (MANY, 4_000)], ids=["m4", "small", "many"]
)
def test_masks_equal_the_cpu_bit_for_bit(spec: MaskingSpec, samples: int) -> None:
    for start in range(0, samples, 4_000):
        batch = make_samples(spec, 4_000, start)
        expected = mask_tokens(**batch, spec=spec, seed=42, epoch=3, backend="cpp")
        assert_equal(mask_tokens(**to_gpu(batch), spec=spec, seed=42, epoch=3, backend="cuda"), expected)


@pytest.mark.parametrize("batch", [0, 1, 96, 1000])
def test_masks_repeat_and_never_wait(batch: int) -> None:
    samples = make_samples(M4, batch)
    capacity = (batch * 160 + 300, batch * 120 + 300)
    keywords = {"spec": M4, "seed": -1, "capacity": capacity}
    expected = mask_tokens(**samples, **keywords, backend="reference")
    on_gpu = to_gpu(samples)
    mask_tokens(**on_gpu, **keywords)  # copies the tables
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [mask_tokens(**on_gpu, **keywords, backend="cuda") for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result in results:
        assert_equal(result, expected)


def test_in_a_cuda_graph() -> None:
    samples, others = make_samples(M4, 96), make_samples(M4, 96, start=500)
    keywords = {"spec": M4, "seed": 5, "capacity": (16_000, 13_000), "backend": "cuda"}
    static = to_gpu(samples)
    mask_tokens(**static, **keywords)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mask_tokens(**static, **keywords)
    for batch in (others, samples):
        for name, x in batch.items():
            static[name].copy_(x)
        graph.replay()
        assert_equal(out, mask_tokens(**batch, **(keywords | {"backend": "reference"})))


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
    samples = make_samples(SMALL, 5)
    samples["lengths"][3, 2] = 2
    with pytest.raises(ValueError, match=r"lengths\[3, 2\] must be 0 to 1 .*got 2"):
        mask_tokens(**to_gpu(samples), spec=SMALL, seed=0, backend="cuda")


@pytest.mark.parametrize("capacity", [(3, 100), (100, 3)])
def test_too_small_a_capacity_trips_an_assertion_that_names_the_op(capacity: tuple[int, int]) -> None:
    """In a process of its own, since an assertion leaves the CUDA context unusable."""
    code = f"""
import torch, m4kernels as mk
spec = mk.MaskingSpec((64, 64), (1, 1), (1, 1), (40, 40), (40, 40))
tokens = torch.zeros(4, 128, dtype=torch.int64, device="cuda")
ids = torch.arange(4, device="cuda")
mk.mask_tokens(tokens, spec, seed=0, sample_ids=ids, capacity={capacity}, backend="cuda")
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "mask_tokens: a length is out of range or the capacity too small" in result.stdout + result.stderr
