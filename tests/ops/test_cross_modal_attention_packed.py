"""cross_modal_attention of fused projections: what the op of three tensors gives, and one gradient written in place."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from m4kernels import (
    Segments,
    cross_modal_attention,
    cross_modal_attention_kvpacked,
    cross_modal_attention_qkvpacked,
)
from m4kernels.cases import random_counts
from m4kernels.ops.cross_modal_attention.api import dispatcher
from m4kernels.ops.cross_modal_attention.arguments import AttentionArguments
from tests.ops.attention_cases import ALLOW, EYE, Kernel, Made, case, check, kvpacked, qkvpacked
from tests.ops.targets import targets

each_target = pytest.mark.parametrize("target", targets("cpp", "reference", "triton"))
on_cpu = pytest.mark.parametrize("backend", ["cpp", "reference"])
COUNTS, KEY_COUNTS = torch.tensor([[3, 0, 2, 1], [0, 0, 0, 0], [0, 4, 0, 0]]), torch.tensor([[2, 1, 0, 2]] * 3)
OPS = torch.ops.m4kernels


class Form(NamedTuple):
    """One of the two functions.

    Args:
        packed, unpacked: the function, and the same by the op of three tensors; called with leaves and segments.
        leaves: makes the leaves of q, k and v.
        op, backward: as they are registered.
    """

    packed: Callable[..., Tensor]
    unpacked: Callable[..., Tensor]
    leaves: Callable[[Tensor, Tensor, Tensor], list[Tensor]]
    op: Any
    backward: Any


FORMS = {
    "self": Form(
        lambda qkv, q_seg, _k_seg, **options: cross_modal_attention_qkvpacked(qkv, q_seg, **options),
        lambda qkv, q_seg, _k_seg, **options: cross_modal_attention(*qkv.unbind(1), q_seg, q_seg, **options),
        lambda q, k, v: [torch.stack((q, k, v), 1)],
        OPS.cross_modal_attention_qkvpacked.default,
        OPS.cross_modal_attention_qkvpacked_backward.default,
    ),
    "cross": Form(
        cross_modal_attention_kvpacked,
        lambda q, kv, q_seg, k_seg, **options: cross_modal_attention(q, *kv.unbind(1), q_seg, k_seg, **options),
        lambda q, k, v: [q, torch.stack((k, v), 1)],
        OPS.cross_modal_attention_kvpacked.default,
        OPS.cross_modal_attention_kvpacked_backward.default,
    ),
}
each_form = pytest.mark.parametrize("form", FORMS)


def differentiated(function: Any, leaves: list[Tensor], grad: Tensor, *segments: Segments, **options: Any) -> list:
    """[out, gradients of the leaves]"""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves, *segments, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def inputs(form: str, counts: Tensor, k_counts: Tensor, dim: int, dtype: torch.dtype, device: str = "cpu", **more: Any):
    """([q, k, v, grad], q_segments, k_segments): one side for "self", grouped heads for "cross"; tails."""
    if form == "self":
        return case(counts, heads=(2, 2), dim=dim, dtype=dtype, tails=(5, 5), device=device, **more)
    return case(counts, k_counts, heads=(4, 2), dim=dim, dtype=dtype, tails=(5, 3), device=device, **more)


@on_cpu
@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("allow", ["full", "within", "one empty row, one empty column"])
@pytest.mark.parametrize("dim", [24, 32])  # of 32 float32's registers are written straight into the gradient
def test_equals_dense(backend: str, form: str, dtype: torch.dtype, allow: str, dim: int) -> None:
    if backend == "cpp" and dtype == torch.float64:
        pytest.skip("the compiled backend computes in float32")
    g = torch.Generator().manual_seed(1)
    counts, k_counts = random_counts(6, (19, 5, 27, 1), g), random_counts(6, (9, 21, 4, 33), g)
    function = qkvpacked if form == "self" else kvpacked
    check(Kernel(backend, "cpu"), *inputs(form, counts, k_counts, dim, dtype), ALLOW[allow], None, function)


@each_target
@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("allow", ["full", "causal"])
def test_equals_the_op_of_three_tensors(target: tuple[str, str], form: str, dtype: torch.dtype, allow: str) -> None:
    """Bit by bit; the gradients are whole and contiguous, 0 in the tail."""
    backend, device = target
    f = FORMS[form]
    (q, k, v, grad), *segments = inputs(form, COUNTS, KEY_COUNTS, 16, dtype, device)
    options = {"allow": None if ALLOW[allow] is None else ALLOW[allow].to(device), "scale": 0.7, "backend": backend}
    leaves = f.leaves(q, k, v)
    actual = differentiated(f.packed, leaves, grad, *segments, **options)
    for a, b in zip(actual, differentiated(f.unpacked, leaves, grad, *segments, **options), strict=True):
        assert torch.equal(a, b)
    for x, tail in zip(actual[1:], [segments[0] if x is q else segments[1] for x in leaves], strict=True):
        assert x.is_contiguous()
        assert (x[int(tail.cu_seqlens[-1]) :] == 0).all()
        assert x.abs().sum() > 0


@each_target
@each_form
@pytest.mark.parametrize("shape", ["no samples", "all empty", "no queries", "no keys"])
def test_nothing_to_attend_to(target: tuple[str, str], form: str, shape: str) -> None:
    backend, device = target
    none = torch.zeros(2, 4, dtype=torch.int32)
    counts, k_counts = {
        "no samples": (none[:0], none[:0]),
        "all empty": (none, none),
        "no queries": (none, COUNTS[:2]),
        "no keys": (COUNTS[:2], none),
    }[shape]
    if form == "self" and shape in ("no queries", "no keys"):
        pytest.skip("queries and keys are the same tokens")
    (q, k, v, grad), *segments = inputs(form, counts, k_counts, 16, torch.float32, device)
    f = FORMS[form]
    for x in differentiated(f.packed, f.leaves(q, k, v), grad, *segments, backend=backend):
        assert (x == 0).all()


@on_cpu
@each_form
def test_other_strides(backend: str, form: str) -> None:
    """Of the projection, as of views into a larger one; and of the gradient that comes in."""
    f = FORMS[form]
    (q, k, v, grad), *segments = inputs(form, COUNTS, KEY_COUNTS, 16, torch.float32)
    leaves = f.leaves(q, k, v)
    expected = differentiated(f.packed, leaves, grad, *segments, backend=backend)
    strided = [
        torch.cat((x, x), -2)[..., : x.shape[-2], :] if i else torch.stack((x, x), -1)[..., 0]
        for i, x in enumerate(leaves)
    ]
    spread = torch.cat((grad, grad), -1)[..., : grad.shape[-1]]
    assert not any(x.is_contiguous() for x in (*strided, spread))
    for a, b in zip(differentiated(f.packed, strided, spread, *segments, backend=backend), expected, strict=True):
        if backend == "cpp":
            assert torch.equal(a, b)
        else:  # PyTorch's products add up in an order that depends on steps
            torch.testing.assert_close(a, b)


@each_target
@each_form
@pytest.mark.parametrize("allow", ["full", "within"])
def test_opcheck(target: tuple[str, str], form: str, allow: str) -> None:
    backend, device = target
    f = FORMS[form]
    (q, k, v, grad), q_seg, k_seg = inputs(form, COUNTS, KEY_COUNTS, 8, torch.float32, device)
    leaves = f.leaves(q, k, v)
    segments = [q_seg] if form == "self" else [q_seg, k_seg]
    parts = [part for s in segments for part in (s.cu_seqlens, s.counts, s.max_seqlen)]
    mask = None if ALLOW[allow] is None else ALLOW[allow].to(device)
    rest = (*parts, mask, None, backend)
    torch.library.opcheck(f.op, (*(x.detach().requires_grad_() for x in leaves), *rest))
    out, lse = f.op(*leaves, *rest)
    torch.library.opcheck(f.backward, (grad, out, lse, *leaves, *rest))


@each_form
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_graph_break(form: str, dynamic: bool | None) -> None:
    f = FORMS[form]

    def loss(leaves: list[Tensor], q_seg: Segments, k_seg: Segments, allow: Tensor) -> Tensor:
        return f.packed(*leaves, q_seg, k_seg, allow=allow).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seed in (0, 1):
        g = torch.Generator().manual_seed(seed)
        counts, k_counts = random_counts(3, (9, 3, 9, 3), g), random_counts(3, (9, 3, 9, 3), g)
        (q, k, v, _), *segments = inputs(form, counts, k_counts, 8, torch.float32, seed=seed)
        leaves = [x.requires_grad_() for x in f.leaves(q, k, v)]
        expected = torch.autograd.grad(loss(leaves, *segments, EYE), leaves)
        for a, b in zip(torch.autograd.grad(compiled(leaves, *segments, EYE), leaves), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 16])
def test_the_compiled_backward_writes_in_place(dtype: torch.dtype, dim: int) -> None:
    """Into the views it is given and nowhere else; it makes a workspace and no tensor besides."""
    (q, k, v, grad), q_seg, k_seg = inputs("cross", COUNTS, KEY_COUNTS, dim, dtype)
    call = AttentionArguments(q, k, v, q_seg, k_seg, EYE, 0.5)
    backend = dispatcher.module("cpp")
    out, lse = backend.cross_modal_attention(call)
    whole = [torch.full((len(x), 4, x.shape[1], dim), 7.0, dtype=dtype) for x in (q, k)]
    written = (whole[0][:, 1], whole[1][:, 0], whole[1][:, 2])
    with Made() as made:
        backend.cross_modal_attention_backward(call, grad, out, lse, written)
    assert {name for name, _ in made.sizes} == {"aten::empty"}
    grads = [torch.empty(x.shape, dtype=dtype) for x in (q, k, v)]
    backend.cross_modal_attention_backward(call, grad, out, lse, (grads[0], grads[1], grads[2]))
    assert all(torch.equal(a, b) for a, b in zip(written, grads, strict=True))
    assert (whole[0][:, [0, 2, 3]] == 7).all()
    assert (whole[1][:, [1, 3]] == 7).all()


QKV, SEGMENTS = torch.zeros(10, 3, 4, 8), Segments.from_counts(torch.tensor([[3, 2], [0, 0], [1, 4]]))
Q, KV = torch.zeros(10, 4, 8), torch.zeros(10, 2, 4, 8)
TWO = Segments.from_counts(torch.tensor([[3, 2], [1, 4]]))
BAD_QKV = [
    ({"qkv": QKV[:, :2]}, r"qkvpacked: qkv must have shape \(tokens, 3, heads, head_dim\), got \(10, 2, 4, 8\)"),
    ({"qkv": QKV.flatten(1)}, r"qkv must have shape \(tokens, 3, heads, head_dim\), got \(10, 96\)"),
    ({"qkv": QKV[..., :0]}, r"qkv must have shape \(tokens, 3, heads, head_dim\), got \(10, 3, 4, 0\)"),
    ({"qkv": QKV.int()}, "qkv must be float32, .*, got torch.int32"),
    ({"qkv": QKV.numpy()}, "qkvpacked: qkv must be a torch.Tensor, got ndarray"),
    ({"segments": SEGMENTS.counts}, "qkvpacked: segments must be Segments, got Tensor: use Segments.from_counts"),
    ({"segments": SEGMENTS.to("meta")}, "segments must be on the device of qkv, cpu, got meta"),
    ({"segments": Segments.from_counts(torch.tensor([[11, 0]]))}, "segments.cu_seqlens ends at 11, .* only 10 tokens"),
    ({"allow": torch.ones(3, 3, dtype=torch.bool)}, r"qkvpacked: allow must be bool \(2, 2\), got torch.bool"),
    ({"scale": float("inf")}, "qkvpacked: scale must be finite"),
    ({"qkv": QKV.double(), "backend": "cpp"}, "'cpp' cannot run: it computes in float32, got torch.float64"),
]
BAD_KV = [
    ({"kv": QKV}, r"kvpacked: kv must have shape \(tokens, 2, heads, head_dim\), got \(10, 3, 4, 8\)"),
    ({"q": Q[0]}, r"kvpacked: q must have shape \(tokens, heads, head_dim\), got \(4, 8\)"),
    ({"kv": KV.double()}, "kv must have the dtype of q, torch.float32, got torch.float64"),
    ({"kv": KV[..., :4]}, "kv must have the head_dim of q, 8, got 4"),
    ({"kv": KV[:, :, :3]}, "the heads of q must be a multiple of those of kv, 3, got 4"),
    ({"k_segments": TWO}, r"k_segments.counts must have the shape \(B, M\) of q_segments.counts, \(3, 2\), got \(2, 2"),
    ({"q_segments": 3}, "kvpacked: q_segments must be Segments, got int"),
]


@pytest.mark.parametrize(("change", "message"), BAD_QKV)
def test_bad_input_of_qkvpacked(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_modal_attention_qkvpacked(**{"qkv": QKV, "segments": SEGMENTS} | change)


@pytest.mark.parametrize(("change", "message"), BAD_KV)
def test_bad_input_of_kvpacked(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_modal_attention_kvpacked(**{"q": Q, "kv": KV, "q_segments": SEGMENTS, "k_segments": SEGMENTS} | change)


@each_form
def test_second_derivative_is_refused(form: str) -> None:
    f = FORMS[form]
    (q, k, v, _), *segments = inputs(form, COUNTS, KEY_COUNTS, 8, torch.float32)
    leaves = [x.requires_grad_() for x in f.leaves(q, k, v)]
    (grad,) = torch.autograd.grad(f.packed(*leaves, *segments).sum(), leaves[-1], create_graph=True)
    with pytest.raises(NotImplementedError, match="packed: the second derivative is not implemented"):
        grad.sum().backward()
