"""Small losses through PyTorch's own operators: when they are chosen, and that nothing else shows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from m4kernels import linear_cross_entropy
from m4kernels.ops.linear_cross_entropy import small
from tests.ops.linear_cross_entropy_cases import assert_close_to_whole_logits, case, gradients
from tests.ops.test_library import Seen

AUTO = ("auto", "cpu")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every call that was free to choose, whether PyTorch's operators served it."""
    calls: list[bool] = []
    run = small.linear_cross_entropy

    def watched(*args):
        found = run(*args)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(small, "linear_cross_entropy", watched)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 16, 10), (32, 16, 100), (7, 3, 1), (8, 64, 1000), (257, 5, 31)])
def test_against_whole_logits(
    shape: tuple[int, int, int], weighted: bool, dtype: torch.dtype, served: list[bool]
) -> None:
    arguments = case(*shape, ignored=0.0, weighted=weighted, dtype=dtype)
    if weighted:
        arguments = arguments._replace(token_weight=arguments.token_weight.to(dtype))
    assert_close_to_whole_logits(arguments, AUTO)
    assert served == [True]


def test_the_rule_of_sizes(served: list[bool]) -> None:
    """As benchmarks/NOTES.md has it: up to 2^15 logits."""
    for tokens, classes, expected in ((32, 1024, True), (33, 1024, False), (2**15, 1, True), (1, 2**15 + 1, False)):
        out = linear_cross_entropy(torch.randn(tokens, 2), torch.randn(classes, 2), torch.zeros(tokens).long())
        assert out.loss.isfinite()
        assert served.pop() is expected


def _ignored(arguments: dict) -> None:
    arguments["targets"][1] = -100


def _limited(arguments: dict) -> None:
    arguments["vocab_limit"] = torch.full((4,), 6)


def _with(**changes) -> Callable[[dict], None]:
    return lambda arguments: arguments.update(changes)


@pytest.mark.parametrize(
    "change",
    [
        _ignored,
        _limited,
        _with(ignore_index=0),
        _with(x=torch.randn(4, 3).bfloat16(), weight=torch.randn(6, 3).bfloat16()),
        _with(token_weight=torch.ones(4, dtype=torch.float64)),
        _with(targets=torch.zeros(8, dtype=torch.int64)[::2]),
    ],
)
def test_what_is_not_plain_goes_to_the_op(change: Callable[[dict], None], served: list[bool]) -> None:
    arguments = {"x": torch.randn(4, 3), "weight": torch.randn(6, 3), "targets": torch.tensor([0, 1, 2, 5])}
    change(arguments)
    found = linear_cross_entropy(**arguments)
    expected = linear_cross_entropy(**arguments, backend="reference")
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-3, atol=1e-5)
    assert served == [False]


def test_two_logits_a_class_and_token_need_workspace(served: list[bool]) -> None:
    x, weight, targets = torch.randn(100, 3), torch.randn(50, 3), torch.zeros(100).long()
    for room, expected in ((2 * 4 * 100 * 50, True), (2 * 4 * 100 * 50 - 1, False)):
        linear_cross_entropy(x, weight, targets, max_workspace_bytes=room)
        assert served.pop() is expected


def test_a_backend_that_is_named_is_the_one(served: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = torch.randn(4, 3), torch.randn(6, 3), torch.tensor([0, 1, 2, 5])
    for backend in ("cpp", "reference"):
        linear_cross_entropy(x, weight, targets, backend=backend)
        monkeypatch.setenv("M4KERNELS_BACKEND", backend)
        linear_cross_entropy(x, weight, targets)
        assert served == []
    linear_cross_entropy(x, weight, targets, backend="auto")
    monkeypatch.setenv("M4KERNELS_BACKEND", "auto")
    linear_cross_entropy(x, weight, targets)
    assert served == [True, True]


def test_whatever_watches_sees_the_op(served: list[bool]) -> None:
    x, weight, targets = torch.randn(4, 3), torch.randn(6, 3), torch.tensor([0, 1, 2, 5])
    with Seen() as seen:
        linear_cross_entropy(x, weight, targets)
    assert "m4kernels.linear_cross_entropy.default" in seen.ops
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(x, weight, targets)
    torch.func.grad(lambda w: linear_cross_entropy(x, w, targets).loss)(weight)
    compiled = torch.compile(lambda w: linear_cross_entropy(x, w, targets).loss, fullgraph=True, backend="aot_eager")
    compiled(weight)
    assert not any(served)


def test_errors_are_those_of_the_op() -> None:
    x, weight = torch.randn(4, 3), torch.randn(6, 3)
    for arguments, message in (
        ((x, weight, torch.tensor([0, 1, 6, 0])), r"targets\[2\] is 6; expected 0 <= target < 6"),
        ((x, weight, torch.tensor([0, 1])), r"targets must have shape \(4,\)"),
        ((x, weight.double(), torch.zeros(4).long()), "expected the same dtype"),
        ((x, weight[:, :2], torch.zeros(4).long()), "x has D = 3, weight has D = 2"),
        ((x.numpy(), weight, torch.zeros(4).long()), "x must be a torch.Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments)


def test_outputs_are_detached_and_follow_the_gradients_that_are_wanted() -> None:
    x, weight = torch.randn(4, 3), torch.randn(6, 3, requires_grad=True)
    out = linear_cross_entropy(x, weight, torch.tensor([0, 1, 2, 5]))
    assert (out.loss.requires_grad, out.nll.requires_grad, out.correct.requires_grad) == (True, False, False)
    out.loss.backward()
    assert x.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, torch.tensor([0, 1, 2, 5])).loss.requires_grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_and_equal_classes(value: float, served: list[bool]) -> None:
    """As the op has them: its token is not correct; the first of equal classes is."""
    x, weight = torch.eye(3), torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 3.0], [0.0, 2.0, 3.0], [0.5, 0.5, 3.0]])
    for target in range(4):
        targets = torch.full((3,), target)
        plain, op = (linear_cross_entropy(x, weight, targets, backend=name) for name in ("auto", "cpp"))
        assert torch.equal(plain.correct, op.correct)
        spoilt = x.clone()
        spoilt[1, 1] = value
        plain, op = (linear_cross_entropy(spoilt, weight, targets, backend=name) for name in ("auto", "cpp"))
        assert torch.equal(plain.correct, op.correct)
        torch.testing.assert_close(plain.nll, op.nll, equal_nan=True)
    assert all(served)


def test_the_same_bits_on_every_run() -> None:
    arguments = case(40, 9, 30, ignored=0.0)
    first = gradients(linear_cross_entropy, arguments, AUTO)
    for _ in range(5):
        again: tuple[Tensor, ...] = gradients(linear_cross_entropy, arguments, AUTO)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
