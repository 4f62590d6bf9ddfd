"""cross_modal_attention on every backend. Bodies that take the fixture `kernel` are small enough for the interpreter of
Triton; grids too large for it take `cpu_kernel`, and test_cross_modal_attention_triton.py has smaller ones."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m4kernels import Segments, _ext, cross_modal_attention
from m4kernels.cases import M4_INPUT_MEANS, M4_TARGET_MEANS, m4_counts, random_counts
from tests.ops.attention_cases import ALLOW, EYE, Kernel, case, check, dense, run
from tests.ops.targets import targets

backends = pytest.mark.parametrize("backend", ["cpp", "reference"])
each_target = pytest.mark.parametrize("target", targets("cpp", "reference", "triton"))
CPU = [pytest.param(Kernel(name, "cpu"), id=name) for name in ("reference", "cpp avx512", "cpp avx2", "cpp portable")]


def at_each_level(kernel: Kernel) -> Iterator[Kernel]:
    """The compiled backend at the SIMD level that its name ends with, if this CPU has it."""
    name, _, level = kernel.backend.partition(" ")
    if not level:
        yield kernel
        return
    extension = _ext.require()
    try:
        extension.set_simd_level(level)
    except ValueError as error:
        pytest.skip(str(error))
    yield Kernel(name, "cpu")
    extension.set_simd_level("auto")


@pytest.fixture(params=CPU)
def cpu_kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    yield from at_each_level(request.param)


@pytest.fixture(params=[*CPU, *targets("triton")])
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    yield from at_each_level(Kernel(*request.param))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("allow", ALLOW)
@pytest.mark.parametrize("cross", [False, True])
def test_equals_dense(cpu_kernel: Kernel, dtype: torch.dtype, allow: str, cross: bool) -> None:
    g = torch.Generator().manual_seed(1)
    if cpu_kernel.backend == "cpp" and dtype == torch.float64:
        pytest.skip("the compiled backend computes in float32")
    counts = random_counts(7, (19, 5, 37, 1), g)
    k_counts = random_counts(7, (9, 21, 4, 33), g) if cross else None
    tensors, q_seg, k_seg = case(counts, k_counts, heads=(4, 2), dim=24, dtype=dtype, tails=(5, 3))
    actual = check(cpu_kernel, tensors, q_seg, k_seg, ALLOW[allow], None)
    tail = int(q_seg.cu_seqlens[-1])
    assert (actual[0][tail:] == 0).all()
    assert (actual[1][tail:] == 0).all()
    assert all((x[int(k_seg.cu_seqlens[-1]) :] == 0).all() for x in actual[2:])


@pytest.mark.parametrize("dim", [1, 7, 8, 12, 40, 64, 72, 80, 128, 136])
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (6, 3)])
def test_heads_and_head_dims(cpu_kernel: Kernel, dim: int, heads: tuple[int, int]) -> None:
    counts = random_counts(4, (30, 3, 18, 9), torch.Generator().manual_seed(dim), empty=0.1)
    check(cpu_kernel, *case(counts, heads=heads, dim=dim), ALLOW["causal"], None)


@pytest.mark.parametrize("allow", ["full", "within"])
@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 15, 16, 17, 31, 33, 47, 48, 49, 64, 95, 97, 255, 256, 300])
def test_lengths(cpu_kernel: Kernel, length: int, allow: str) -> None:
    """Around every width of a register block."""
    counts = torch.tensor([[length, 0, 0, 0], [0, length // 2, length - length // 2, 0]])
    check(cpu_kernel, *case(counts, counts.flip(0).roll(1, 1), dim=8), None, None)
    check(cpu_kernel, *case(counts, dim=8), ALLOW[allow], None)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 3.0])
def test_scale(kernel: Kernel, scale: float) -> None:
    check(kernel, *case(torch.tensor([[9, 2, 0, 7], [3, 0, 1, 0]]), device=kernel.device), None, scale)


def test_large_scores(kernel: Kernel) -> None:
    """Scores of some thousands neither overflow nor lose rows; rounding them costs |score| eps of each weight."""
    (q, k, v, grad), q_seg, k_seg = case(torch.tensor([[40, 3, 20, 0], [0, 1, 0, 0]]), device=kernel.device)
    tensors = [q * 60, k * 60, v, grad]
    assert 0.25 * torch.einsum("qhd,khd->hqk", tensors[0], tensors[1]).abs().max() > 5000
    check(kernel, tensors, q_seg, k_seg, None, None)


@pytest.mark.parametrize("shape", ["no samples", "all empty", "no queries", "no keys"])
def test_nothing_to_attend_to(kernel: Kernel, shape: str) -> None:
    some, none = torch.tensor([[3, 0, 2, 1], [0, 4, 0, 0]]), torch.zeros(2, 4, dtype=torch.int32)
    counts, k_counts = {
        "no samples": (none[:0], none[:0]),
        "all empty": (none, none),
        "no queries": (none, some),
        "no keys": (some, none),
    }[shape]
    for tails in ((0, 0), (4, 6)):
        tensors, q_seg, k_seg = case(counts, k_counts, tails=tails, device=kernel.device)
        for x in run(cross_modal_attention, tensors, q_seg, k_seg, backend=kernel.backend):
            assert (x == 0).all()


def test_masked_rows_of_a_sample_give_zero(kernel: Kernel) -> None:
    tensors, q_seg, k_seg = case(torch.tensor([[3, 2, 0, 4]]), device=kernel.device)
    allow = torch.ones(4, 4, dtype=torch.bool)
    allow[1] = False  # rows 3 and 4 attend to nothing
    out, dq, *_ = check(kernel, tensors, q_seg, k_seg, allow, None)
    assert (out[3:5] == 0).all()
    assert (dq[3:5] == 0).all()
    assert (out[[0, 1, 2, 5, 6, 7, 8]] != 0).all()


def test_logsumexp(kernel: Kernel) -> None:
    """What the backward pass is given: the logsumexp of every row, -inf where a row has no key and in the tail."""
    tensors, q_seg, k_seg = case(torch.tensor([[3, 2, 0, 4], [0, 0, 0, 0]]), tails=(5, 5), device=kernel.device)
    allow = torch.ones(4, 4, dtype=torch.bool)
    allow[1] = False  # rows 3 and 4 attend to nothing
    parts = (q_seg.cu_seqlens, q_seg.counts, 9, k_seg.cu_seqlens, k_seg.counts, 9, allow.to(kernel.device), None)
    op = torch.ops.m4kernels.cross_modal_attention
    lse = op(*tensors[:3], *parts, kernel.backend)[1]
    truth = op(*(x.double() for x in tensors[:3]), *parts, "reference")[1]
    assert (truth.isfinite().sum(1) == 7).all()
    torch.testing.assert_close(lse, truth.float(), atol=1e-6, rtol=1e-6)


def test_tail_may_hold_anything(kernel: Kernel) -> None:
    """The tail of a batch of fixed capacity is never read, so NaN there changes nothing."""
    counts = random_counts(5, (9, 3, 9, 3), torch.Generator().manual_seed(2))
    tensors, q_seg, k_seg = case(counts, tails=(6, 6), device=kernel.device)
    clean = run(cross_modal_attention, tensors, q_seg, k_seg, backend=kernel.backend)
    n = int(q_seg.cu_seqlens[-1])
    poisoned = [x.clone() for x in tensors]
    for x in poisoned:
        x[n:] = torch.nan
    for a, b in zip(clean, run(cross_modal_attention, poisoned, q_seg, k_seg, backend=kernel.backend), strict=True):
        assert torch.equal(a, b)


def test_other_strides(kernel: Kernel) -> None:
    counts = torch.tensor([[20, 1, 9, 0], [0, 2, 5, 5]])
    (q, k, v, grad), q_seg, k_seg = case(counts, dim=16, device=kernel.device)
    expected = run(
        cross_modal_attention, [x.contiguous() for x in (q, k, v, grad)], q_seg, k_seg, backend=kernel.backend
    )
    strided = [
        q.transpose(0, 1).contiguous().transpose(0, 1),  # heads outermost
        k.transpose(1, 2).contiguous().transpose(1, 2),  # head_dim not contiguous
        torch.stack([v, v], -1)[..., 0],
        grad,
    ]
    for a, b in zip(expected, run(cross_modal_attention, strided, q_seg, k_seg, backend=kernel.backend), strict=True):
        assert torch.equal(a, b)
    broadcast = grad.new_ones(1, 1, 1).expand(grad.shape)  # as out.sum().backward() sends it
    ones = run(cross_modal_attention, [q, k, v, torch.ones_like(grad)], q_seg, k_seg, backend=kernel.backend)
    for a, b in zip(
        ones, run(cross_modal_attention, [q, k, v, broadcast], q_seg, k_seg, backend=kernel.backend), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("allow", ["full", "within"])
def test_m4_shapes(cpu_kernel: Kernel, allow: str) -> None:
    g = torch.Generator().manual_seed(4)
    encoder, decoder = m4_counts(4, M4_INPUT_MEANS, g), m4_counts(4, M4_TARGET_MEANS, g)
    for counts, k_counts in ((encoder, None), (decoder, None), (decoder, encoder)):
        check(cpu_kernel, *case(counts, k_counts, heads=(10, 10), dim=64), ALLOW[allow], None)


def test_same_bits_on_every_run_and_number_of_threads(cpu_kernel: Kernel) -> None:
    counts = random_counts(9, (60, 20, 60, 20), torch.Generator().manual_seed(3))
    call = functools.partial(run, cross_modal_attention, *(lambda t, q, k: (t, q, k))(*case(counts, heads=(4, 2))))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            results.append(call(backend=cpu_kernel.backend))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck_of_the_reference() -> None:
    counts, k_counts = torch.tensor([[3, 0, 2, 1], [0, 0, 0, 0], [1, 2, 0, 0]]), torch.tensor([[2, 1, 0, 2]] * 3)
    for allow in ("full", "within", "causal"):
        (q, k, v, _), q_seg, k_seg = case(counts, k_counts, heads=(4, 2), dim=3, dtype=torch.float64, tails=(1, 1))
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.gradcheck(
            lambda q, k, v, a=ALLOW[allow], qs=q_seg, ks=k_seg: cross_modal_attention(
                q, k, v, qs, ks, allow=a, scale=0.7, backend="reference"
            ),
            leaves,
        )


@each_target
@pytest.mark.parametrize("allow", ["full", "within"])
def test_opcheck(target: tuple[str, str], allow: str) -> None:
    backend, device = target
    (q, k, v, grad), q_seg, k_seg = case(torch.tensor([[3, 0, 2, 1], [0, 4, 0, 0]]), tails=(2, 2), device=device)
    mask = None if ALLOW[allow] is None else ALLOW[allow].to(device)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    parts = (q_seg.cu_seqlens, q_seg.counts, 6, k_seg.cu_seqlens, k_seg.counts, 6, mask, None, backend)
    op, backward = torch.ops.m4kernels.cross_modal_attention, torch.ops.m4kernels.cross_modal_attention_backward
    torch.library.opcheck(op.default, (*leaves, *parts))
    out, lse = op(q, k, v, *parts)
    assert not op(*leaves, *parts)[1].requires_grad
    torch.library.opcheck(backward.default, (grad, out, lse, q, k, v, *parts))


@each_target
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_graph_break(target: tuple[str, str], dynamic: bool | None) -> None:
    backend, device = target
    allow = EYE.to(device)

    def loss(qkv: Tensor, segments: Segments, allow: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)
        return cross_modal_attention(q, k, v, segments, segments, allow=allow, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seed in (0, 1):
        counts = random_counts(3, (9, 3, 9, 3), torch.Generator().manual_seed(seed), empty=0.1)
        segments = Segments.from_counts(counts).to(device)
        g = torch.Generator().manual_seed(seed)
        qkv = torch.randn(int(segments.cu_seqlens[-1]), 3, 2, 8, generator=g).to(device).requires_grad_()
        expected = torch.autograd.grad(loss(qkv, segments, allow), qkv)[0]
        assert torch.equal(torch.autograd.grad(compiled(qkv, segments, allow), qkv)[0], expected)


def test_second_derivative_is_refused() -> None:
    (q, k, v, _), q_seg, k_seg = case(torch.tensor([[3, 0, 2, 1]]))
    q.requires_grad_()
    (grad,) = torch.autograd.grad(cross_modal_attention(q, k, v, q_seg, k_seg).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


class Launches(TorchDispatchMode):
    """The names of the operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("registered", [False, True])
def test_the_backward_pass_fills_no_gradient_of_lse(registered: bool) -> None:
    (q, k, v, grad), q_seg, k_seg = case(torch.tensor([[3, 0, 2, 1]]))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if registered:
        parts = (q_seg.cu_seqlens, q_seg.counts, q_seg.max_seqlen, k_seg.cu_seqlens, k_seg.counts, k_seg.max_seqlen)
        out, _lse = torch.ops.m4kernels.cross_modal_attention(*leaves, *parts, None, None, "cpp")
    else:
        out = cross_modal_attention(*leaves, q_seg, k_seg, backend="cpp")
    with Launches() as launches:
        grads = torch.autograd.grad(out, leaves, grad)
    assert [name for name in launches.names if "detach" not in name] == [
        "m4kernels.cross_modal_attention_backward.default"
    ]
    expected = torch.autograd.grad(dense(q, k, v, q_seg, k_seg, None, None), leaves, grad)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


class NoGradient(torch.autograd.Function):
    """1 for any input, of which it has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_ones(())

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("registered", [False, True])
def test_outputs_without_a_gradient(registered: bool) -> None:
    (q, k, v, _), q_seg, k_seg = case(torch.tensor([[3, 0, 2, 1]]))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    parts = (q_seg.cu_seqlens, q_seg.counts, q_seg.max_seqlen, k_seg.cu_seqlens, k_seg.counts, k_seg.max_seqlen)
    if registered:
        out, lse = torch.ops.m4kernels.cross_modal_attention(*leaves, *parts, None, None, "cpp")
        with pytest.raises(RuntimeError, match="does not require grad"):  # only lse: it is not differentiable
            lse.sum().backward()
    else:
        out = cross_modal_attention(*leaves, q_seg, k_seg, backend="cpp")
    with Launches() as launches:
        grads = torch.autograd.grad(NoGradient.apply(out), leaves, allow_unused=True)
    assert grads == (None, None, None)
    assert not any("cross_modal_attention" in name for name in launches.names)  # nothing is computed of nothing
    (grad,) = torch.autograd.grad(NoGradient.apply(out * 2) + q.square().sum(), q)
    assert torch.equal(grad, 2 * q)


Q = torch.zeros(10, 4, 8)
SEGMENTS = Segments.from_counts(torch.tensor([[3, 2], [0, 0], [1, 4]]))
BAD = [
    ({"q": torch.zeros(10, 32)}, r"q must have shape \(tokens, heads, head_dim\), got \(10, 32\)"),
    ({"q": torch.zeros(10, 4, 0)}, r"q must have shape \(tokens, heads, head_dim\), got \(10, 4, 0\)"),
    ({"k": torch.zeros(10, 4, 8, dtype=torch.bfloat16)}, "k must have the dtype of q, torch.float32, got torch.bfl"),
    ({"v": torch.zeros(10, 4, 8, device="meta")}, "v must be on the device of q, cpu, got meta"),
    ({n: torch.zeros(10, 4, 8, dtype=torch.int64) for n in "qkv"}, "q must be float32, .*, got torch.int64"),
    ({"k": torch.zeros(10, 4, 16)}, "k must have the head_dim of q, 8, got 16"),
    ({"v": torch.zeros(9, 4, 8)}, r"v must have the shape of k, \(10, 4, 8\), got \(9, 4, 8\)"),
    ({n: torch.zeros(10, 3, 8) for n in "kv"}, "heads of q must be a multiple of those of k, 3, got 4"),
    ({n: torch.zeros(9, 4, 8) for n in "kv"}, "k_segments.cu_seqlens ends at 10, but there are only 9 tokens"),
    ({"q": torch.zeros(9, 4, 8)}, "q_segments.cu_seqlens ends at 10, but there are only 9 tokens"),
    (
        {"q_segments": Segments(torch.tensor([0, 5, 4, 10], dtype=torch.int32), SEGMENTS.counts, 6)},
        "q_segments.cu_seqlens must not decrease",
    ),
    (
        {"k_segments": Segments(torch.tensor([0, 4, 5, 10], dtype=torch.int32), SEGMENTS.counts, 6)},
        "k_segments.counts of sample 0 add up to 5, but cu_seqlens gives it 4 tokens",
    ),
    ({"k_segments": Segments(SEGMENTS.cu_seqlens, SEGMENTS.counts.long(), 5)}, "k_segments.counts must be int32"),
    ({"q_segments": Segments(SEGMENTS.cu_seqlens.long(), SEGMENTS.counts, 5)}, "q_segments.cu_seqlens must be int32"),
    ({"q_segments": Segments(SEGMENTS.cu_seqlens, SEGMENTS.counts, 4)}, "q_segments.max_seqlen is 4, but a sample has"),
    ({"k_segments": Segments(SEGMENTS.cu_seqlens, SEGMENTS.counts, -1)}, "k_segments.max_seqlen must not be negative"),
    (
        {"k_segments": Segments.from_counts(torch.tensor([[3, 2], [1, 4]]))},
        r"k_segments.counts must have the shape \(B, M\) of q_segments.counts, \(3, 2\), got \(2, 2\)",
    ),
    ({"k_segments": SEGMENTS.to("meta")}, "k_segments must be on the device of q, cpu, got meta"),
    ({"allow": torch.ones(3, 3, dtype=torch.bool)}, r"allow must be bool \(2, 2\), got torch.bool \(3, 3\)"),
    ({"allow": torch.ones(2, 2)}, r"allow must be bool \(2, 2\), got torch.float32 \(2, 2\)"),
    ({"allow": torch.ones(2, 2, dtype=torch.bool, device="meta")}, "allow must be on the device of q, cpu, got meta"),
    (
        {n: Q.double() for n in "qkv"} | {"backend": "cpp"},
        "'cpp' cannot run: it computes in float32, got torch.float64",
    ),
    ({"backend": "fast"}, "backend='fast' is unknown; expected one of"),
]


@backends
@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(backend: str, change: dict, message: str) -> None:
    arguments = {"q": Q, "k": Q, "v": Q, "q_segments": SEGMENTS, "k_segments": SEGMENTS, "backend": backend} | change
    with pytest.raises(ValueError, match=message):
        cross_modal_attention(**arguments)


@backends
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(10, 4, 7), r"grad_out must be torch.float32 \(10, 4, 8\) on cpu, got torch.float32 \(10, 4, 7"),
        (1, torch.zeros(9, 4, 8), "out must be"),
        (2, torch.zeros(10, 4), r"lse must be torch.float32 \(4, 10\) on cpu, got torch.float32 \(10, 4\)"),
    ],
)
def test_bad_input_of_the_backward(backend: str, index: int, value: Tensor, message: str) -> None:
    parts = (SEGMENTS.cu_seqlens, SEGMENTS.counts, 5)
    arguments = [Q, Q, torch.zeros(4, 10), Q, Q, Q, *parts, *parts, None, None, backend]
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.m4kernels.cross_modal_attention_backward(*arguments)
