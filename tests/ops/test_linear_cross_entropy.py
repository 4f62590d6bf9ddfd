"""linear_cross_entropy against an independent float64 formulation that holds whole logits."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from m4kernels import LinearCrossEntropyOutput, linear_cross_entropy
from m4kernels.cases import non_contiguous
from m4kernels.testing import assert_within_error_budget, peak_extra_memory

BACKENDS = ["cpp", "reference"]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    targets: Tensor
    token_weight: Tensor | None
    vocab_limit: Tensor | None

    def to(self, dtype: torch.dtype) -> "Case":
        return self._replace(x=self.x.to(dtype), weight=self.weight.to(dtype))


def case(
    tokens: int,
    dim: int,
    classes: int,
    *,
    ignored: float = 0.2,
    weighted: bool = False,
    limits: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random arguments; `limits` are the vocabulary limits to choose from."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, dim, generator=g, dtype=torch.float64)
    weight = torch.randn(classes, dim, generator=g, dtype=torch.float64) * 3 / max(dim, 1) ** 0.5
    limit = torch.full((tokens,), classes)
    if limits:
        limit = torch.tensor(limits)[torch.randint(0, len(limits), (tokens,), generator=g)]
    targets = (torch.rand(tokens, generator=g, dtype=torch.float64) * limit).long()
    targets[torch.rand(tokens, generator=g) < ignored] = -100
    token_weight = torch.rand(tokens, generator=g) * 2 - 0.5 if weighted else None
    return Case(x.to(dtype), weight.to(dtype), targets, token_weight, limit if limits else None)


def whole_logits(arguments: Case, ignore_index: int = -100) -> LinearCrossEntropyOutput:
    """The definition, written with whole logits, one-hot targets and a class mask; in the dtype of x."""
    x, weight, targets, token_weight, vocab_limit = arguments
    valid = targets != ignore_index
    logits = x @ weight.T
    classes = torch.arange(weight.shape[0])
    if vocab_limit is not None:
        logits = logits.masked_fill((classes >= vocab_limit[:, None]) & valid[:, None], -torch.inf)
    onehot = classes == targets[:, None]
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    nll = -(log_p.masked_fill(~onehot, 0)).sum(1)
    if token_weight is None:
        token_weight = torch.full(targets.shape, 1 / max(int(valid.sum()), 1), dtype=torch.float64)
    loss = (nll * token_weight.to(nll.dtype) * valid).sum()
    return LinearCrossEntropyOutput(loss, nll.detach(), (log_p.argmax(1) == targets) & valid)


def gradients(run: object, arguments: Case, factor: float = 1.0, **options: object) -> tuple[Tensor, ...]:
    """(loss, nll, d factor·loss / d x, d factor·loss / d weight, correct)."""
    x, weight = arguments.x.detach().requires_grad_(), arguments.weight.detach().requires_grad_()
    if run is whole_logits:
        out = whole_logits(arguments._replace(x=x, weight=weight))
    else:
        out = linear_cross_entropy(x, weight, arguments.targets, **keywords(arguments), **options)
    (out.loss * factor).backward()
    return out.loss.detach(), out.nll, x.grad, weight.grad, out.correct


def keywords(arguments: Case) -> dict[str, Tensor | None]:
    return {"token_weight": arguments.token_weight, "vocab_limit": arguments.vocab_limit}


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
def test_against_whole_logits(shape: dict, dtype: torch.dtype, workspace: int, backend: str) -> None:
    rounded = case(**shape).to(dtype)
    truth = gradients(whole_logits, rounded.to(torch.float64), 0.7)
    plain = gradients(whole_logits, rounded, 0.7)
    actual = gradients(linear_cross_entropy, rounded, 0.7, max_workspace_bytes=workspace, backend=backend)
    for name, a, p, t in zip(("loss", "nll", "dx", "dweight"), actual, plain, truth, strict=False):
        if dtype == torch.float64:  # the truth is no better than this
            torch.testing.assert_close(a, t, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert_within_error_budget(a, p, t, what=name)
    # Where the two largest logits differ by more than the arithmetic's error the verdict is certain.
    logits = rounded.x.double() @ rounded.weight.double().T
    if rounded.vocab_limit is not None:
        logits.masked_fill_(torch.arange(shape["classes"]) >= rounded.vocab_limit[:, None], -torch.inf)
    best = logits.topk(min(2, shape["classes"]), dim=1).values
    certain = (best[:, 0] - best[:, -1] > 1e-4) | (shape["classes"] == 1)
    assert certain.float().mean() > 0.8
    assert torch.equal(actual[4][certain], truth[4][certain])


@pytest.mark.parametrize("limits", [(), (1, 4, 9)])
def test_gradcheck(limits: tuple[int, ...], backend: str) -> None:
    arguments = case(6, 3, 9, weighted=bool(limits), limits=limits, dtype=torch.float64)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, arguments.targets, **keywords(arguments), backend=backend).loss

    x, weight = arguments.x.requires_grad_(), arguments.weight.requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, weight))
    assert torch.autograd.gradcheck(lambda x: loss(x, weight.detach()), (x,))
    assert torch.autograd.gradcheck(lambda weight: loss(x.detach(), weight), (weight,))


def test_only_the_gradients_asked_for(backend: str) -> None:
    x, weight, targets, _, _ = case(40, 8, 60)
    full = gradients(linear_cross_entropy, Case(x, weight, targets, None, None), backend=backend)
    only_x, only_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_cross_entropy(only_x, weight, targets, backend=backend).loss.backward()
    linear_cross_entropy(x, only_weight, targets, backend=backend).loss.backward()
    assert torch.equal(only_x.grad, full[2])
    assert torch.equal(only_weight.grad, full[3])
    with torch.no_grad():
        out = linear_cross_entropy(only_x, only_weight, targets, backend=backend)
    assert not any(t.requires_grad for t in out)
    assert torch.equal(out.loss, full[0])
    # Without gradients no gradient is computed or allocated.
    weight, workspace = torch.randn(20000, 64), 2**22
    with torch.no_grad():
        peak = peak_extra_memory(
            lambda: linear_cross_entropy(
                x @ torch.ones(8, 64), weight, targets, max_workspace_bytes=workspace, backend=backend
            )
        )
    assert peak < workspace + 2**16 < weight.nbytes


def test_outputs_are_detached_and_backward_repeats(backend: str) -> None:
    x, weight, targets, _, _ = case(20, 8, 30)
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
def test_no_valid_token(tokens: int, backend: str) -> None:
    x = torch.full((tokens, 4), float("nan"), requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    for token_weight in (None, torch.full((tokens,), float("inf"))):
        for vocab_limit in (None, torch.zeros(tokens, dtype=torch.int32)):
            out = linear_cross_entropy(
                x,
                weight,
                torch.full((tokens,), -7),
                token_weight=token_weight,
                vocab_limit=vocab_limit,
                ignore_index=-7,
                backend=backend,
            )
            assert out.loss.item() == 0
            assert torch.equal(out.nll, torch.zeros(tokens))
            assert not out.correct.any()
            for gradient in torch.autograd.grad(out.loss, (x, weight)):
                assert torch.equal(gradient, torch.zeros_like(gradient))


def test_ignored_tokens_have_no_influence(backend: str) -> None:
    arguments = case(30, 8, 50, weighted=True, limits=(50, 20), ignored=0.4)
    clean = gradients(linear_cross_entropy, arguments, backend=backend)
    ignored = arguments.targets == -100
    assert 0 < ignored.sum() < 30
    poisoned = Case(*(t.clone() for t in arguments))
    poisoned.x[ignored] = float("nan")
    poisoned.token_weight[ignored] = float("inf")
    poisoned.vocab_limit[ignored] = -5
    for a, b in zip(gradients(linear_cross_entropy, poisoned, backend=backend), clean, strict=True):
        assert torch.equal(a, b)
    assert (clean[2][ignored] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_propagate(value: float, backend: str) -> None:
    x, weight, targets, _, _ = case(12, 8, 40, ignored=0)
    x[3, 2] = value
    loss, nll, dx, dweight, correct = gradients(
        linear_cross_entropy, Case(x, weight, targets, None, None), backend=backend
    )
    assert loss.isnan()
    assert torch.equal(nll.isnan(), torch.arange(12) == 3)
    assert torch.equal(dx.isnan().any(1), torch.arange(12) == 3)
    assert dweight.isnan().all()
    assert not correct[3]


def test_logits_of_minus_infinity_and_extreme_size(backend: str) -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1000.0, 0.0], [-3e4, 0.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 1.0], [-torch.inf, 0.0], [0.5, 0.0]])[:, :1] * torch.ones(1, 2)
    weight = torch.stack([torch.tensor([0.0, -1e30, 0.5]), torch.zeros(3)], dim=1)
    targets = torch.tensor([0, 2, 0, 2])
    out = linear_cross_entropy(x, weight, targets, backend=backend)
    z = x.detach().double() @ weight.double().T
    torch.testing.assert_close(
        out.nll.double(), torch.logsumexp(z, 1) - z[torch.arange(4), targets], rtol=1e-6, atol=1e-6
    )
    (dx,) = torch.autograd.grad(out.loss, x)
    assert dx.isfinite().all()


def test_correct_takes_the_lowest_of_equal_classes(backend: str) -> None:
    weight = torch.zeros(70, 4)
    weight[[5, 40, 69]] = 1
    x, targets = torch.ones(4, 4), torch.tensor([5, 40, 69, 0])
    for limit, expected in ((70, [True, False, False, False]), (5, [False, False, False, True])):
        valid = torch.where(targets < limit, targets, -100)
        limits = torch.full((4,), limit)
        out = linear_cross_entropy(x, weight, valid, vocab_limit=limits, backend=backend)
        assert out.correct.tolist() == expected


def test_non_contiguous_inputs(backend: str) -> None:
    arguments = case(33, 12, 45, weighted=True, limits=(45, 9))
    expected = gradients(linear_cross_entropy, arguments, backend=backend)
    strided = Case(*(non_contiguous(t) for t in arguments))
    transposed = arguments._replace(
        x=arguments.x.T.contiguous().T,
        weight=arguments.weight.T.contiguous().T,
        vocab_limit=arguments.vocab_limit.int(),
    )
    for other in (strided, transposed):
        for actual, want in zip(gradients(linear_cross_entropy, other, backend=backend), expected, strict=True):
            torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_limit_is_respected(dtype: torch.dtype, backend: str) -> None:
    arguments = case(300, 48, 4096, limits=(4096, 1000), weighted=True).to(dtype)
    x, weight = arguments.x.requires_grad_(), arguments.weight.requires_grad_()
    results = 4 * (x.numel() + weight.numel()) + 300 * 5
    whole = 300 * 4096 * 4
    for limit in (2**17, 2**20, whole // 2):
        peak = peak_extra_memory(
            lambda limit=limit: linear_cross_entropy(
                x, weight, arguments.targets, **keywords(arguments), max_workspace_bytes=limit, backend=backend
            )
        )
        assert peak <= limit + results
    with pytest.raises(
        ValueError, match=r"max_workspace_bytes is 1000, but 300 tokens over 4096 classes .* need at least \d+"
    ):
        linear_cross_entropy(x, weight, arguments.targets, max_workspace_bytes=1000, backend=backend)


def test_autocast(backend: str) -> None:
    x, weight, targets, _, _ = case(50, 24, 200)
    rounded = Case(x.bfloat16().double(), weight.bfloat16().double(), targets, None, None)
    truth = gradients(whole_logits, rounded)
    with torch.autocast("cpu", torch.bfloat16):
        loss, nll, dx, dweight, _ = gradients(
            linear_cross_entropy, Case(x, weight, targets, None, None), backend=backend
        )
        mixed = gradients(linear_cross_entropy, Case(x.bfloat16(), weight, targets, None, None), backend=backend)
    # Only the operands are rounded to bfloat16, so what remains is far below bfloat16's own error.
    for actual, want in zip((loss, nll, dx, dweight), truth, strict=False):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), want, rtol=1e-4, atol=1e-6)
    assert mixed[2].dtype == torch.bfloat16
    assert mixed[3].dtype == torch.float32
    torch.testing.assert_close(mixed[3].double(), truth[3], rtol=1e-4, atol=1e-6)
    double = x.double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        assert linear_cross_entropy(double, weight.double(), targets, backend=backend).loss.dtype == torch.float64


BAD_INPUT = [
    (dict(x=torch.zeros(4, 3, 2)), r"x must have shape \(T, D\), got \(4, 3, 2\)"),
    (dict(weight=torch.zeros(8)), r"weight must have shape \(V, D\), got \(8,\)"),
    (dict(weight=torch.zeros(8, 5)), "x has D = 6, weight has D = 5"),
    (dict(weight=torch.zeros(0, 6)), "at least one class"),
    (dict(weight=torch.zeros(8, 6).double()), "x is torch.float32, weight torch.float64; expected the same dtype"),
    (dict(x=torch.zeros(4, 6, dtype=torch.int64)), "x must be floating, got torch.int64"),
    (dict(targets=torch.zeros(5, dtype=torch.int64)), r"targets must have shape \(4,\), got \(5,\)"),
    (dict(targets=torch.zeros(4)), "targets must be torch.int64, got torch.float32"),
    (dict(targets=torch.tensor([0, 1, 8, 9])), r"targets\[2\] is 8; expected 0 <= target < 8 .*or -100 to ignore it"),
    (dict(targets=torch.tensor([0, -1, 0, 0])), r"targets\[1\] is -1"),
    (dict(vocab_limit=torch.tensor([8, 8, 8, 3])), r"targets\[3\] is 5; expected 0 <= target < 3"),
    (dict(vocab_limit=torch.tensor([8, 9, 8, 8])), r"vocab_limit\[1\] is 9, but weight has only 8 classes"),
    (dict(vocab_limit=torch.tensor([8, 0, 8, 8])), r"targets\[1\] is 1; expected 0 <= target < 0"),
    (dict(vocab_limit=torch.ones(4)), "vocab_limit must be torch.int32 or torch.int64"),
    (dict(vocab_limit=torch.ones(3, dtype=torch.int32)), r"vocab_limit must have shape \(4,\), got \(3,\)"),
    (dict(token_weight=torch.ones(4, 1)), r"token_weight must have shape \(4,\), got \(4, 1\)"),
    (dict(token_weight=torch.ones(4, dtype=torch.int64)), "token_weight must be floating"),
    (dict(token_weight=torch.ones(4, requires_grad=True)), "token_weight requires grad.*detach it"),
    (dict(max_workspace_bytes=-1), "max_workspace_bytes is -1, but 4 tokens"),
    (dict(weight=torch.zeros(8, 6, device="meta")), "weight is on meta, x on cpu; expected one device"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUT)
def test_bad_input(change: dict, message: str, backend: str) -> None:
    arguments = dict(x=torch.zeros(4, 6), weight=torch.zeros(8, 6), targets=torch.tensor([0, 1, 2, 5])) | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments, backend=backend)


def test_opcheck(backend: str) -> None:
    for limits in ((), (11, 4)):
        x, weight, targets, token_weight, vocab_limit = case(9, 5, 11, weighted=bool(limits), limits=limits)
        for x_grad, weight_grad in ((True, True), (True, False), (False, False)):
            arguments = (
                x.clone().requires_grad_(x_grad),
                weight.clone().requires_grad_(weight_grad),
                targets,
                token_weight,
                vocab_limit,
                -100,
                2**28,
                None,
                x_grad,
                weight_grad,
                backend,
            )
            torch.library.opcheck(torch.ops.m4kernels.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_graph_break(autocast: bool, backend: str) -> None:
    def loss(x: Tensor, arguments: Case) -> LinearCrossEntropyOutput:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return linear_cross_entropy(
                x * 2, arguments.weight, arguments.targets, **keywords(arguments), backend=backend
            )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    arguments = case(21, 6, 40, weighted=True, limits=(40, 8))
    results = []
    for run in (loss, compiled):
        x, weight = arguments.x.clone().requires_grad_(), arguments.weight.clone().requires_grad_()
        out = run(x, arguments._replace(weight=weight))
        (out.loss * 3).backward()
        results.append((*out, x.grad, weight.grad))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)
    with torch.no_grad():
        assert torch.equal(compiled(arguments.x, arguments).loss, results[0][0])
