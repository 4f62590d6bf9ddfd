"""What only the Triton backend of linear_cross_entropy has: two forms chosen by the workspace, float16's scaling, CUDA
graphs."""

import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from m4kernels import _triton, linear_cross_entropy
from m4kernels.ops.linear_cross_entropy.arguments import LossArguments
from m4kernels.testing import assert_within_error_budget
from tests.ops.linear_cross_entropy_cases import (
    Case,
    assert_close_to_whole_logits,
    case,
    gradients,
    keywords,
    whole_logits,
)
from tests.ops.targets import HAS_TRITON
from tests.ops.targets import targets as on

if HAS_TRITON:
    from m4kernels.ops.linear_cross_entropy import triton as backend
else:
    pytest.skip("triton is not installed", allow_module_level=True)

on_triton = pytest.mark.parametrize("target", on("triton"))
on_device = pytest.mark.parametrize("target", on("cuda"))  # what the interpreter cannot show
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WHOLE, PARTS = (20, 100), (20, 48)
Target = tuple[str, str]


def arguments_of(
    tokens: int,
    dim: int,
    classes: int,
    workspace: int = 2**28,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
) -> LossArguments:
    """A call without memory behind it."""
    x = torch.empty(tokens, dim, dtype=dtype, device="meta")
    weight = torch.empty(classes, dim, dtype=weight_dtype or dtype, device="meta")
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    return LossArguments(x, weight, targets, None, None, -100, workspace, dtype, True, True)


# Sizes that are no multiple of anything; one token; one class; a single class that fills no lane.
SHAPES = [
    dict(tokens=1, dim=1, classes=1, ignored=0),
    dict(tokens=9, dim=5, classes=3, weighted=True),
    dict(tokens=6, dim=16, classes=1, weighted=True),
    dict(tokens=24, dim=16, classes=257, weighted=True, limits=(1, 2, 31, 64, 200, 257)),
    dict(tokens=5, dim=40, classes=5000, ignored=0.3, limits=(5000, 4097, 17)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@on_triton
def test_against_whole_logits(shape: dict, dtype: torch.dtype, target: Target) -> None:
    assert_close_to_whole_logits(case(**shape).to(dtype), target)


LARGE = [
    dict(tokens=300, dim=64, classes=5000, weighted=True, limits=(5000, 4097, 17, 1)),
    dict(tokens=1030, dim=640, classes=8192, ignored=0.5),
    dict(tokens=64, dim=24, classes=65537),
    dict(tokens=3000, dim=32, classes=101, limits=(101, 33)),
]


@pytest.mark.parametrize("workspace", [2**28, 2**21])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LARGE, ids=str)
@on_device
def test_large_shapes_against_whole_logits(shape: dict, dtype: torch.dtype, workspace: int, target: Target) -> None:
    assert_close_to_whole_logits(case(**shape).to(dtype), ("triton", target[1]), max_workspace_bytes=workspace)


# (classes, workspace) of 12 tokens, and the (tokens, classes) at a time that they make.
FORMS = [(257, 2**28, (12, 257)), (200, 9000, (5, 200)), (257, 8400, (12, 64)), (257, 4550, (2, 12))]


@pytest.mark.parametrize(("classes", "workspace", "form"), FORMS)
@on_triton
def test_forms_by_workspace(classes: int, workspace: int, form: tuple[int, int], target: Target) -> None:
    arguments = case(12, 16, classes, weighted=True, limits=(1, 2, 31, 64, classes))
    assert backend.plan(arguments_of(12, 16, classes, workspace)) == form
    assert_close_to_whole_logits(arguments, target, max_workspace_bytes=workspace)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [WHOLE, (7, 100), (7, 32)], ids=str)
@on_triton
def test_blocks_smaller_than_a_row(
    form: tuple[int, int], dtype: torch.dtype, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As rows of more than 4,096 classes are run through; limits at, before and behind the edges of blocks and parts.
    monkeypatch.setattr(backend, "LAUNCHES", ((16, 1),))
    monkeypatch.setattr(backend, "plan", lambda call: backend.Plan(*form))
    limits = (1, 15, 16, 17, 32, 33, 96, 99, 100)
    assert_close_to_whole_logits(case(20, 8, 100, weighted=True, limits=limits).to(dtype), target)


@pytest.mark.parametrize("form", [(3, 70), (3, 32)], ids=str)
@on_triton
def test_correct_takes_the_lowest_of_equal_classes_in_several_blocks(
    form: tuple[int, int], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "LAUNCHES", ((16, 1),))
    monkeypatch.setattr(backend, "plan", lambda call: backend.Plan(*form))
    weight = torch.zeros(70, 4, device=target[1])
    weight[[5, 40, 69]] = 1
    x, targets = torch.ones(3, 4, device=target[1]), torch.tensor([5, 40, 69], device=target[1])
    out = linear_cross_entropy(x, weight, targets, backend="triton")
    assert out.correct.tolist() == [True, False, False]


@pytest.fixture(params=[WHOLE, PARTS], ids=str)
def either_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "plan", lambda call: backend.Plan(*request.param))


@pytest.mark.usefixtures("either_form")
@on_triton
def test_autocast_converts_the_weight_in_parts(target: Target) -> None:
    arguments = case(20, 8, 100, limits=(100, 50))
    rounded = arguments.to(torch.bfloat16)
    with torch.autocast(target[1], torch.bfloat16):
        actual = gradients(linear_cross_entropy, arguments, target)
    plain, truth = gradients(whole_logits, rounded), gradients(whole_logits, rounded.to(torch.float64))
    for name, a, p, t in zip(("loss", "nll", "dx", "dweight"), actual, plain, truth, strict=False):
        assert_within_error_budget(a, p.float(), t, what=name)


@pytest.mark.usefixtures("either_form")
@on_triton
def test_nothing_of_an_ignored_token_or_beyond_a_limit_is_read(target: Target) -> None:
    arguments = case(20, 8, 100, weighted=True, limits=(20, 40), ignored=0.4)
    clean = gradients(linear_cross_entropy, arguments, target)
    poisoned = Case(*(t.clone() for t in arguments))
    ignored = arguments.targets == -100
    poisoned.x[ignored], poisoned.token_weight[ignored], poisoned.vocab_limit[ignored] = torch.nan, torch.inf, 10**9
    poisoned.weight[40:] = torch.inf
    loss, nll, dx, dweight, correct = gradients(linear_cross_entropy, poisoned, target)
    assert torch.equal(loss, clean[0])
    assert torch.equal(nll, clean[1])
    assert torch.equal(correct, clean[4])
    assert torch.equal(dweight, clean[3])
    assert (dweight[40:] == 0).all()
    assert (dx[ignored] == 0).all()


@pytest.mark.parametrize("weight", [None, 1e-9, 1e9])
@on_triton
def test_float16_gradients_of_any_token_weight(weight: float | None, target: Target) -> None:
    # Held in float16, (softmax - onehot) · 1e-9 would vanish and · 1e9 be infinite.
    arguments = case(12, 8, 60).to(torch.float16)
    if weight is not None:
        arguments = arguments._replace(token_weight=torch.linspace(-weight, weight, 12))
    x = arguments.x.float().requires_grad_()  # so that the gradients are not rounded to float16 at the end
    with torch.autocast(target[1], torch.float16):
        actual = gradients(linear_cross_entropy, arguments._replace(x=x, weight=arguments.weight.float()), target)
    truth = gradients(whole_logits, arguments.to(torch.float64))
    for i in (2, 3):
        torch.testing.assert_close(actual[i].double(), truth[i], rtol=0, atol=4e-3 * truth[i].abs().max().item())


@on_triton
def test_backward_by_a_factor(target: Target) -> None:
    values = torch.randn(3, 5000, device=target[1])
    for factor in (1.0, -0.3, 0.0, float("nan")):
        scale = torch.tensor(factor, device=target[1])
        expected = values * scale
        actual = backend.scale_(values.clone(), scale)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert backend.scale_(values[:0], scale).shape == (0, 5000)


def test_plan_fits_the_workspace() -> None:
    pick, forms = random.Random(0), set()
    for _ in range(3000):
        tokens, dim = pick.choice([1, 2, 33, 300, 9120]), pick.choice([1, 8, 640])
        classes, dtype = pick.choice([1, 3, 17, 100, 257, 1000, 65536]), pick.choice(DTYPES)
        shape = (tokens, dim, classes)
        weight_dtype, workspace = pick.choice([dtype, torch.float32]), int(2 ** pick.uniform(10, 33))
        call = arguments_of(*shape, workspace, dtype, weight_dtype)
        try:
            plan = backend.plan(call)
        except ValueError as error:
            need = int(str(error).split()[-1])
            assert need > workspace
            assert backend.plan(arguments_of(*shape, need, dtype, weight_dtype)).columns >= 1
            continue
        assert 1 <= plan.rows <= tokens
        assert 1 <= plan.columns <= classes
        held = plan.rows * (plan.pitch + dim) * dtype.itemsize + 16 * tokens
        held += plan.columns * dim * dtype.itemsize * (weight_dtype != dtype)
        held += 16 * plan.rows * (plan.columns < classes)
        assert held <= workspace
        forms.add((plan.columns < classes, plan.rows < tokens))
    assert len(forms) == 4
    # At M4's shape: 256 MiB and 37 MB.
    assert backend.plan(arguments_of(9120, 640, 65536, 2**28, torch.bfloat16)) == (1824, 65536)
    assert backend.plan(arguments_of(9120, 640, 65536, 37_000_000, torch.bfloat16)) == (9120, 1344)


def test_what_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'triton' cannot run: it takes float32, bfloat16 and float16, got torch\.fl"):
        linear_cross_entropy(x, x, torch.tensor([0, 1]), backend="triton")
    bfloat16, float32 = (
        SimpleNamespace(device=torch.device("cuda"), operand_dtype=dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    monkeypatch.setattr(_triton, "_capability", lambda _: (7, 5))
    assert "capability 8.0 or more, this one has 7.5" in backend.can_run(bfloat16)
    assert backend.can_run(float32) is None
    monkeypatch.setattr(_triton, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    assert "need torch 2.10" in backend.can_run(bfloat16)
    assert backend.can_run(float32) is None
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert backend.can_run(bfloat16) is None


def step(arguments: Case, workspace: int) -> tuple[Tensor, ...]:
    x, weight = arguments.x.detach().requires_grad_(), arguments.weight.detach().requires_grad_()
    out = linear_cross_entropy(
        x, weight, arguments.targets, **keywords(arguments), max_workspace_bytes=workspace, backend="triton"
    )
    return (*out, *torch.autograd.grad(out.loss, (x, weight)))


BOTH_FORMS = pytest.mark.parametrize("workspace", [2**28, 2**21])
M4_LIKE = dict(tokens=1500, dim=640, classes=8192, weighted=True, limits=(8192, 4096, 2), ignored=0.3)


@BOTH_FORMS
@pytest.mark.parametrize("dtype", DTYPES)
@on_device
def test_same_bits_on_ten_runs(dtype: torch.dtype, workspace: int, target: Target) -> None:
    arguments = case(**M4_LIKE).to(dtype).on(target[1])
    first = step(arguments, workspace)
    for _ in range(9):
        assert all(map(torch.equal, step(arguments, workspace), first))


@BOTH_FORMS
@pytest.mark.parametrize("dtype", DTYPES)
@on_device
def test_graph_capture_without_synchronisation(dtype: torch.dtype, workspace: int, target: Target) -> None:
    arguments, other = (case(**M4_LIKE, seed=seed).to(dtype).on(target[1]) for seed in (0, 1))
    step(arguments, workspace)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step(other, workspace)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(arguments, workspace)
    for mine, others in zip(arguments, other, strict=True):
        mine.copy_(others)
    graph.replay()
    assert all(map(torch.equal, captured, expected))


@on_device
def test_logits_beyond_two_to_the_31(target: Target) -> None:
    tokens, classes = 33000, 65536
    arguments = case(tokens, 8, classes, ignored=0, dtype=torch.bfloat16).on(target[1])
    call = arguments_of(tokens, 8, classes, 2**33, torch.bfloat16)
    assert backend.plan(call) == (tokens, classes)
    whole = step(arguments, 2**33)
    last = slice(tokens - 100, tokens)
    tail = Case(arguments.x[last], arguments.weight, arguments.targets[last], None, None)
    few = step(tail, 2**28)
    torch.testing.assert_close(whole[1][last], few[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[3][last] * tokens, few[3] * 100, rtol=2e-2, atol=1e-2)


@on_triton
@pytest.mark.parametrize(
    ("targets", "limits", "right"),
    [
        ([0, 4, 2], None, True),
        ([0, 5, 2], None, False),
        ([0, -1, 2], None, False),
        ([0, 2**32, 2], None, False),  # would be 0 as int32
        ([-100, -100, -100], None, True),
        ([0, 4, 2], [1, 5, 3], True),
        ([0, 4, 2], [1, 5, 2], False),
        ([0, 4, 2], [1, 6, 3], False),  # beyond the classes
        ([0, 4, 2], [1, 5, 2**33 + 3], False),
        ([0, 4, -100], [1, 5, 9], True),  # of an ignored token nothing counts
        ([0, 4, 2] * 2000 + [7], None, False),  # more than a block
        ([0, 4, 2] * 2000 + [3], None, True),
    ],
)
def test_the_first_kernel_checks_targets_and_limits(
    target: Target, targets: list[int], limits: list[int] | None, right: bool
) -> None:
    """Eleven operators less than checks of their own; as `LossArguments.check_values`, which the CPU uses."""
    device, count = target[1], len(targets)
    limit = None if limits is None else torch.tensor(limits, device=device)
    x, weight = torch.zeros(count, 1, device=device), torch.zeros(5, 1, device=device)
    ids = torch.tensor(targets, device=device)
    call = LossArguments(x, weight, ids, None, limit, -100, 2**28, torch.float32, True, True)
    i32, f32 = (torch.empty(2, count, dtype=dtype, device=device) for dtype in (torch.int32, torch.float32))
    found = backend._prepare(call, i32[0], i32[1], f32[0], torch.empty(2, device=device))
    assert found.item() is right
    if right:
        assert torch.equal(i32[0], torch.where(ids == -100, -1, ids).int())
    if device == "cpu":
        with nullcontext() if right else pytest.raises(ValueError, match=r"targets\[|vocab_limit\["):
            call.check_values()
