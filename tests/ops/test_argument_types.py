"""Arguments of foreign types, and numbers that are none: the right values, or one line that names the argument."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from m4kernels import (
    MaskingSpec,
    Segments,
    cross_modal_attention,
    dequantize_coords,
    linear_cross_entropy,
    mask_tokens,
    quantize_coords,
)
from tests.ops.targets import targets

backends = pytest.mark.parametrize("backend", ["cpp", "reference"])
SEGMENTS = Segments.from_counts(torch.tensor([[3, 0], [1, 2]]))
SPEC = MaskingSpec((5, 9), (1.0, 2.0), (1.0, 0.5), (2, 7), (1, 7))


@backends
def test_arrays_for_scale_and_offset(backend: str) -> None:
    g = torch.Generator().manual_seed(2)
    xy, visible = torch.rand(5, 13, 2, generator=g) * 400 - 70, torch.rand(5, 13, generator=g) < 0.8
    scale, offset = np.array([0.7, 1.3], np.float32), np.array([-3.5, 12.25], np.float32)
    expected = quantize_coords(xy, visible, torch.from_numpy(scale), torch.from_numpy(offset), backend=backend)
    read_only = scale.copy()
    read_only.setflags(write=False)
    for s in (scale, scale[::-1].copy()[::-1], read_only, scale.astype(">f4"), scale.tolist()):
        assert torch.equal(quantize_coords(xy, visible, s, offset, backend=backend), expected)
    for one in (0.7, np.float64(0.7), np.array(0.7)):
        double = quantize_coords(xy.double(), visible, torch.tensor(0.7, dtype=torch.float64), backend=backend)
        assert torch.equal(quantize_coords(xy.double(), visible, one, backend=backend), double)
    only = quantize_coords(xy, visible, None, offset, backend=backend)
    assert torch.equal(only, quantize_coords(xy, visible, None, torch.from_numpy(offset), backend=backend))
    per_sample = np.linspace(0.5, 1.5, 10).reshape(5, 2)
    want = quantize_coords(xy, visible, torch.from_numpy(per_sample), backend=backend)
    assert torch.equal(quantize_coords(xy, visible, per_sample, backend=backend), want)


def test_arrays_under_torch_compile() -> None:
    scale = np.array([0.7, 1.3], np.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda xy: quantize_coords(xy, VISIBLE, scale), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(XY), quantize_coords(XY, VISIBLE, scale))


def test_framing_goes_straight_into_quantize_coords() -> None:
    framing = pytest.importorskip("m4.data.framing")
    x, y, seen = np.array([10.0, 90.0]), np.array([20.0, 130.0]), np.array([True, True])
    found = framing.frame_for((240, 320), x, y, seen, "subject")
    xy = torch.from_numpy(np.stack([x - 0.5, y - 0.5], -1)).float()
    tokens = quantize_coords(xy, torch.from_numpy(seen), found.scale, found.offset)
    back, visible = dequantize_coords(tokens)
    torch.testing.assert_close(
        back, xy * torch.from_numpy(found.scale) + torch.from_numpy(found.offset), rtol=0, atol=0.02
    )
    assert visible.all()


XY, VISIBLE = (
    torch.rand(2, 13, 2, generator=torch.Generator().manual_seed(0)) * 256,
    torch.ones(2, 13, dtype=torch.bool),
)
TOKENS, IDS = torch.zeros(3, 14, dtype=torch.int64), torch.arange(3)
X, WEIGHT, CLASSES = torch.zeros(4, 6), torch.zeros(8, 6), torch.tensor([0, 1, 2, 5])
Q = torch.zeros(6, 2, 8)


def quantize(**change: Any) -> Any:
    return quantize_coords(**({"xy": XY, "visible": VISIBLE} | change))


def dequantize(**change: Any) -> Any:
    return dequantize_coords(**({"tokens": torch.zeros(39, dtype=torch.int64)} | change))


def mask(**change: Any) -> Any:
    return mask_tokens(**({"tokens": TOKENS, "spec": SPEC, "seed": 1, "sample_ids": IDS} | change))


def attend(**change: Any) -> Any:
    return cross_modal_attention(**({n: Q for n in "qkv"} | {f"{n}_segments": SEGMENTS for n in "qk"} | change))


def lose(**change: Any) -> Any:
    return linear_cross_entropy(**({"x": X, "weight": WEIGHT, "targets": CLASSES} | change))


def segments(max_seqlen: Any) -> Segments:
    return Segments(SEGMENTS.cu_seqlens, SEGMENTS.counts, max_seqlen)


SPARSE = r"must be a dense \(strided\) tensor, got torch\.sparse_coo: use \.to_dense"
NUMPY = r"must be a torch\.Tensor, got ndarray: convert it with torch\.as_tensor"
REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (quantize, {"xy": XY.numpy()}, f"quantize_coords: xy {NUMPY}"),
    (quantize, {"xy": XY.numpy(), "scale": np.ones(2)}, f"quantize_coords: xy {NUMPY}"),
    (quantize, {"visible": VISIBLE.numpy()}, f"quantize_coords: visible {NUMPY}"),
    (quantize, {"visible": VISIBLE.int()}, "visible must be bool"),
    (quantize, {"xy": XY.to_sparse()}, f"xy {SPARSE}"),
    (quantize, {"scale": torch.ones(2).to_sparse()}, f"scale {SPARSE}"),
    (quantize, {"xy": torch.tensor(1.0), "visible": torch.tensor(True)}, r"xy must have shape \(\.\.\., J, 2\)"),
    (quantize, {"xy": XY.to(torch.complex64)}, "xy must be floating, got torch.complex64"),
    (quantize, {"scale": np.ones(2, np.int64)}, "scale must be floating, got torch.int64"),
    (quantize, {"scale": np.ones(2, np.complex64)}, "scale must be floating, got torch.complex64"),
    (quantize, {"scale": np.array(["a", "b"])}, "scale must be a floating tensor, array or number, got ndarray"),
    (quantize, {"offset": [1.0, [2.0]]}, "offset must be a floating tensor, array or number, got list"),
    (quantize, {"offset": np.ones(3, np.float32)}, r"offset must be broadcastable to \(2, 2\), got \(3,\)"),
    (quantize, {"offset": torch.ones(2, device="meta")}, "offset is on meta, xy on cpu"),
    (quantize, {"bins": 8192.0}, r"bins must be an integer, got 8192\.0"),
    (quantize, {"bins": True}, "bins must be an integer, got True"),
    (quantize, {"bins": torch.tensor(3)}, r"bins must be an integer, got a tensor .*\.item\(\)"),
    (quantize, {"bins": None}, "bins must be an integer, got None"),
    (quantize, {"bins": 2**70}, "bins must be 2 to 16777216"),
    (quantize, {"canvas": "256"}, "canvas must be a number, got '256'"),
    (quantize, {"canvas": True}, "canvas must be a number, got True"),
    (quantize, {"canvas": torch.tensor(256.0)}, r"canvas must be a number, got a tensor .*\.item\(\)"),
    (
        quantize,
        {"canvas": 1e39},
        r"canvas must be finite and positive, got 1e\+39; float32 holds 1\.2e-38 to",
    ),
    (quantize, {"canvas": 1e-39}, "canvas must be finite and positive, got"),
    (quantize, {"canvas": 10**400}, "canvas must be finite and positive, got"),
    (quantize, {"canvas": np.float64("inf")}, "canvas must be finite and positive, got"),
    (quantize, {"xy": XY.double(), "canvas": 1e-310}, "canvas must be finite and positive, .* float64 holds"),
    (dequantize, {"canvas": 1e39}, "dequantize_coords: canvas must be finite and positive, .* float32 holds"),
    (dequantize, {"bins": 8192.0}, "dequantize_coords: bins must be an integer"),
    (dequantize, {"tokens": np.zeros(39, np.int64)}, f"tokens {NUMPY}"),
    (dequantize, {"tokens": torch.zeros(39, dtype=torch.bool)}, "tokens must be integer, got torch.bool"),
    (dequantize, {"tokens": torch.zeros(39, dtype=torch.int64).to_sparse()}, f"tokens {SPARSE}"),
    (mask, {"seed": 1.5}, r"seed must be an integer, got 1\.5"),
    (mask, {"seed": True}, "seed must be an integer, got True"),
    (mask, {"seed": None}, "seed must be an integer, got None"),
    (mask, {"seed": torch.tensor(4)}, r"seed must be an integer, got a tensor .*\.item\(\)"),
    (mask, {"seed": 2**64}, "seed must fit in 64 bits"),
    (mask, {"epoch": 1.0}, r"epoch must be an integer, got 1\.0"),
    (mask, {"epoch": -1}, r"epoch must be 0 to 2\*\*32 - 1, got -1"),
    (mask, {"epoch": 2**32}, r"epoch must be 0 to 2\*\*32 - 1, got 4294967296"),
    (mask, {"epoch": 2**70}, r"epoch must be 0 to 2\*\*32 - 1"),
    (mask, {"capacity": 7}, r"capacity must be \(encoder, decoder\), got 7; expected two integers"),
    (mask, {"capacity": "77"}, r"capacity must be \(encoder, decoder\), got '77'; expected two integers"),
    (mask, {"capacity": (50, 50, 50)}, r"capacity must be \(encoder, decoder\), got \(50, 50, 50\); expected two"),
    (mask, {"capacity": (50.0, 50.0)}, r"capacity must be an integer, got 50\.0"),
    (mask, {"capacity": torch.tensor([50, 50])}, r"capacity must be \(encoder, decoder\), got tensor"),
    (mask, {"capacity": (-1, 50)}, "capacity must be two numbers that are not negative"),
    (mask, {"capacity": (2**70, 50)}, r"capacity must be below 2\*\*31"),
    (mask, {"spec": {"max_seq_lens": (5, 9)}}, "spec must be a MaskingSpec, got dict"),
    (mask, {"tokens": TOKENS.float()}, "tokens must be integer, got torch.float32"),
    (mask, {"tokens": TOKENS.bool()}, "tokens must be integer, got torch.bool"),
    (mask, {"tokens": TOKENS.numpy()}, f"mask_tokens: tokens {NUMPY}"),
    (mask, {"tokens": TOKENS.to_sparse()}, f"tokens {SPARSE}"),
    (mask, {"sample_ids": [0, 1, 2]}, "sample_ids must be a torch.Tensor, got list"),
    (mask, {"sample_ids": IDS.int()}, r"sample_ids must be int64 \(3,\), got torch.int32"),
    (mask, {"sample_ids": IDS.to("meta")}, "sample_ids is on meta, tokens on cpu"),
    (mask, {"lengths": torch.ones(3, 2)}, "lengths must be integer, got torch.float32"),
    (mask, {"lengths": np.ones((3, 2), np.int64)}, f"lengths {NUMPY}"),
    (mask, {"lengths": torch.full((3, 2), 2**63, dtype=torch.uint64)}, r"lengths\[0, 0\] must be 0 to 5"),
    (attend, {"scale": True}, "scale must be a number, got True"),
    (attend, {"scale": "1"}, "scale must be a number, got '1'"),
    (attend, {"scale": float("nan")}, "scale must be finite.*, got nan"),
    (attend, {"scale": np.float64("inf")}, "scale must be finite.*, got inf"),
    (attend, {"scale": 1e39}, r"scale must be finite in torch\.float32, got 1e\+39"),
    (attend, {"scale": torch.tensor(0.3, requires_grad=True)}, r"scale must be a number, got a tensor .*\.item\(\)"),
    (attend, {"allow": np.eye(2, dtype=bool)}, f"allow {NUMPY}"),
    (attend, {"allow": [[True, False], [False, True]]}, "allow must be a torch.Tensor, got list"),
    (attend, {"allow": torch.eye(2, dtype=torch.int64)}, r"allow must be bool \(2, 2\), got torch.int64.*allow\.bool"),
    (attend, {"allow": torch.eye(2).bool().to_sparse()}, f"allow {SPARSE}"),
    (attend, {"q": Q.numpy()}, f"cross_modal_attention: q {NUMPY}"),
    (attend, {"q": Q.to_sparse()}, f"q {SPARSE}"),
    (attend, {n: Q.to(torch.complex64) for n in "qkv"}, "q must be float32, .*, got torch.complex64"),
    (attend, {n: Q.bool() for n in "qkv"}, "q must be float32, .*, got torch.bool"),
    (attend, {"k_segments": (SEGMENTS.cu_seqlens, SEGMENTS.counts, 3)}, "k_segments must be Segments, got tuple"),
    (attend, {"q_segments": None}, "q_segments must be Segments, got NoneType"),
    (attend, {"q_segments": segments(3.0)}, r"q_segments.max_seqlen must be an integer, got 3\.0"),
    (attend, {"q_segments": segments(True)}, "q_segments.max_seqlen must be an integer, got True"),
    (attend, {"q_segments": segments(torch.tensor(3))}, "q_max_seqlen must be .*, got a tensor"),
    (attend, {"k_segments": segments(2**31)}, r"k_segments.max_seqlen must not be negative, and below 2\*\*31"),
    (lose, {"x": X.numpy()}, f"linear_cross_entropy: x {NUMPY}"),
    (lose, {"targets": CLASSES.numpy()}, f"targets {NUMPY}"),
    (lose, {"targets": CLASSES.int()}, "targets must be torch.int64, got torch.int32"),
    (lose, {"targets": CLASSES.to(torch.uint64)}, "targets must be torch.int64, got torch.uint64"),
    (lose, {"token_weight": np.ones(4, np.float32)}, f"token_weight {NUMPY}"),
    (lose, {"token_weight": torch.ones(4, dtype=torch.complex64)}, "token_weight must be floating"),
    (lose, {"vocab_limit": np.full(4, 8)}, f"vocab_limit {NUMPY}"),
    (lose, {"vocab_limit": 8}, "vocab_limit must be a torch.Tensor, got int"),
    (lose, {"x": X.to_sparse()}, f"x {SPARSE}"),
    (lose, {"weight": WEIGHT.to_sparse()}, f"weight {SPARSE}"),
    (lose, {"x": X.to(torch.complex64)}, "x must be floating, got torch.complex64"),
    (lose, {"x": X.bool()}, "x must be floating, got torch.bool"),
    (
        lose,
        {"x": X.to(torch.float8_e4m3fn), "weight": WEIGHT.to(torch.float8_e4m3fn)},
        "x must be float32, float64, bfloat16 or float16, got torch.float8_e4m3fn",
    ),
    (lose, {"ignore_index": 2.0}, r"ignore_index must be an integer, got 2\.0"),
    (lose, {"ignore_index": None}, "ignore_index must be an integer, got None"),
    (lose, {"ignore_index": True}, "ignore_index must be an integer, got True"),
    (lose, {"ignore_index": 2**63}, "ignore_index must be an int64"),
    (lose, {"max_workspace_bytes": 1e6}, r"max_workspace_bytes must be an integer, got 1000000\.0"),
    (lose, {"max_workspace_bytes": float("inf")}, "max_workspace_bytes must be an integer, got inf"),
    (lose, {"max_workspace_bytes": -5}, "max_workspace_bytes is -5, but 4 tokens"),
]


@backends
@pytest.mark.parametrize(("function", "change", "message"), REFUSED)
def test_refusals_name_the_argument(function: Any, change: dict[str, Any], message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**change, backend=backend)


ACCEPTED: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = [
    (quantize, {"canvas": np.float64(100), "bins": np.int64(777)}, {"canvas": 100.0, "bins": 777}),
    (quantize, {"scale": 2, "offset": [1, 3]}, {"scale": 2.0, "offset": [1.0, 3.0]}),
    (quantize, {"canvas": np.float32(100), "bins": np.uint16(777)}, {"canvas": 100.0, "bins": 777}),
    (quantize, {"canvas": 100}, {"canvas": 100.0}),
    (mask, {"seed": np.int64(-3), "epoch": np.int32(4)}, {"seed": -3, "epoch": 4}),
    (mask, {"seed": np.uint64(2**64 - 3)}, {"seed": -3}),
    (mask, {"capacity": np.array([50, 51])}, {"capacity": (50, 51)}),
    (mask, {"capacity": [50, 51]}, {"capacity": (50, 51)}),
    (mask, {"tokens": (TOKENS + 5).to(torch.uint64)}, {"tokens": TOKENS + 5}),
    (attend, {"scale": np.float32(0.25)}, {"scale": 0.25}),
    (attend, {"scale": 1}, {"scale": 1.0}),
    (attend, {"q_segments": segments(np.int64(3))}, {}),
    (lose, {"ignore_index": np.int64(2)}, {"ignore_index": 2}),
    (lose, {"max_workspace_bytes": np.int64(2**20)}, {"max_workspace_bytes": 2**20}),
    (lose, {"max_workspace_bytes": 2**70}, {"max_workspace_bytes": 2**40}),
]


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, tuple) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [x for part in parts for x in leaves(part)]


@backends
@pytest.mark.parametrize(("function", "change", "same"), ACCEPTED)
def test_numbers_of_numpy(function: Any, change: dict[str, Any], same: dict[str, Any], backend: str) -> None:
    actual, expected = (leaves(function(**arguments, backend=backend)) for arguments in (change, same))
    assert actual
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton"))
@pytest.mark.parametrize(
    ("dtype", "canvas"),
    [(torch.float32, 2.0**-126), (torch.float32, 3e38), *((torch.float64, c) for c in (1e-300, 1e39, 1e308))],
)
def test_extreme_canvases_agree(target: tuple[str, str], dtype: torch.dtype, canvas: float) -> None:
    backend, device = target
    share = torch.rand(40, 13, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.999
    xy, visible = (share * canvas).to(dtype), torch.ones(40, 13, dtype=torch.bool)
    expected = quantize_coords(xy, visible, canvas=canvas, backend="reference")
    actual = quantize_coords(xy.to(device), visible.to(device), canvas=canvas, backend=backend)
    assert torch.equal(actual.cpu(), expected)
    assert (expected[:, 26:] == 1).all()
    assert expected.max() > 8000


@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"))
def test_uint64_tokens_are_read_as_int64(target: tuple[str, str]) -> None:
    backend, device = target
    tokens = torch.full((39,), 2**63 + 5, dtype=torch.uint64)
    back = dequantize_coords(tokens.to(device), backend=backend)
    for actual, want in zip(back, dequantize_coords(tokens.to(torch.int64)), strict=True):
        assert torch.equal(actual.cpu(), want)


@backends
@pytest.mark.parametrize("ignored", [0, 3, 7])
def test_ignore_index_may_be_a_class(ignored: int, backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 6, generator=g, dtype=torch.float64).requires_grad_()
    weight, targets = torch.randn(8, 6, generator=g, dtype=torch.float64), torch.arange(20) % 8
    out = linear_cross_entropy(x, weight, targets, ignore_index=ignored, backend=backend)
    expected = torch.nn.functional.cross_entropy(x @ weight.T, targets, ignore_index=ignored)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(out.loss, x), torch.autograd.grad(expected, x))
    assert not out.correct[targets == ignored].any()


@backends
def test_sample_ids_at_the_ends_of_int64(backend: str) -> None:
    ids = torch.tensor([2**63 - 1, -(2**63), 0])
    together = mask(sample_ids=ids, backend=backend).encoder
    counts = [mask_tokens(TOKENS[:1], SPEC, seed=1, sample_ids=i[None], backend=backend).encoder for i in ids]
    assert torch.equal(together.segments.counts, torch.cat([one.segments.counts for one in counts]))
    assert torch.equal(together.positions, torch.cat([one.positions for one in counts]))


@backends
def test_nothing_at_all(backend: str) -> None:
    assert quantize(xy=XY[:0], visible=VISIBLE[:0], scale=np.ones((0, 2)), backend=backend).shape == (0, 39)
    assert quantize(xy=XY[:, :0], visible=VISIBLE[:, :0], backend=backend).shape == (2, 0)
    assert dequantize(tokens=torch.zeros(0, dtype=torch.int64), backend=backend)[0].shape == (0, 2)
    empty = mask(tokens=TOKENS[:0], sample_ids=IDS[:0], lengths=TOKENS[:0, :2], capacity=(0, 3), backend=backend)
    assert empty.encoder.ids.shape == (0,)
    assert empty.decoder.ids.tolist() == [-100] * 3
    nothing = Segments.from_counts(torch.zeros(2, 0, dtype=torch.int64))
    assert attend(**{n: Q[:0] for n in "qkv"}, q_segments=nothing, k_segments=nothing, backend=backend).shape == (
        0,
        2,
        8,
    )
    assert lose(x=X[:0], targets=CLASSES[:0], backend=backend).loss == 0
    assert lose(x=X[:, :0], weight=WEIGHT[:, :0], backend=backend).loss.item() == pytest.approx(np.log(8))


BAD_COUNTS: list[tuple[Any, Any, str]] = [
    (torch.tensor([[1.5, 2.0]]), None, "counts must be integer, got torch.float32"),
    (torch.tensor([[True]]), None, "counts must be integer, got torch.bool"),
    ([[1, 2]], None, "counts must be a torch.Tensor, got list"),
    (np.array([[1, 2]]), None, "counts must be a torch.Tensor, got ndarray"),
    (torch.tensor([3, 4]), None, r"counts must have shape \(B, M\), got \(2,\)"),
    (torch.tensor([[0, 2], [-1, 2]]), None, r"counts must not be negative, got counts\[1, 0\] = -1"),
    (torch.tensor([[0, 2], [-1, 2]]), 8, r"counts must not be negative, got counts\[1, 0\] = -1"),
    (torch.tensor([[2**31 - 1, 2**31 - 1]]), None, r"counts must be fewer than 2\*\*31 tokens in all, got 4294967294"),
    (torch.tensor([[2**30], [2**30]]), 2**30, r"fewer than 2\*\*31 tokens in all, got 2147483648: use fewer samples"),
    (torch.tensor([[2**32 + 1, 3]]), None, r"fewer than 2\*\*31 tokens"),
    (torch.tensor([[2**62], [2**62]]), 5, r"fewer than 2\*\*31 tokens|max_seqlen is 5"),
    (torch.tensor([[2**62] * 4]), None, r"fewer than 2\*\*31 tokens"),
    (torch.tensor([[3, 4]]), 6, "max_seqlen is 6, but a sample has 7 tokens"),
    (torch.tensor([[3, 4]]), 7.0, r"max_seqlen must be an integer, got 7\.0"),
    (torch.tensor([[3, 4]]), torch.tensor(7), "max_seqlen must be an integer, got a tensor"),
]


@pytest.mark.parametrize(("counts", "max_seqlen", "message"), BAD_COUNTS)
def test_bad_counts(counts: Any, max_seqlen: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"Segments: {message}" if not message.startswith("fewer") else message):
        Segments.from_counts(counts, max_seqlen)


def test_good_counts() -> None:
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint64):
        made = Segments.from_counts(torch.tensor([[3, 4], [0, 2]], dtype=dtype), np.int64(9))
        assert made.cu_seqlens.tolist() == [0, 7, 9]
        assert (made.cu_seqlens.dtype, made.counts.dtype, made.max_seqlen) == (torch.int32, torch.int32, 9)
        assert type(made.max_seqlen) is int
    most = Segments.from_counts(torch.tensor([[2**31 - 2], [1]]))
    assert (most.cu_seqlens.tolist(), most.max_seqlen) == ([0, 2**31 - 2, 2**31 - 1], 2**31 - 2)
    assert Segments.from_counts(torch.zeros(0, 3, dtype=torch.int64)).max_seqlen == 0


@pytest.mark.parametrize("name", ["", None])
def test_an_empty_environment_variable_is_none(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M4KERNELS_BACKEND", "") if name == "" else monkeypatch.delenv(
        "M4KERNELS_BACKEND", raising=False
    )
    assert quantize().shape == (2, 39)
    monkeypatch.setenv("M4KERNELS_BACKEND", "cpp ")
    with pytest.raises(ValueError, match="M4KERNELS_BACKEND='cpp ' is unknown; expected one of cuda, triton, cpp, ref"):
        quantize(bins=777)
