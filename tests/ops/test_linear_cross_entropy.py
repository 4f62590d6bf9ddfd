"""linear_cross_entropy against an independent float64 formulation that holds whole logits."""

import pytest
import torch
from torch import Tensor

from m4kernels import linear_cross_entropy
from m4kernels.cases import non_contiguous
from m4kernels.testing import assert_within_error_budget, peak_extra_memory
from tests.ops.linear_cross_entropy_cases import (
    Case,
    assert_close_to_whole_logits,
    case,
    gradients,
    keywords,
    small,
    whole_logits,
)
from tests.ops.targets import targets as on

everywhere = pytest.mark.parametrize("target", on("cpp", "reference", "triton"))
in_float64 = pytest.mark.parametrize("target", on("cpp", "reference"))
not_finite = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # Triton's interpreter says so
Target = tuple[str, str]


# One token, one class; sizes that are no multiple of a vector; several chunks; limits of 1, of V and in between.
SHAPES = [
    dict(tokens=1, dim=1, classes=1, ignored=0),
    dict(tokens=1, dim=8, classes=17, ignored=0),
    dict(tokens=7, dim=5, classes=3, weighted=True),
    dict(tokens=33, dim=16, classes=1, weighted=True),
    dict(tokens=33, dim=16, classes=100),
    dict(tokens=33, dim=16, classes=100, limits=(1, 100)),
    dict(tokens=64, dim=24, classes=257, weighted=True, limits=(1, 2, 31, 64, 200, 257)),
    dict(tokens=129, dim=40, classes=1000, ignored=0.6, limits=(1000, 999, 17)),
    dict(tokens=70, dim=64, classes=5000, weighted=True),
]


@pytest.mark.parametrize("workspace", [2**28, 3 * 2**16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@in_float64
def test_against_whole_logits(shape: dict, dtype: torch.dtype, workspace: int, target: Target) -> None:
    assert_close_to_whole_logits(case(**shape).to(dtype), target, max_workspace_bytes=workspace)


@pytest.mark.parametrize("limits", [(), (1, 4, 9)])
@in_float64
def test_gradcheck(limits: tuple[int, ...], target: Target) -> None:
    backend, device = target
    arguments = case(6, 3, 9, weighted=bool(limits), limits=limits, dtype=torch.float64).on(device)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, arguments.targets, **keywords(arguments), backend=backend).loss

    x, weight = arguments.x.requires_grad_(), arguments.weight.requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, weight))
    assert torch.autograd.gradcheck(lambda x: loss(x, weight.detach()), (x,))
    assert torch.autograd.gradcheck(lambda weight: loss(x.detach(), weight), (weight,))


@everywhere
def test_only_the_gradients_asked_for(target: Target) -> None:
    backend, device = target
    arguments = case(40, 8, 60)
    full = gradients(linear_cross_entropy, arguments, target)
    x, weight, targets, _, _ = arguments.on(device)
    only_x, only_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_cross_entropy(only_x, weight, targets, backend=backend).loss.backward()
    linear_cross_entropy(x, only_weight, targets, backend=backend).loss.backward()
    assert torch.equal(only_x.grad.cpu(), full[2])
    assert torch.equal(only_weight.grad.cpu(), full[3])
    with torch.no_grad():
        out = linear_cross_entropy(only_x, only_weight, targets, backend=backend)
    assert not any(t.requires_grad for t in out)
    assert torch.equal(out.loss.cpu(), full[0])
    # Without gradients no gradient is computed or allocated.
    weight, workspace = torch.randn(20000, 64, device=device), 2**22
    x = torch.randn(8, 64, device=device)

    def evaluate() -> object:
        return linear_cross_entropy(x, weight, targets[:8], max_workspace_bytes=workspace, backend=backend)

    with torch.no_grad():
        assert peak_extra_memory(evaluate, device) < workspace + 2**16 < weight.nbytes


@everywhere
def test_outputs_are_detached_and_backward_repeats(target: Target) -> None:
    backend, device = target
    x, weight, targets, _, _ = case(20, 8, 30).on(device)
    x.requires_grad_()
    out = linear_cross_entropy(x, weight, targets, backend=backend)
    assert out.loss.requires_grad
    assert not out.nll.requires_grad
    assert not out.correct.requires_grad
    assert out.nll.dtype == torch.float32
    assert out.correct.dtype == torch.bool
    out.loss.backward(retain_graph=True)
    once = x.grad.clone()
    (3 * out.loss).backward()
    torch.testing.assert_close(x.grad, 4 * once)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(linear_cross_entropy(x, weight, targets, backend=backend).loss, x, create_graph=True)


@pytest.mark.parametrize("tokens", [0, 5])
@everywhere
def test_no_valid_token(tokens: int, target: Target) -> None:
    backend, device = target
    x = torch.full((tokens, 4), float("nan"), device=device, requires_grad=True)
    weight = torch.randn(6, 4, device=device, requires_grad=True)
    for token_weight in (None, torch.full((tokens,), float("inf"), device=device)):
        for vocab_limit in (None, torch.zeros(tokens, dtype=torch.int32, device=device)):
            out = linear_cross_entropy(
                x,
                weight,
                torch.full((tokens,), -7, device=device),
                token_weight=token_weight,
                vocab_limit=vocab_limit,
                ignore_index=-7,
                backend=backend,
            )
            assert out.loss.item() == 0
            assert torch.equal(out.nll.cpu(), torch.zeros(tokens))
            assert not out.correct.any()
            for gradient in torch.autograd.grad(out.loss, (x, weight)):
                assert torch.equal(gradient, torch.zeros_like(gradient))


@everywhere
def test_ignored_tokens_have_no_influence(target: Target) -> None:
    arguments = case(30, 8, 50, weighted=True, limits=(50, 20), ignored=0.4)
    clean = gradients(linear_cross_entropy, arguments, target)
    ignored = arguments.targets == -100
    assert 0 < ignored.sum() < 30
    poisoned = Case(*(t.clone() for t in arguments))
    poisoned.x[ignored] = float("nan")
    poisoned.token_weight[ignored] = float("inf")
    poisoned.vocab_limit[ignored] = -5
    for a, b in zip(gradients(linear_cross_entropy, poisoned, target), clean, strict=True):
        assert torch.equal(a, b)
    assert (clean[2][ignored] == 0).all()
    # Nor does a weight that is not finite reach them.
    arguments.weight[3] = float("inf")
    dx = gradients(linear_cross_entropy, arguments, target)[2]
    assert (dx[ignored] == 0).all()
    assert dx[~ignored].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@not_finite
@everywhere
def test_non_finite_values_propagate(value: float, target: Target) -> None:
    arguments = case(12, 8, 40, ignored=0)
    arguments.x[3, 2] = value
    loss, nll, dx, dweight, correct = gradients(linear_cross_entropy, arguments, target)
    assert loss.isnan()
    assert torch.equal(nll.isnan(), torch.arange(12) == 3)
    assert torch.equal(dx.isnan().any(1), torch.arange(12) == 3)
    assert dweight.isnan().all()
    assert not correct[3]


@not_finite
@everywhere
def test_logits_of_minus_infinity_and_extreme_size(target: Target) -> None:
    backend, device = target
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1000.0, 0.0], [-3e4, 0.0]])
    weight = torch.stack([torch.tensor([0.0, -1e30, 0.5]), torch.zeros(3)], dim=1)
    targets = torch.tensor([0, 2, 0, 2])
    z = x.double() @ weight.double().T
    x = x.to(device).requires_grad_()
    out = linear_cross_entropy(x, weight.to(device), targets.to(device), backend=backend)
    torch.testing.assert_close(
        out.nll.double().cpu(), torch.logsumexp(z, 1) - z[torch.arange(4), targets], rtol=1e-6, atol=1e-6
    )
    (dx,) = torch.autograd.grad(out.loss, x)
    assert dx.isfinite().all()
    # A class of logit -inf has probability 0; where all are, there is no distribution.
    weight = torch.tensor([[-torch.inf], [0.0], [1.0]], device=device)
    targets, limit = torch.tensor([1, 0], device=device), torch.tensor([3, 1], device=device)
    x = torch.ones(2, 1, device=device)
    out = linear_cross_entropy(x, weight, targets, vocab_limit=limit, backend=backend)
    assert out.nll[0].item() == pytest.approx(1.3132617, rel=1e-6)
    assert out.nll[1].isnan()
    assert out.correct.tolist() == [False, False]


@everywhere
def test_correct_takes_the_lowest_of_equal_classes(target: Target) -> None:
    backend, device = target
    weight = torch.zeros(70, 4, device=device)
    weight[[5, 40, 69]] = 1
    x, targets = torch.ones(4, 4, device=device), torch.tensor([5, 40, 69, 0], device=device)
    for limit, expected in ((70, [True, False, False, False]), (5, [False, False, False, True])):
        valid = torch.where(targets < limit, targets, -100)
        limits = torch.full((4,), limit, device=device)
        out = linear_cross_entropy(x, weight, valid, vocab_limit=limits, backend=backend)
        assert out.correct.tolist() == expected


@everywhere
def test_non_contiguous_inputs(target: Target) -> None:
    arguments = case(33, 12, 45, weighted=True, limits=(45, 9))
    expected = gradients(linear_cross_entropy, arguments, target)
    strided = Case(*(non_contiguous(t) for t in arguments))
    transposed = arguments._replace(
        x=arguments.x.T.contiguous().T,
        weight=arguments.weight.T.contiguous().T,
        vocab_limit=arguments.vocab_limit.int(),
    )
    for other in (strided, transposed):
        for actual, want in zip(gradients(linear_cross_entropy, other, target), expected, strict=True):
            torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-6)


@everywhere
def test_workspace_limit_is_respected(target: Target) -> None:
    backend, device = target
    tokens, classes = small(target, (300, 4096), (24, 1024))
    results = 4 * (tokens + classes) * 48 + tokens * 5 + 4096
    whole = tokens * classes * 4
    limits = small(target, (2**17, 2**20, whole // 2), (2**15, whole // 2))
    # Under the interpreter products of bfloat16 are not those of CUDA, so their memory says nothing.
    for dtype in small(target, (torch.float32, torch.bfloat16), (torch.float32,)):
        arguments = case(tokens, 48, classes, limits=(classes, 1000), weighted=True).to(dtype).on(device)
        x, weight = arguments.x.requires_grad_(), arguments.weight.requires_grad_()

        def run(limit: int, x: Tensor = x, weight: Tensor = weight, arguments: Case = arguments) -> object:
            options = keywords(arguments)
            return linear_cross_entropy(
                x, weight, arguments.targets, **options, max_workspace_bytes=limit, backend=backend
            )

        for limit in limits:
            assert peak_extra_memory(lambda limit=limit, run=run: run(limit), device) <= limit + results
        message = rf"max_workspace_bytes is 300, but {tokens} tokens over {classes} classes .* need at least \d+"
        with pytest.raises(ValueError, match=message):
            run(300)


@everywhere
def test_autocast(target: Target) -> None:
    backend, device = target
    x, weight, targets, _, _ = case(50, 24, 200)
    rounded = Case(x.bfloat16(), weight.bfloat16(), targets, None, None)
    truth = gradients(whole_logits, rounded.to(torch.float64))
    with torch.autocast(device, torch.bfloat16):
        full = gradients(linear_cross_entropy, Case(x, weight, targets, None, None), target)
        mixed = gradients(linear_cross_entropy, Case(x.bfloat16(), weight, targets, None, None), target)
    assert all(t.dtype == torch.float32 for t in full[:4])
    assert mixed[2].dtype == torch.bfloat16
    assert mixed[3].dtype == torch.float32
    plain = gradients(whole_logits, rounded)
    for actual in (full, mixed):
        for i, name in ((0, "loss"), (1, "nll"), (3, "dweight")):
            if backend == "triton":  # which rounds the logits too, as PyTorch does
                assert_within_error_budget(actual[i], plain[i].float(), truth[i], what=name)
            else:  # only the operands are rounded to bfloat16, so what remains is far below bfloat16's own error
                torch.testing.assert_close(actual[i].double(), truth[i], rtol=1e-4, atol=1e-6)
    assert_within_error_budget(full[2], plain[2].float(), truth[2], what="dx")
    with torch.autocast(device, torch.bfloat16):  # which leaves float64 alone
        other = None if backend == "triton" else backend
        double = x.double().to(device).requires_grad_()
        out = linear_cross_entropy(double, weight.double().to(device), targets.to(device), backend=other)
    assert out.loss.dtype == torch.float64
