"""embedding against PyTorch's: the same bits, whatever the threads; layouts, derivatives, tracing, errors."""

import pytest
import torch
import torch.nn.functional as F

from m4kernels import embedding
from tests.ops.targets import targets

Target = tuple[str, str]
BACKENDS = targets("cpp", "reference")


def inputs(tokens: int, rows: int, dim: int, target: Target, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(tokens)
    weight = torch.randn(rows, dim, generator=g, dtype=dtype).to(target[1]).requires_grad_()
    ids = torch.randint(0, max(1, rows // 2), (tokens,), generator=g).to(target[1])  # rows without, and with several
    grad = torch.randn(tokens, dim, generator=g, dtype=dtype).to(target[1])
    return weight, ids, grad


@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "rows", "dim"), [(0, 3, 4), (1, 1, 1), (40, 7, 5), (100, 301, 33), (9, 50, 1)])
def test_result_and_gradient_are_pytorchs(
    tokens: int, rows: int, dim: int, target: Target, dtype: torch.dtype, simd_level: str
) -> None:
    weight, ids, grad = inputs(tokens, rows, dim, target, dtype)
    out = embedding(weight, ids, backend=target[0])
    out.backward(grad)
    expected = F.embedding(ids, weight)
    assert torch.equal(out, expected)
    truth = torch.zeros(rows, dim, dtype=torch.float64, device=target[1])
    truth.index_put_((ids,), grad.double(), accumulate=True)
    largest = grad.abs().max().item() * tokens if tokens else 0.0
    torch.testing.assert_close(weight.grad.double(), truth, rtol=0, atol=largest * torch.finfo(dtype).eps)
    if target[1] == "cpu":  # on a GPU PyTorch's own order is not fixed
        assert torch.equal(weight.grad, torch.autograd.grad(expected, weight, grad)[0])


def test_the_same_bits_for_every_number_of_threads() -> None:
    weight, ids, grad = inputs(500, 3000, 100, ("cpp", "cpu"))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            found.append(torch.autograd.grad(embedding(weight, ids, backend="cpp"), weight, grad)[0])
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("target", BACKENDS)
def test_layouts_and_kinds_of_ids(target: Target) -> None:
    weight, ids, grad = inputs(20, 9, 6, target)
    (expected,) = torch.autograd.grad(embedding(weight, ids, backend=target[0]), weight, grad)
    turned = grad.T.contiguous().T
    spread = torch.stack([ids, ids], 1)[:, 0]
    for other in (ids.int(), spread):
        out = embedding(weight.T.contiguous().T, other, backend=target[0])
        assert torch.equal(out, weight[ids])
        (got,) = torch.autograd.grad(out, weight, turned)
        assert torch.equal(got, expected)


def test_dtypes_that_the_kernel_does_not_add() -> None:
    weight, ids, grad = inputs(20, 9, 6, ("reference", "cpu"))
    half = weight.detach().bfloat16().requires_grad_()
    embedding(half, ids, backend="auto").backward(grad.bfloat16())
    torch.testing.assert_close(
        half.grad.float(), torch.zeros(9, 6).index_put_((ids,), grad, accumulate=True), rtol=0.05, atol=0.1
    )
    out = embedding(half, ids, backend="cpp")
    with pytest.raises(ValueError, match=r"it adds float32 and float64 gradients, got torch\.bfloat16"):
        out.sum().backward()


@pytest.mark.parametrize("target", BACKENDS)
def test_derivatives(target: Target) -> None:
    weight, ids, _ = inputs(5, 4, 3, target, torch.float64)
    assert torch.autograd.gradcheck(lambda w: embedding(w, ids, backend=target[0]), weight)
    assert torch.autograd.gradgradcheck(lambda w: embedding(w, ids, backend=target[0]), weight)


@pytest.mark.parametrize("target", BACKENDS)
def test_opcheck(target: Target) -> None:
    weight, ids, grad = inputs(5, 4, 3, target)
    torch.library.opcheck(torch.ops.m4kernels.embedding.default, (weight, ids, target[0]))
    grad.requires_grad_()
    torch.library.opcheck(torch.ops.m4kernels.embedding_backward.default, (grad, ids, 4, target[0]))


def test_compiles() -> None:
    weight, ids, grad = inputs(5, 4, 3, ("cpp", "cpu"))
    compiled = torch.compile(lambda w: embedding(w, ids), fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(embedding(weight, ids), weight, grad)
    assert torch.equal(torch.autograd.grad(compiled(weight), weight, grad)[0], expected)


def test_bad_arguments() -> None:
    weight, ids, grad = inputs(5, 4, 3, ("cpp", "cpu"))
    for arguments, message in (
        ((weight[0], ids), r"weight must be floating \(V, D\), got torch.float32 \(3,\)"),
        ((weight.long(), ids), "weight must be floating"),
        ((weight, ids.float()), r"ids must be int64 or int32 \(T,\), got torch.float32"),
        ((weight, ids.view(1, 5)), r"ids must be int64 or int32 \(T,\), got torch.int64 \(1, 5\)"),
        ((weight, [0, 1]), "ids must be a torch.Tensor, got list"),
    ):
        with pytest.raises(ValueError, match=f"embedding: {message}"):
            embedding(*arguments)
    with pytest.raises(IndexError):
        embedding(weight, ids + 4)
    backward = torch.ops.m4kernels.embedding_backward
    with pytest.raises(ValueError, match="ids must be at least 0 and below 4, got 0 to 9"):
        backward(grad, torch.tensor([0, 1, 9, 0, 0]), 4, "cpp")
    with pytest.raises(ValueError, match=r"the gradient must be of 5 tokens, got \(4, 3\)"):
        backward(grad[:4], ids, 4, "cpp")
