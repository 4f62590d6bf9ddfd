"""linear against float64, forward and backward, and how it is registered with PyTorch."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from m4kernels import _ext, linear
from m4kernels.cases import non_contiguous
from m4kernels.ops.linear import api, cpp
from m4kernels.testing import assert_within_error_budget, peak_extra_memory
from tests.ops.targets import targets as on

TARGETS = on("cpp", "reference")
everywhere = pytest.mark.parametrize("target", TARGETS)
Target = tuple[str, str]


@pytest.fixture
def for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The automatic choice as for large calls."""
    monkeypatch.setattr(api, "FEWEST_ROWS", 64)
    monkeypatch.setattr(api, "NARROWEST", 4)


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    gelu: bool
    grad: Tensor  # of the result

    def to(self, *args: object) -> "Case":
        return Case(*(value.to(*args) if isinstance(value, Tensor) else value for value in self))


def case(rows: int, depth: int, columns: int, *, gelu: bool = False, more: bool = False, seed: int = 0) -> Case:
    """With `more` a bias and a residual."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    more_tensors = (draw(columns), draw(rows, columns)) if more else (None, None)
    return Case(draw(rows, depth), draw(columns, depth), *more_tensors, gelu, draw(rows, columns))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gelu: bool) -> Tensor:
    """What the docstring says."""
    y = F.linear(F.gelu(x) if gelu else x, weight, bias)
    return y if residual is None else y + residual


def ours(backend: str | None):
    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gelu: bool) -> Tensor:
        return linear(x, weight, bias, residual=residual, gelu=gelu, backend=backend)

    return run


def results(function, case: Case) -> dict[str, Tensor]:
    """The result and the gradients of all tensors."""
    *tensors, gelu, grad = case
    names = ("x", "weight", "bias", "residual")
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*leaves, gelu)
    y.backward(grad.to(y.dtype))
    gradients = {f"d {name}": leaf.grad for name, leaf in zip(names, leaves, strict=True) if leaf is not None}
    return {"y": y.detach()} | gradients


def assert_right(function, arguments: Case) -> None:
    """Within the error budget of plain PyTorch in the same dtype; in float64, where that is the truth itself, equal to
    it but for the order of a sum of some hundred products."""
    actual = results(function, arguments)
    baseline, truth = results(plain, arguments), results(plain, arguments.to(torch.float64))
    for name, value in actual.items():
        if value.dtype == torch.float64:
            torch.testing.assert_close(value, truth[name], rtol=1e-12, atol=1e-11)
            continue
        assert_within_error_budget(value, baseline[name], truth[name], what=name)


# No rows, columns or depth; about a register, a tile and a panel of rows and columns; several slabs of the depth
# (of 320 words), tasks (of 112 rows) and blocks of columns (of at most 640).
SHAPES = [
    (0, 5, 3),
    (4, 0, 3),
    (3, 4, 0),
    (1, 1, 1),
    (5, 3, 7),
    (14, 33, 16),
    (15, 64, 33),
    (17, 7, 31),
    (113, 321, 40),
]
SHAPES += [(225, 20, 65), (30, 700, 641), (16, 1300, 24)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize(("gelu", "more"), [(False, False), (True, True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@everywhere
def test_against_float64(shape: tuple[int, int, int], gelu: bool, more: bool, dtype: torch.dtype, target: Target):
    backend, device = target
    if backend == "cpp" and dtype in (torch.float64, torch.float16):
        pytest.skip("the backend does not take this dtype")
    assert_right(ours(backend), case(*shape, gelu=gelu, more=more).to(dtype).to(device))


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 5), (29, 330, 47), (120, 35, 100)], ids=str)
def test_every_level(shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for emulated in (False, True):  # pairs of bfloat16 as levels without such instructions multiply them
        if emulated:
            monkeypatch.setattr(cpp, "dots_bf16", lambda: True)
        assert_right(ours("cpp"), case(*shape, gelu=True, more=True).to(dtype))


@pytest.mark.usefixtures("simd_level")
def test_gelu_over_its_whole_range() -> None:
    x = torch.cat([torch.linspace(-15, 15, 30001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])]).unsqueeze(1)
    one = torch.ones(1, 1)
    arguments = Case(x, one, None, None, True, torch.ones_like(x))
    actual, truth = results(ours("cpp"), arguments), results(plain, arguments.to(torch.float64))
    for name in ("y", "d x"):  # the error of 9e-8 of the normal distribution, and two roundings of a float
        allowed = 9e-8 * x.double().abs().clamp(1, 15) + 2.4e-7 * truth[name].abs()
        assert bool(((actual[name].double() - truth[name]).abs() <= allowed).all()), name
    for value in (torch.nan, torch.inf):
        y = linear(torch.full((3, 2), value), torch.ones(5, 2), gelu=True, backend="cpp")
        assert torch.equal(y, torch.full((3, 5), value)) or bool(y.isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@everywhere
def test_any_strides(dtype: torch.dtype, target: Target) -> None:
    backend, device = target
    straight = case(37, 50, 45, gelu=True, more=True).to(dtype).to(device)
    expected = results(ours(backend), straight)
    layouts = [non_contiguous, lambda x: x.T.contiguous().T if x.dim() == 2 else x]
    layouts.append(lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]])  # rows further apart
    for layout in layouts:
        tensors = [layout(value) if isinstance(value, Tensor) else value for value in straight]
        *inputs, gelu, grad = tensors
        leaves = [leaf.detach().requires_grad_() for leaf in inputs]
        y = ours(backend)(*leaves, gelu)
        y.backward(grad)
        for value, (name, wanted) in zip((y, *(leaf.grad for leaf in leaves)), expected.items(), strict=True):
            if backend == "cpp" and name != "d bias":  # it packs whatever it reads; that sum is PyTorch's
                assert torch.equal(value, wanted), name
            torch.testing.assert_close(value, wanted)
    x, weight = straight.x.clone().requires_grad_(), straight.weight
    linear(x, weight, backend=backend).sum().backward()  # a gradient of strides 0
    torch.testing.assert_close(x.grad, weight.float().sum(0).expand(37, 50).to(dtype), rtol=0.02, atol=0.02)


def test_gradcheck_of_the_specification() -> None:
    *tensors, gelu, _ = case(4, 3, 5, gelu=True, more=True).to(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *args: ours("reference")(*args, gelu), leaves)


@everywhere
def test_only_the_gradients_asked_for(target: Target) -> None:
    backend, device = target
    arguments = case(40, 8, 60, gelu=True, more=True).to(device)
    everything = results(ours(backend), arguments)
    *tensors, gelu, grad = arguments
    for i, name in enumerate(("x", "weight", "bias", "residual")):
        leaves = [tensor.clone().requires_grad_(i == j) for j, tensor in enumerate(tensors)]
        ours(backend)(*leaves, gelu).backward(grad)
        assert [leaf.grad is not None for leaf in leaves] == [i == j for j in range(4)]
        assert torch.equal(leaves[i].grad, everything[f"d {name}"])
    with torch.no_grad():
        assert not ours(backend)(*leaves, gelu).requires_grad


def test_gelu_is_not_stored() -> None:
    x, weight = torch.randn(300, 200, requires_grad=True), torch.randn(10, 200, requires_grad=True)
    linear(x, weight, gelu=True, backend="cpp")
    assert peak_extra_memory(lambda: linear(x, weight, gelu=True, backend="cpp")) < x.nbytes // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    arguments = case(230, 400, 700, gelu=True, more=True).to(dtype)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            found = results(ours("cpp"), arguments)
            del found["d bias"]  # PyTorch's own sum
            runs.append(found)
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(run[name], value) for name, value in runs[0].items())


def test_float32_stays_float32_whatever_pytorch_may_round() -> None:
    arguments = case(70, 64, 48)
    exact = results(ours(None), arguments)
    try:
        torch.set_float32_matmul_precision("medium")
        allowed = results(ours("cpp"), arguments)
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = results(ours("cpp"), arguments)
    assert all(torch.equal(allowed[name], value) for name, value in expected.items())
    truth = results(plain, arguments.to(torch.float64))
    assert (exact["y"] - truth["y"]).abs().max() < 1e-4


@pytest.mark.usefixtures("for_all_sizes")
@pytest.mark.parametrize("backend", ["cpp", "reference", None])
def test_autocast(backend: str | None) -> None:
    arguments = case(80, 64, 48, gelu=True, more=True)
    *tensors, gelu, grad = arguments
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(backend)(*leaves, gelu)
        without = linear(leaves[0], leaves[1], backend=backend)
    assert y.dtype == torch.float32  # the residual's
    assert without.dtype == torch.bfloat16
    y.backward(grad)
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    truth = results(plain, arguments.to(torch.float64))
    for leaf, (name, wanted) in zip(leaves, list(truth.items())[1:], strict=True):
        assert (leaf.grad - wanted).norm() <= 0.01 * wanted.norm(), name
    rounded = F.gelu(tensors[0].double()).bfloat16().double() @ tensors[1].bfloat16().double().T
    assert (y - (rounded + tensors[2] + tensors[3])).norm() <= (1e-6 if backend else 4e-3) * y.norm()


@everywhere
def test_opcheck(target: Target) -> None:
    backend, device = target
    op = torch.ops.m4kernels.linear.default
    for more in (False, True):
        *tensors, gelu, grad = case(9, 5, 11, gelu=more, more=more).to(device)
        leaves = [None if tensor is None else tensor.requires_grad_() for tensor in tensors]
        torch.library.opcheck(op, (*leaves, gelu, None, backend))
        x, weight, bias, _ = leaves
        backward = (grad, x.detach(), weight.detach(), None if bias is None else bias.detach(), gelu, None)
        for wanted in ((True, True, more), (True, False, False), (False, True, False)):
            torch.library.opcheck(torch.ops.m4kernels.linear_backward.default, (*backward, *wanted, backend))


@pytest.mark.usefixtures("for_all_sizes")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["cpp", "reference", None])
def test_compiles_without_graph_break(backend: str | None, autocast: bool) -> None:
    def run(*args) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ours(backend)(*args)

    torch._dynamo.reset()
    arguments = case(70, 20, 24, gelu=True, more=True)
    eager = results(run, arguments)
    compiled = results(torch.compile(run, fullgraph=True, backend="aot_eager"), arguments)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5 if not autocast else 2e-2, atol=1e-5)


def test_activation_checkpointing_changes_no_bit() -> None:
    arguments = case(80, 30, 24, gelu=True, more=True)
    kept = results(ours("cpp"), arguments)
    again = results(lambda *args: checkpoint(ours("cpp"), *args, use_reentrant=False), arguments)
    assert all(torch.equal(again[name], value) for name, value in kept.items())


@pytest.mark.usefixtures("for_all_sizes")
def test_the_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(api, "_op", lambda *args: ran.append(args[-1]))
    monkeypatch.setattr(api, "why_not_own_products", lambda dtype: None)
    x, weight = torch.randn(64, 8), torch.randn(4, 8)
    linear(x, weight)
    linear(x.bfloat16(), weight.bfloat16())
    assert ran == ["cpp", "cpp"]
    monkeypatch.setattr(api, "slow_bf16", lambda: None)
    assert torch.equal(linear(x[:63], weight), F.linear(x[:63], weight))
    assert torch.equal(linear(x, weight[:3]), F.linear(x, weight[:3]))
    linear(x[:63].bfloat16(), weight.bfloat16())
    assert ran == ["cpp", "cpp"]
    monkeypatch.setattr(api, "slow_bf16", lambda: "no instructions")
    linear(x[:63].bfloat16(), weight.bfloat16())
    assert ran == ["cpp", "cpp", "cpp"]
    ran.pop()
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    monkeypatch.setattr(api, "why_not_own_products", lambda dtype: "another processor")
    residual = torch.randn(64, 4)
    assert torch.equal(linear(x, weight, gelu=True, residual=residual), F.linear(F.gelu(x), weight) + residual)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert ran == ["cpp", "cpp"]
    monkeypatch.setenv("M4KERNELS_BACKEND", "reference")
    linear(x, weight)
    assert ran[2:] == ["reference"]


def test_the_choice_by_processor(simd_level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "has_amx", lambda: False)
    fast = _ext.require().simd_level()
    assert (api.why_not_own_products(torch.float32) is None) == fast.startswith("avx512")
    assert (api.why_not_own_products(torch.bfloat16) is None) == (fast in ("avx2", "avx512"))
    if simd_level == "portable":
        assert "portable" in str(api.why_not_own_products(torch.float32))
    before = api.why_not_own_products(torch.float32)
    monkeypatch.setattr(api, "has_amx", lambda: True)  # float32 must not become bfloat16 there
    assert api.why_not_own_products(torch.float32) == before
    assert "AMX" in str(api.why_not_own_products(torch.bfloat16))


BAD = [
    (dict(x=torch.zeros(4, 3, 2)), r"x must have shape \(T, K\), got \(4, 3, 2\)"),
    (dict(x=[1.0]), "x must be a torch.Tensor, got list"),
    (dict(weight=torch.zeros(8)), r"weight must have shape \(N, K\), got \(8,\)"),
    (dict(weight=torch.zeros(8, 5)), "x has K = 6, weight has K = 5"),
    (dict(weight=torch.zeros(8, 6).double()), "x is torch.float32, weight torch.float64; expected the same dtype"),
    (dict(x=torch.zeros(4, 6, dtype=torch.int64)), "x must be float32, bfloat16, float16 or float64, got torch.int64"),
    (dict(bias=torch.zeros(6)), r"bias must have shape \(8,\), got \(6,\)"),
    (dict(residual=torch.zeros(4, 1)), r"residual must have shape \(4, 8\), got \(4, 1\)"),
    (dict(residual=torch.zeros(4, 8, device="meta")), "residual is on meta, x on .*; expected one device"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
@pytest.mark.parametrize("backend", ["cpp", "reference", None])
def test_bad_input(change: dict, message: str, backend: str | None) -> None:
    arguments = dict(x=torch.zeros(4, 6), weight=torch.zeros(8, 6)) | change
    with pytest.raises(ValueError, match=message):
        linear(**arguments, backend=backend)


def test_a_named_backend_that_cannot_run_says_why() -> None:
    double = torch.zeros(4, 6).double()
    with pytest.raises(ValueError, match=r"'cpp' cannot run: it computes in float32 and bfloat16, got torch.float64"):
        linear(double, double, backend="cpp")


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(70, 6, requires_grad=True)
    (first,) = torch.autograd.grad(linear(x, torch.randn(3, 6), backend="cpp").sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="second derivative"):
        first.sum().backward()
