"""cross_modal_attention in Triton: the grids of test_cross_modal_attention.py in shapes small enough for the
interpreter, and, on a GPU, shapes of M4, repeated runs and graph capture."""

import mmap
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from m4kernels import Segments, _triton, cross_modal_attention
from m4kernels.cases import M4_INPUT_MEANS, M4_TARGET_MEANS, m4_counts, random_counts
from m4kernels.ops.cross_modal_attention.arguments import AttentionArguments
from m4kernels.testing import assert_within_error_budget
from tests.ops.attention_cases import ALLOW, Kernel, case, check, run
from tests.ops.targets import HAS_TRITON, targets

NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python's mmap names from 3.13 on
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A sample of several tiles a side, whose tiles are whole, mixed and absent; one without queries or keys; single tokens.
COUNTS = torch.tensor([[35, 0, 33, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
KEY_COUNTS = torch.tensor([[3, 36, 2, 27], [5, 0, 1, 0], [1, 0, 0, 0]])


@pytest.fixture(params=targets("triton"))
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return Kernel(*request.param)


@pytest.mark.parametrize(
    ("dtype", "allow"), [(t, a) for t in DTYPES for a in ALLOW if t != torch.float16 or a in ("full", "within")]
)
@pytest.mark.parametrize("cross", [False, True])
def test_equals_dense(kernel: Kernel, dtype: torch.dtype, allow: str, cross: bool) -> None:
    k_counts = KEY_COUNTS if cross else None
    tensors, q_seg, k_seg = case(
        COUNTS, k_counts, heads=(2, 1), dim=24, dtype=dtype, tails=(70, 3), device=kernel.device
    )
    out, dq, dk, dv = check(kernel, tensors, q_seg, k_seg, ALLOW[allow], None)
    for x, segments in ((out, q_seg), (dq, q_seg), (dk, k_seg), (dv, k_seg)):
        assert (x[int(segments.cu_seqlens[-1]) :] == 0).all()


@pytest.mark.parametrize("dim", [1, 7, 8, 40, 64, 72, 80, 128])
def test_head_dims(kernel: Kernel, dim: int) -> None:
    counts = torch.tensor([[30, 3, 0, 5], [0, 2, 9, 0]])
    check(kernel, *case(counts, heads=(1, 1), dim=dim, device=kernel.device), ALLOW["causal"], None)


@pytest.mark.parametrize("heads", [(3, 1), (4, 2)])
def test_grouped_heads(kernel: Kernel, heads: tuple[int, int]) -> None:
    counts, k_counts = torch.tensor([[9, 0, 30, 1]]), torch.tensor([[3, 2, 0, 7]])
    check(kernel, *case(counts, k_counts, heads=heads, device=kernel.device), ALLOW["cross"], None)


@pytest.mark.parametrize("cross", [False, True])
def test_lengths_around_tiles(kernel: Kernel, cross: bool) -> None:
    lengths = torch.tensor([1, 31, 32, 33, 63, 64, 65])
    counts = lengths[:, None] * torch.tensor([[0, 1, 0, 0]])
    k_counts = lengths.flip(0)[:, None] * torch.tensor([[0, 0, 1, 0]]) if cross else None
    check(kernel, *case(counts, k_counts, heads=(1, 1), dim=8, device=kernel.device), None, None)


@pytest.mark.parametrize(("modalities", "masked"), [(1, True), (3, True), (31, True), (33, False)])
def test_numbers_of_modalities(kernel: Kernel, modalities: int, masked: bool) -> None:
    """Up to 31 are kept as bits; without `allow` they do not matter."""
    g = torch.Generator().manual_seed(modalities)
    counts = random_counts(2, (80 // modalities,) * modalities, g, empty=0.3)
    k_counts = random_counts(2, (80 // modalities,) * modalities, g, empty=0.3)
    allow = torch.rand(modalities, modalities, generator=g) < 0.5
    tensors = case(counts, k_counts, heads=(1, 1), dim=8, device=kernel.device)
    check(kernel, *tensors, allow if masked else None, None)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy's, under the interpreter
def test_skipped_tiles_are_not_read(kernel: Kernel) -> None:
    """Modalities with nothing in common and tiles of their own: NaN in the keys of one does not reach the other."""
    (q, k, v, grad), q_seg, k_seg = case(torch.tensor([[64, 64]]), heads=(1, 1), device=kernel.device)
    k, v = k.clone(), v.clone()
    k[64:], v[64:] = torch.nan, torch.nan
    allow = torch.eye(2, dtype=torch.bool, device=kernel.device)
    out, dq, dk, dv = run(cross_modal_attention, [q, k, v, grad], q_seg, k_seg, allow=allow, backend="triton")
    for x in (out, dq, dk, dv):
        assert x[:64].isfinite().all()
        assert x[64:].isnan().all()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_tiles_between_allowed_ones_are_not_read(kernel: Kernel) -> None:
    """The first and the last modality see each other alone; whole tiles between hold NaN, in queries and keys alike."""
    counts = torch.tensor([[40, 0, 200, 0, 40]])
    tensors, q_seg, k_seg = case(counts, heads=(1, 1), dim=8, device=kernel.device)
    allow = torch.tensor([[m in (0, 1, 4) for m in range(5)]] * 5)
    allow[2] = False
    allow[:, 2] = False
    allow = allow.to(kernel.device)
    expected = run(cross_modal_attention, tensors, q_seg, k_seg, allow=allow, backend="triton")
    poisoned = [x.clone() for x in tensors]
    for x in poisoned:
        x[64:192] = torch.nan
    actual = run(cross_modal_attention, poisoned, q_seg, k_seg, allow=allow, backend="triton")
    check(kernel, tensors, q_seg, k_seg, allow, None)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(torch.cat((a[:40], a[240:])), torch.cat((b[:40], b[240:])))


def test_addresses_beyond_2_to_31() -> None:
    """Rows so far apart that the later ones lie 2^31 numbers on; no memory is needed but that of the rows."""
    if torch.cuda.is_available():
        pytest.skip("needs the interpreter: the memory lies on the CPU")
    rows, step = 70, 2**25
    (_, k, v, grad), q_seg, k_seg = case(torch.tensor([[rows - 2], [2]]), heads=(1, 1), dtype=torch.float16, dim=8)
    memory = mmap.mmap(-1, 2 * rows * step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    spread = torch.from_numpy(np.frombuffer(memory, np.float16)).as_strided((rows, 1, 8), (step, 8, 1))
    dense = torch.randn(rows, 1, 8, generator=torch.Generator().manual_seed(0)).half()
    spread.copy_(dense)
    expected = run(cross_modal_attention, [dense, k, v, grad], q_seg, k_seg, backend="triton")
    for inputs in ([spread, k, v, grad], [dense, k, v, spread]):
        if inputs[3] is spread:
            expected = run(cross_modal_attention, [dense, k, v, dense], q_seg, k_seg, backend="triton")
        for a, b in zip(run(cross_modal_attention, inputs, q_seg, k_seg, backend="triton"), expected, strict=True):
            assert torch.equal(a, b)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    from m4kernels.ops.cross_modal_attention import triton as module

    def asked(q: Any, modalities: int = 4, allow: Tensor | None = None) -> str | None:
        segments = Segments.from_counts(torch.zeros(1, modalities, dtype=torch.int64))
        return module.can_run(AttentionArguments(q, q, q, segments, segments, allow, 1.0))

    assert asked(torch.zeros(1, 1, 128)) is None
    assert "computes in float32" in asked(torch.zeros(1, 1, 8, dtype=torch.float64))
    assert "at most 128, got 136: use" in asked(torch.zeros(1, 1, 136))
    assert asked(torch.zeros(1, 1, 8), 31, torch.ones(31, 31) > 0) is None
    assert asked(torch.zeros(1, 1, 8), 32) is None
    assert "allow may have up to 31 modalities, got 32: use" in asked(torch.zeros(1, 1, 8), 32, torch.ones(32, 32) > 0)
    monkeypatch.setattr(_triton, "_capability", lambda device: (7, 5))
    old = SimpleNamespace(dtype=torch.bfloat16, shape=(1, 1, 64), device=torch.device("cuda", 0))
    assert "needs a GPU of compute capability 8.0 or more, this one has 7.5: use float16" in asked(old)
    old.dtype = torch.float16
    assert asked(old) is None
    q = torch.zeros(2, 1, 136)
    segments = Segments.from_counts(torch.tensor([[2]]))
    with pytest.raises(ValueError, match=r"'triton' cannot run: .*head_dim must be at most 128|got cpu tensors"):
        cross_modal_attention(q, q, q, segments, segments, backend="triton")


def _m4(dtype: torch.dtype, *, cross: bool, tail: int = 64) -> tuple[list[Tensor], Segments, Segments]:
    g = torch.Generator().manual_seed(4)
    encoder, decoder = m4_counts(96, M4_INPUT_MEANS, g), m4_counts(96, M4_TARGET_MEANS, g)
    counts, k_counts = (decoder, encoder) if cross else (encoder, None)
    return case(counts, k_counts, heads=(10, 10), dim=64, dtype=dtype, tails=(tail, tail), device="cuda")


@pytest.mark.parametrize("dtype", [pytest.param(t, marks=on_gpu) for t in DTYPES])
@pytest.mark.parametrize("allow", ["full", "within", "causal"])
@pytest.mark.parametrize("cross", [False, True])
def test_m4_batch_of_96(dtype: torch.dtype, allow: str, cross: bool) -> None:
    tensors, q_seg, k_seg = _m4(dtype, cross=cross)
    mask = None if ALLOW[allow] is None else ALLOW[allow].cuda()
    call = {"q_segments": q_seg, "k_segments": k_seg, "allow": mask}
    truth = run(cross_modal_attention, [x.double() for x in tensors], **call, backend="reference")
    plain = run(cross_modal_attention, tensors, **call, backend="reference")
    actual = run(cross_modal_attention, tensors, **call, backend="triton")
    for name, a, p, t in zip(("out", "dq", "dk", "dv"), actual, plain, truth, strict=True):
        assert_within_error_budget(a, p, t, what=name)


@pytest.mark.parametrize("dtype", [pytest.param(t, marks=on_gpu) for t in (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("allow", ["full", "within"])
def test_ten_runs_give_the_same_bits(dtype: torch.dtype, allow: str) -> None:
    tensors, q_seg, k_seg = _m4(dtype, cross=True)
    mask = None if ALLOW[allow] is None else ALLOW[allow].cuda()
    first, *others = (
        run(cross_modal_attention, tensors, q_seg, k_seg, allow=mask, backend="triton") for _ in range(10)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("allow", [pytest.param(name, marks=on_gpu) for name in ("full", "within")])
def test_graph_capture(allow: str) -> None:
    """Captured once, replayed on a batch of other lengths within the same capacity."""
    capacity, batches = 96 * 150, []
    mask = None if ALLOW[allow] is None else ALLOW[allow].cuda()
    for seed in (0, 1):
        counts = m4_counts(96, M4_INPUT_MEANS, torch.Generator().manual_seed(seed)).clamp_max(63)
        batches.append(Segments.from_counts(counts, max_seqlen=252).to("cuda"))
    segments = Segments(batches[0].cu_seqlens.clone(), batches[0].counts.clone(), 252)
    g = torch.Generator(device="cuda").manual_seed(0)
    q, k, v, grad = (torch.randn(capacity, 10, 64, generator=g, device="cuda").bfloat16() for _ in range(4))

    def step() -> list[Tensor]:
        return run(cross_modal_attention, [q, k, v, grad], segments, segments, allow=mask, backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for batch in batches:
        segments.cu_seqlens.copy_(batch.cu_seqlens)
        segments.counts.copy_(batch.counts)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)
