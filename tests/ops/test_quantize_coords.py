"""quantize_coords and dequantize_coords: every backend against the reference bit for bit, and against the rule."""

from typing import Any

import pytest
import torch
from torch import Tensor

from m4kernels import dequantize_coords, quantize_coords
from m4kernels.cases import non_contiguous
from tests.ops.targets import targets

Target = tuple[str, str]
TARGETS = targets("cpp", "cuda", "triton", "reference")
# Coordinates are meant to overflow here; NumPy, in which the interpreter computes, would mention it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 256.0, 256.0001, -1e-7, 1e38, -1e38, 3.4e38)


def quantize_on(target: Target, *args: Any, **keywords: Any) -> Tensor:
    """`quantize_coords` by a target's backend on its device; inputs and result on the CPU."""
    backend, device = target
    moved = [value.to(device) if isinstance(value, Tensor) else value for value in args]
    return quantize_coords(*moved, **keywords, backend=backend).cpu()


def dequantize_on(target: Target, tokens: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """`dequantize_coords` likewise."""
    backend, device = target
    xy, visible = dequantize_coords(tokens.to(device), **keywords, backend=backend)
    return xy.cpu(), visible.cpu()


def joints(batch: tuple[int, ...], j: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random joints, a third of them outside the canvas or special."""
    g = torch.Generator().manual_seed(seed)
    xy = torch.rand(*batch, j, 2, generator=g, dtype=torch.float64) * 400 - 70
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    which = torch.randint(0, 6 * len(SPECIAL), xy.shape, generator=g)
    xy = torch.where(which < len(SPECIAL), special[which % len(SPECIAL)], xy)
    return xy.to(dtype), torch.rand(*batch, j, generator=g) < 0.8


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BATCHES = [((), 13), ((0,), 13), ((5,), 1), ((2,), 3), ((3, 7), 13), ((4,), 0), ((96,), 13)]


def check_equals_reference(target: Target, batch: tuple[int, ...], j: int, dtype: torch.dtype) -> None:
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
            actual = quantize_on(target, xy, visible, scale, offset)
            assert torch.equal(actual, expected)
            assert actual.dtype == torch.int64
            assert actual.shape == (*batch, 3 * j)


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "j"), [*BATCHES, ((2000,), 17)])
def test_cpp_equals_reference_bit_for_bit(batch: tuple[int, ...], j: int, dtype: torch.dtype) -> None:
    check_equals_reference(("cpp", "cpu"), batch, j, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "j"), BATCHES)
@pytest.mark.parametrize("target", targets("cuda", "triton"))
def test_equals_reference_bit_for_bit(target: Target, batch: tuple[int, ...], j: int, dtype: torch.dtype) -> None:
    check_equals_reference(target, batch, j, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", targets("cuda", "triton", interpreter=False))
def test_equals_reference_over_100_000_samples(target: Target, dtype: torch.dtype) -> None:
    check_equals_reference(target, (100_000,), 13, dtype)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("canvas", "bins"), [(100.0, 777), (0.1, 2**24), (1.0, 3), (2.0**-120, 8192), (640.0, 100)])
def test_other_grids_equal_the_reference(target: Target, canvas: float, bins: int) -> None:
    """A canvas that is no power of two, or an extreme one, where dividing and multiplying by the inverse differ."""
    for dtype in (torch.float32, torch.float64):
        xy, visible = joints((20,), 13, dtype)
        xy = xy * (canvas / 256)
        expected = quantize_coords(xy, visible, canvas=canvas, bins=bins, backend="reference")
        assert torch.equal(quantize_on(target, xy, visible, canvas=canvas, bins=bins), expected)
        both = dequantize_coords(expected, canvas=canvas, bins=bins, backend="reference")
        for actual, want in zip(dequantize_on(target, expected, canvas=canvas, bins=bins), both, strict=True):
            assert torch.equal(actual, want)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bins", [2, 3, 256, 8192, 65536])
def test_ties_round_to_even(target: Target, bins: int) -> None:
    # With canvas = bins - 1 the scaled coordinate is the coordinate itself, so k + 0.5 is an exact tie.
    k = torch.arange(min(bins - 1, 4000), dtype=torch.float32)
    xy = torch.stack([k + 0.5, k + 0.5], -1)
    tokens = quantize_on(target, xy, torch.ones(len(k), dtype=torch.bool), canvas=bins - 1, bins=bins)
    even = (k + k % 2).to(torch.int64)
    assert torch.equal(tokens[: len(k)], even)


@pytest.mark.parametrize("target", TARGETS)
def test_non_finite_and_outside_become_invisible(target: Target) -> None:
    nan, inf = float("nan"), float("inf")
    xy = torch.tensor([[nan, 8.0], [inf, 8.0], [-inf, 300.0], [-0.01, 8.0], [256.0, 0.0], [8.0, 256.01], [1.0, 2.0]])
    tokens = quantize_on(target, xy, torch.tensor([True] * 6 + [False])).view(3, 7)
    assert tokens[0, :5].tolist() == [0, 0, 0, 0, 8191]
    assert tokens[1, 1] == round(8 / 256 * 8191)
    assert tokens[1, 2] == 8191
    assert tokens[1, 5] == 8191
    assert tokens[2].tolist() == [0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("canvas", "bins"), [(256.0, 8192), (256.0, 64), (1.0, 1000)])
def test_round_trip_error_is_half_a_bin_and_unbiased(target: Target, canvas: float, bins: int) -> None:
    samples = 500 if target == ("triton", "cpu") else 20000  # the interpreter is slow
    xy = torch.rand(samples, 13, 2, generator=torch.Generator().manual_seed(3)) * canvas
    tokens = quantize_on(target, xy, torch.ones(samples, 13, dtype=torch.bool), canvas=canvas, bins=bins)
    back, visible = dequantize_on(target, tokens, canvas=canvas, bins=bins)
    step = canvas / (bins - 1)
    error = back.double() - xy.double()
    rounding = 4 * torch.finfo(torch.float32).eps * canvas  # of the float32 arithmetic itself
    assert error.abs().max() <= step / 2 + rounding
    assert error.mean().abs() < 5 * step / 12**0.5 / error.numel() ** 0.5 + rounding / 4
    assert visible.all()
    assert back.dtype == torch.float32


TOKEN_SHAPES = [(39,), (0, 39), (5, 39), (2, 3, 39), (4, 0)]


def check_dequantize_equals_reference(target: Target, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens = torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = dequantize_coords(tokens, backend="reference")
    for actual, want in zip(dequantize_on(target, tokens), expected, strict=True):
        assert torch.equal(actual, want)


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("shape", [*TOKEN_SHAPES, (3000, 39)])
def test_dequantize_cpp_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_dequantize_equals_reference(("cpp", "cpu"), shape, dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16, torch.int16, torch.uint8])
@pytest.mark.parametrize("shape", TOKEN_SHAPES)
@pytest.mark.parametrize("target", targets("cuda", "triton"))
def test_dequantize_equals_reference(target: Target, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_dequantize_equals_reference(target, shape, dtype)


@pytest.mark.parametrize("target", TARGETS)
def test_non_contiguous_inputs(target: Target) -> None:
    xy, visible = joints((6,), 13, torch.float32)
    expected = quantize_coords(xy, visible, backend="reference")
    backend, device = target
    xy, visible = xy.to(device), visible.to(device)
    transposed = xy.transpose(0, 1).contiguous().transpose(0, 1)
    for xy_view, visible_view in ((non_contiguous(xy), non_contiguous(visible)), (transposed, visible)):
        assert torch.equal(quantize_coords(xy_view, visible_view, backend=backend).cpu(), expected)
    tokens = expected.to(device)
    back = dequantize_coords(expected, backend="reference")
    for actual, want in zip(dequantize_coords(non_contiguous(tokens), backend=backend), back, strict=True):
        assert torch.equal(actual.cpu(), want)


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
        ({"backend": "fast"}, "backend='fast' is unknown; expected one of cuda, triton, cpp, reference"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"xy": torch.zeros(4, 13, 2), "visible": torch.ones(4, 13, dtype=torch.bool)} | change
    with pytest.raises(ValueError, match=message):
        quantize_coords(arguments.pop("xy"), arguments.pop("visible"), **arguments)
    with pytest.raises(ValueError, match=r"tokens must have shape \(\.\.\., 3 \* J\)"):
        dequantize_coords(torch.zeros(4, 38, dtype=torch.int64))


@pytest.mark.parametrize("target", TARGETS)
def test_opcheck(target: Target) -> None:
    backend, device = target
    xy, visible = (x.to(device) for x in joints((3,), 13, torch.float32))
    scale = torch.ones(3, 2, device=device)
    ops = torch.ops.m4kernels
    torch.library.opcheck(ops.quantize_coords.default, (xy, visible, scale, None, 256.0, 8192, backend))
    tokens = quantize_coords(xy, visible)
    torch.library.opcheck(ops.dequantize_coords.default, (tokens, 256.0, 8192, backend))


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_graph_break(target: Target) -> None:
    backend, device = target

    @torch.compile(fullgraph=True, backend="aot_eager")
    def round_trip(xy: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        return dequantize_coords(quantize_coords(xy, visible, backend=backend), backend=backend)

    xy, visible = joints((3,), 13, torch.float32)
    expected = dequantize_coords(quantize_coords(xy, visible))
    for actual, want in zip(round_trip(xy.to(device), visible.to(device)), expected, strict=True):
        assert torch.equal(actual.cpu(), want)
