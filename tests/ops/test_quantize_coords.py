import pytest
import torch
from torch import Tensor

from m4kernels import dequantize_coords, quantize_coords
from m4kernels.cases import non_contiguous

SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 256.0, 256.0001, -1e-7, 1e38, -1e38, 3.4e38)


def joints(batch: tuple[int, ...], j: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random joints, a third of them outside the canvas or special."""
    g = torch.Generator().manual_seed(seed)
    xy = torch.rand(*batch, j, 2, generator=g, dtype=torch.float64) * 400 - 70
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    which = torch.randint(0, 6 * len(SPECIAL), xy.shape, generator=g)
    xy = torch.where(which < len(SPECIAL), special[which % len(SPECIAL)], xy)
    return xy.to(dtype), torch.rand(*batch, j, generator=g) < 0.8


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "j"), [((), 13), ((0,), 13), ((5,), 1), ((2,), 3), ((3, 7), 13), ((4,), 0), ((96,), 13), ((2000,), 17)]
)
def test_cpp_equals_reference_bit_for_bit(batch: tuple[int, ...], j: int, dtype: torch.dtype) -> None:
    xy, visible = joints(batch, j, dtype)
    g = torch.Generator().manual_seed(1)
    per_sample = (torch.rand(*batch, 2, generator=g) + 0.5).to(dtype)
    for scale in (
        None,
        per_sample,
        torch.tensor([0.7, 1.3], dtype=dtype),
        torch.tensor(0.9, dtype=dtype),
        per_sample[..., :1],
    ):
        for offset in (None, (per_sample - 1) * 30):
            expected = quantize_coords(xy, visible, scale, offset, backend="reference")
            actual = quantize_coords(xy, visible, scale, offset, backend="cpp")
            assert torch.equal(actual, expected)
            assert actual.dtype == torch.int64
            assert actual.shape == (*batch, 3 * j)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("bins", [2, 3, 256, 8192, 65536])
def test_ties_round_to_even(backend: str, bins: int) -> None:
    # With canvas = bins - 1 the scaled coordinate is the coordinate itself, so k + 0.5 is an exact tie.
    k = torch.arange(min(bins - 1, 4000), dtype=torch.float32)
    xy = torch.stack([k + 0.5, k + 0.5], -1)
    tokens = quantize_coords(xy, torch.ones(len(k), dtype=torch.bool), canvas=bins - 1, bins=bins, backend=backend)
    even = (k + k % 2).to(torch.int64)
    assert torch.equal(tokens[: len(k)], even)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_non_finite_and_outside_become_invisible(backend: str) -> None:
    nan, inf = float("nan"), float("inf")
    xy = torch.tensor([[nan, 8.0], [inf, 8.0], [-inf, 300.0], [-0.01, 8.0], [256.0, 0.0], [8.0, 256.01], [1.0, 2.0]])
    tokens = quantize_coords(xy, torch.tensor([True] * 6 + [False]), backend=backend).view(3, 7)
    assert tokens[0, :5].tolist() == [0, 0, 0, 0, 8191]
    assert tokens[1, 1] == round(8 / 256 * 8191)
    assert tokens[1, 2] == 8191
    assert tokens[1, 5] == 8191
    assert tokens[2].tolist() == [0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("canvas", "bins"), [(256.0, 8192), (256.0, 64), (1.0, 1000)])
def test_round_trip_error_is_half_a_bin_and_unbiased(backend: str, canvas: float, bins: int) -> None:
    xy = torch.rand(20000, 13, 2, generator=torch.Generator().manual_seed(3)) * canvas
    tokens = quantize_coords(xy, torch.ones(20000, 13, dtype=torch.bool), canvas=canvas, bins=bins, backend=backend)
    back, visible = dequantize_coords(tokens, canvas=canvas, bins=bins, backend=backend)
    step = canvas / (bins - 1)
    error = back.double() - xy.double()
    rounding = 4 * torch.finfo(torch.float32).eps * canvas  # of the float32 arithmetic itself
    assert error.abs().max() <= step / 2 + rounding
    assert error.mean().abs() < 5 * step / 12**0.5 / error.numel() ** 0.5 + rounding / 4
    assert visible.all()
    assert back.dtype == torch.float32


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("shape", [(39,), (0, 39), (5, 39), (2, 3, 39), (4, 0), (3000, 39)])
def test_dequantize_cpp_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens = torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for expected, actual in zip(
        dequantize_coords(tokens, backend="reference"), dequantize_coords(tokens, backend="cpp"), strict=True
    ):
        assert torch.equal(actual, expected)


def test_non_contiguous_inputs() -> None:
    xy, visible = joints((6,), 13, torch.float32)
    expected = quantize_coords(xy, visible, backend="reference")
    assert torch.equal(quantize_coords(non_contiguous(xy), non_contiguous(visible), backend="cpp"), expected)
    transposed = xy.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(quantize_coords(transposed, visible, backend="cpp"), expected)


def test_independent_of_thread_count() -> None:
    xy, visible = joints((5000,), 13, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(quantize_coords(xy, visible, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xy": torch.zeros(4, 13, 3)}, r"xy must have shape \(\.\.\., J, 2\), got \(4, 13, 3\)"),
        ({"xy": torch.zeros(4, 13, 2, dtype=torch.int64)}, "xy must be floating, got torch.int64"),
        ({"visible": torch.ones(4, 12, dtype=torch.bool)}, r"visible must have shape \(4, 13\), got \(4, 12\)"),
        ({"visible": torch.ones(4, 13)}, "visible must be bool, got torch.float32"),
        ({"scale": torch.ones(3, 2)}, r"scale must be broadcastable to \(4, 2\), got \(3, 2\)"),
        ({"offset": torch.ones(2, dtype=torch.int64)}, "offset must be floating"),
        ({"canvas": 0.0}, "canvas must be finite and positive, got 0.0"),
        ({"canvas": float("nan")}, "canvas must be finite and positive"),
        ({"bins": 1}, "bins must be 2 to"),
        ({"backend": "cuda"}, "no such backend|cannot run"),
        ({"backend": "fast"}, "backend='fast' is unknown; expected one of cpp, reference"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"xy": torch.zeros(4, 13, 2), "visible": torch.ones(4, 13, dtype=torch.bool)} | change
    with pytest.raises(ValueError, match=message):
        quantize_coords(arguments.pop("xy"), arguments.pop("visible"), **arguments)
    with pytest.raises(ValueError, match=r"tokens must have shape \(\.\.\., 3 \* J\)"):
        dequantize_coords(torch.zeros(4, 38, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_opcheck(backend: str) -> None:
    xy, visible = joints((3,), 13, torch.float32)
    ops = torch.ops.m4kernels
    torch.library.opcheck(ops.quantize_coords.default, (xy, visible, torch.ones(3, 2), None, 256.0, 8192, backend))
    tokens = quantize_coords(xy, visible)
    torch.library.opcheck(ops.dequantize_coords.default, (tokens, 256.0, 8192, backend))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_compiles_without_graph_break(backend: str) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def round_trip(xy: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        return dequantize_coords(quantize_coords(xy, visible, backend=backend), backend=backend)

    xy, visible = joints((3,), 13, torch.float32)
    expected = dequantize_coords(quantize_coords(xy, visible))
    for actual, want in zip(round_trip(xy, visible), expected, strict=True):
        assert torch.equal(actual, want)
