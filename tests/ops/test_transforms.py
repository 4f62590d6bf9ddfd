"""Transforms of torch.func, batched and forward-mode derivatives, tensors without memory, subclasses, checkpoints: the
right values, or one line that names the remedy."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from m4kernels import (
    MaskingSpec,
    Segments,
    cross_modal_attention,
    cross_modal_attention_kvpacked,
    cross_modal_attention_qkvpacked,
    dequantize_coords,
    linear_cross_entropy,
    mask_tokens,
    quantize_coords,
)
from m4kernels.testing import assert_within_error_budget
from tests.ops.attention_cases import dense
from tests.ops.linear_cross_entropy_cases import Case, whole_logits

backends = pytest.mark.parametrize("backend", ["cpp", "reference"])
SEGMENTS = Segments.from_counts(torch.tensor([[3, 0], [1, 2]]))
SPEC = MaskingSpec((5, 9), (1.0, 2.0), (1.0, 0.5), (2, 7), (1, 7))
TARGETS = torch.tensor([0, 3, -100, 5, 2, 6])


def attention_of(q: Tensor, backend: str) -> Tensor:
    """() of q (6, 2, 8)."""
    out = cross_modal_attention(q, q * 0.5, q + 1, SEGMENTS, SEGMENTS, backend=backend)
    return (out * torch.linspace(-1, 1, 96).view(6, 2, 8)).sum()


def plain_attention(q: Tensor) -> Tensor:
    out = dense(q, q * 0.5, q + 1, SEGMENTS, SEGMENTS, None, None)
    return (out * torch.linspace(-1, 1, 96, dtype=q.dtype).view(6, 2, 8)).sum()


def packed_attention_of(qkv: Tensor, backend: str) -> Tensor:
    """() of qkv (6, 3, 2, 8), by both forms for fused projections."""
    out = cross_modal_attention_qkvpacked(qkv, SEGMENTS, backend=backend)
    out = cross_modal_attention_kvpacked(out, qkv[:, 1:], SEGMENTS, SEGMENTS, backend=backend)
    return (out * torch.linspace(-1, 1, 96).view(6, 2, 8)).sum()


def plain_packed_attention(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unbind(1)
    out = dense(dense(q, k, v, SEGMENTS, SEGMENTS, None, None), k, v, SEGMENTS, SEGMENTS, None, None)
    return (out * torch.linspace(-1, 1, 96, dtype=qkv.dtype).view(6, 2, 8)).sum()


def weight_of(x: Tensor) -> Tensor:
    return torch.linspace(-2, 2, 7 * 16, dtype=x.dtype).view(7, 16).sin()


def loss_of(x: Tensor, backend: str) -> Tensor:
    """() of x (6, 16)."""
    return linear_cross_entropy(x, weight_of(x), TARGETS, backend=backend).loss * 0.7


def plain_loss(x: Tensor) -> Tensor:
    return whole_logits(Case(x, weight_of(x), TARGETS, None, None)).loss * 0.7


OPS = {
    "attention": (attention_of, plain_attention, (6, 2, 8)),
    "packed attention": (packed_attention_of, plain_packed_attention, (6, 3, 2, 8)),
    "loss": (loss_of, plain_loss, (6, 16)),
}


@pytest.fixture(params=OPS)
def forms(request: pytest.FixtureRequest) -> tuple[Callable[[Tensor, str], Tensor], Callable[[Tensor], Tensor], Tensor]:
    """(the op, the same in plain PyTorch, three inputs)."""
    ours, plain, shape = OPS[request.param]
    return ours, plain, torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))


REVERSE: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "grad": lambda f: lambda xs: torch.func.grad(f)(xs[0]),
    "jacrev": lambda f: lambda xs: torch.func.jacrev(f)(xs[0]),
    "vjp": lambda f: lambda xs: torch.func.vjp(f, xs[0])[1](torch.tensor(-1.5, dtype=xs.dtype))[0],
    "vmap": torch.vmap,
    "vmap over grad": lambda f: torch.vmap(torch.func.grad(f)),
    "grad over vmap": lambda f: torch.func.grad(lambda xs: torch.vmap(f)(xs).square().sum()),
    "vmap over vmap": lambda f: lambda xs: torch.vmap(torch.vmap(f))(torch.stack([xs, 2 * xs])),
    "jacobian": lambda f: lambda xs: torch.autograd.functional.jacobian(f, xs[0], vectorize=True),
    "per-sample gradients of the sum": lambda f: lambda xs: torch.func.jacrev(lambda y: torch.vmap(f)(y))(xs),
}


@backends
@pytest.mark.parametrize("transform", REVERSE)
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_reverse_mode_transforms(forms: tuple, transform: str, backend: str) -> None:
    ours, plain, xs = forms
    actual = REVERSE[transform](lambda x: ours(x, backend))(xs)
    truth = REVERSE[transform](plain)(xs.double())
    assert_within_error_budget(actual, REVERSE[transform](plain)(xs), truth, what=transform)


@backends
def test_batched_gradients(forms: tuple, backend: str) -> None:
    ours, plain, xs = forms
    factors = torch.tensor([1.0, -2.0, 0.0, 0.5])
    results = []
    for function, x in ((lambda x: ours(x, backend), xs[0]), (plain, xs[0]), (plain, xs[0].double())):
        leaf = x.detach().requires_grad_()
        out = function(leaf)
        for _ in range(2):  # the saved gradients are still whole
            (grads,) = torch.autograd.grad(out, leaf, factors.to(out.dtype), is_grads_batched=True, retain_graph=True)
        results.append(grads)
    assert_within_error_budget(*results, what="batched gradients")


FORWARD: dict[str, Callable[[Any, Tensor], Any]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x),
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "dual": lambda f, x: f(forward_ad.make_dual(x, torch.ones_like(x))),
    "dual that requires grad": lambda f, x: f(forward_ad.make_dual(x.requires_grad_(), torch.ones_like(x))),
    "dual without grad": lambda f, x: torch.no_grad()(f)(forward_ad.make_dual(x, torch.ones_like(x))),
}


@backends
@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_is_refused(forms: tuple, transform: str, backend: str) -> None:
    ours, _, xs = forms
    x = xs[0].clone()
    duals = forward_ad.dual_level() if "dual" in transform else nullcontext()
    with duals, pytest.raises(NotImplementedError, match=r"forward-mode .* are not implemented; use reverse mode"):
        FORWARD[transform](lambda x: ours(x, backend), x)


def registered(x: Tensor) -> Tensor:
    """The op as it is called through torch.ops; () of x (6, 2, 8)."""
    parts = (SEGMENTS.cu_seqlens, SEGMENTS.counts, 3)
    return torch.ops.m4kernels.cross_modal_attention(x, x, x, *parts, *parts, None, None, "cpp")[0].sum()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_forward_mode_is_refused_through_the_dispatcher(compiled: bool) -> None:
    q = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(0))

    def derivative(q: Tensor) -> Tensor:
        return torch.func.jvp(registered, (q,), (q,))[1]

    if compiled:
        torch._dynamo.reset()
        derivative = torch.compile(derivative, fullgraph=True, backend="aot_eager")
    with pytest.raises((NotImplementedError, RuntimeError), match="forward-mode"):
        derivative(q)
    assert registered(q).isfinite()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_torch_func_is_refused_through_the_dispatcher(compiled: bool) -> None:
    derivative = torch.func.grad(registered)
    if compiled:
        torch._dynamo.reset()
        derivative = torch.compile(derivative, fullgraph=True, backend="aot_eager")
    with pytest.raises((NotImplementedError, RuntimeError), match=r"call m4kernels\.cross_modal_attention eagerly"):
        derivative(torch.zeros(6, 2, 8))


@backends
def test_forward_mode_elsewhere_does_no_harm(forms: tuple, backend: str) -> None:
    ours, _, xs = forms
    with forward_ad.dual_level():
        forward_ad.make_dual(xs[1], xs[2])
        assert torch.equal(ours(xs[0], backend), ours(xs[0].clone(), backend))


@backends
def test_second_derivatives_are_refused(forms: tuple, backend: str) -> None:
    ours, _, xs = forms
    gradient = torch.func.grad(lambda x: ours(x, backend))
    with pytest.raises(NotImplementedError, match=r"second derivatives? .*not implemented; .*torch\.nn\.functional"):
        torch.func.grad(lambda x: gradient(x).sum())(xs[0])
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.func.jacrev(torch.func.jacrev(lambda x: ours(x, backend)))(xs[0])


@backends
def test_the_gradient_of_the_loss_is_linear_in_its_factor(backend: str) -> None:
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    _, pull = torch.func.vjp(lambda x: loss_of(x, backend), x)
    torch.testing.assert_close(
        torch.func.grad(lambda g: pull(g)[0].sum())(torch.tensor(2.0)), pull(torch.tensor(1.0))[0].sum()
    )


def test_vmap_of_ops_on_integers() -> None:
    g = torch.Generator().manual_seed(1)
    xy, visible = torch.rand(4, 3, 13, 2, generator=g) * 300, torch.rand(4, 3, 13, generator=g) < 0.5
    scale = torch.rand(4, 2, generator=g) + 0.5
    expected = torch.stack([quantize_coords(a, v, s) for a, v, s in zip(xy, visible, scale, strict=True)])
    assert torch.equal(torch.vmap(quantize_coords)(xy, visible, scale), expected)
    assert torch.equal(
        torch.vmap(quantize_coords, in_dims=(1, 1))(xy, visible)[0], quantize_coords(xy[:, 0], visible[:, 0])
    )
    for actual, want in zip(torch.vmap(dequantize_coords)(expected), dequantize_coords(expected), strict=True):
        assert torch.equal(actual, want)
    tokens, ids = torch.arange(4 * 14).view(4, 1, 14), torch.arange(4).view(4, 1)

    def mask(tokens: Tensor, ids: Tensor, capacity: tuple[int, int] | None = (9, 9)) -> Tensor:
        return mask_tokens(tokens, SPEC, seed=3, sample_ids=ids, capacity=capacity).encoder.ids

    want = torch.stack([mask(t, i) for t, i in zip(tokens, ids, strict=True)])
    assert torch.equal(torch.vmap(mask)(tokens, ids), want)
    with pytest.raises(ValueError, match=r"under vmap every call must give results of one shape, .*capacity"):
        torch.vmap(lambda t, i: mask(t, i, None))(tokens, ids)


def test_meta_tensors_forward_and_backward() -> None:
    x, weight = (torch.zeros(n, 6, device="meta", requires_grad=True) for n in (4, 8))
    targets = torch.zeros(4, dtype=torch.int64, device="meta")
    out = linear_cross_entropy(x, weight, targets, vocab_limit=targets, token_weight=torch.zeros(4, device="meta"))
    out.loss.backward()
    assert (out.loss.device.type, out.nll.shape, out.correct.dtype) == ("meta", (4,), torch.bool)
    assert (x.grad.shape, weight.grad.shape) == ((4, 6), (8, 6))
    q = torch.zeros(6, 2, 8, device="meta", requires_grad=True)
    segments = Segments.from_counts(torch.zeros(2, 2, dtype=torch.int64, device="meta"), max_seqlen=5)
    cross_modal_attention(q, q, q, segments, segments).sum().backward()
    assert q.grad.shape == q.shape
    tokens, ids = torch.zeros(3, 14, dtype=torch.int64, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    batch = mask_tokens(tokens, SPEC, seed=0, sample_ids=ids, capacity=(20, 21))
    assert (batch.encoder.ids.shape, batch.decoder.segments.counts.shape) == ((20,), (3, 2))
    with pytest.raises(ValueError, match="capacity is needed for meta tensors"):
        mask_tokens(tokens, SPEC, seed=0, sample_ids=ids)
    with pytest.raises(ValueError, match="max_seqlen is needed for counts on the meta device"):
        Segments.from_counts(torch.zeros(2, 2, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_fake_tensors(device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weight = (torch.zeros(n, 6, device=device, requires_grad=True) for n in (4, 8))
        linear_cross_entropy(x, weight, torch.zeros(4, dtype=torch.int64, device=device)).loss.backward()
        q = torch.zeros(6, 2, 8, device=device, requires_grad=True)
        segments = Segments.from_counts(torch.zeros(2, 2, dtype=torch.int64, device=device), max_seqlen=5)
        cross_modal_attention(q, q, q, segments, segments).sum().backward()
    assert (x.grad.shape, weight.grad.shape, q.grad.shape) == ((4, 6), (8, 6), (6, 2, 8))


@backends
def test_a_subclass_gives_the_same_values(backend: str) -> None:
    class Sub(Tensor):
        pass

    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loss_of(x.as_subclass(Sub), backend).as_subclass(Tensor), loss_of(x, backend))
    q = x.repeat(1, 1).view(6, 2, 8)
    assert torch.equal(attention_of(q.as_subclass(Sub), backend).as_subclass(Tensor), attention_of(q, backend))


@backends
def test_activation_checkpointing(forms: tuple, backend: str) -> None:
    ours, _, xs = forms
    grads = []
    for wrapped in (False, True):
        x = xs[0].clone().requires_grad_()
        out = torch.utils.checkpoint.checkpoint(ours, x, backend, use_reentrant=False) if wrapped else ours(x, backend)
        out.backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
