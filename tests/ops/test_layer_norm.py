"""layer_norm and add_layer_norm against float64, forward and backward, and how they are registered with PyTorch."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from m4kernels import add_layer_norm, layer_norm
from m4kernels.cases import non_contiguous
from m4kernels.testing import assert_within_error_budget, peak_extra_memory
from tests.ops.targets import targets

TARGETS = targets("triton", "reference")
everywhere = pytest.mark.parametrize("target", TARGETS)
Target = tuple[str, str]
EPS = 1e-6
BF16, FP32 = torch.bfloat16, torch.float32


class Case(NamedTuple):
    x: Tensor
    update: Tensor | None
    weight: Tensor
    grad: Tensor  # of the normed rows
    grad_total: Tensor | None  # of x + update

    def to(self, *args: object) -> "Case":
        return Case(*(None if value is None else value.to(*args) for value in self))


def case(rows: int, dim: int, *, update: bool = True, scale: float = 1.0, offset: float = 0.0, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    x = draw(rows, dim) * scale + offset
    more = (draw(rows, dim) * scale, draw(rows, dim)) if update else (None, None)
    return Case(x, more[0], 1 + 0.3 * draw(dim), draw(rows, dim), more[1])


def typed(c: Case, x: torch.dtype, update: torch.dtype, out: torch.dtype) -> Case:
    """With the dtypes of x, update and the normed rows; those of the gradients are those of what they belong to."""
    total = torch.promote_types(x, update)
    return Case(
        c.x.to(x),
        None if c.update is None else c.update.to(update),
        c.weight,
        c.grad.to(out),
        None if c.grad_total is None else c.grad_total.to(total),
    )


def plain(x: Tensor, update: Tensor | None, weight: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the docstring says; 16-bit rows with a float32 weight in float32, as the op computes them."""
    total = x if update is None else x + update
    normed = F.layer_norm(total.to(weight.dtype), weight.shape, weight, None, EPS)
    return normed.to(out_dtype), total


def ours(backend: str | None) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, update: Tensor | None, weight: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if update is None:
            return layer_norm(x, weight, eps=EPS, out_dtype=out_dtype, backend=backend), x
        return add_layer_norm(x, update, weight, eps=EPS, out_dtype=out_dtype, backend=backend)

    return run


def results(function: Callable[..., tuple[Tensor, Tensor]], c: Case) -> dict[str, Tensor]:
    """The results and the gradients of all tensors."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in c[:3]]
    normed, total = function(*leaves, c.grad.dtype)
    pairs = [(normed, c.grad)] + ([] if c.grad_total is None else [(total, c.grad_total)])
    torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
    gradients = {f"d {n}": t.grad for n, t in zip(("x", "update", "weight"), leaves, strict=True) if t is not None}
    return {"normed": normed.detach(), "total": total.detach()} | gradients


def assert_right(backend: str, c: Case) -> None:
    actual, baseline, truth = (
        results(ours(backend), c),
        results(plain, c),
        results(plain, c.to(torch.float64)),
    )
    for name, value in actual.items():
        assert value.is_contiguous()
        if value.dtype == torch.float64:
            torch.testing.assert_close(value, truth[name], rtol=1e-11, atol=1e-11)
            continue
        assert_within_error_budget(value, baseline[name], truth[name], what=name)


# No rows; rows of one number, whose variance is 0; a power of two, little more, little less; M4-tiny's and M4's width.
SHAPES = [(0, 8), (1, 1), (5, 2), (3, 8), (7, 9), (2, 31), (4, 33), (9, 96), (6, 200), (5, 640)]
WIDE = [(2, 1000), (2, 1536), (2, 4096), (1, 8192)]  # the most of one warp, then several warps a row
DTYPES = [(FP32, BF16, BF16), (FP32, FP32, FP32), (BF16, BF16, BF16), (BF16, FP32, FP32), (FP32, torch.float16, BF16)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda ds: " ".join(str(d).removeprefix("torch.") for d in ds))
@pytest.mark.parametrize("update", [True, False], ids=["added", "alone"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@everywhere
def test_against_float64(shape: tuple[int, int], update: bool, dtypes: tuple[torch.dtype, ...], target: Target) -> None:
    backend, device = target
    assert_right(backend, typed(case(*shape, update=update), *dtypes).to(device))


@pytest.mark.parametrize("shape", WIDE, ids=str)
@everywhere
def test_wide_rows(shape: tuple[int, int], target: Target) -> None:
    backend, device = target
    assert_right(backend, typed(case(*shape), FP32, BF16, BF16).to(device))


def test_float64_of_the_reference() -> None:
    assert_right("reference", case(9, 33).to(torch.float64))


@everywhere
def test_more_rows_than_programs(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a program of the backward pass has several rows, the last fewer, and shares fill several tiles."""
    backend, device = target
    if backend == "triton":
        from m4kernels.ops.layer_norm import triton

        if device == "cpu":
            monkeypatch.setattr(triton, "WARPS", 7)
            monkeypatch.setattr(triton, "SUM", {"BLOCK_ROWS": 2, "BLOCK_COLUMNS": 8})
        assert triton.rows_of_programs(13_000, 1)[0] > 1
    rows = 13_000 if device == "cuda" else 45
    assert_right(backend, typed(case(rows, 20), FP32, BF16, BF16).to(device))


@pytest.mark.parametrize(("scale", "offset"), [(1e-4, 0.0), (1e4, 0.0), (1.0, 300.0), (0.01, -20.0), (1e-20, 0.0)])
@everywhere
def test_small_and_large_and_far_from_zero(scale: float, offset: float, target: Target) -> None:
    backend, device = target
    assert_right(backend, typed(case(6, 640, scale=scale, offset=offset), FP32, BF16, BF16).to(device))


@everywhere
def test_rows_without_variance(target: Target) -> None:
    """A constant row is 0 where its mean is exact, and its gradient that of a row divided by the root of eps."""
    backend, device = target
    c = typed(case(4, 64), FP32, FP32, FP32).to(device)
    c = c._replace(x=torch.full_like(c.x, 2.5), update=torch.zeros_like(c.x))
    assert (results(ours(backend), c)["normed"] == 0).all()
    assert_right(backend, c)


@everywhere
def test_a_row_that_is_not_finite_spoils_no_other(target: Target) -> None:
    backend, device = target
    c = typed(case(9, 40), FP32, BF16, BF16).to(device)
    whole = results(ours(backend), c)
    c.x[4, 7] = torch.nan
    spoilt = results(ours(backend), c)
    others = [i for i in range(9) if i != 4]
    for name in ("normed", "total", "d x", "d update"):
        assert torch.equal(spoilt[name][others], whole[name][others])
        assert not spoilt[name][4].isfinite().all()


@everywhere
def test_any_strides(target: Target) -> None:
    backend, device = target
    c = typed(case(9, 24), FP32, BF16, BF16).to(device)
    expected = results(ours(backend), c)
    layouts: list[Callable[[Tensor], Tensor]] = [non_contiguous, lambda x: x.T.contiguous().T if x.dim() == 2 else x]
    layouts.append(lambda x: torch.cat([x[..., :1], x], -1)[..., 1:])  # no row at a multiple of 16 bytes
    layouts.append(lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]])  # rows further apart
    for layout in layouts:
        x, update, weight, grad, grad_total = (layout(value) for value in c)
        leaves = [t.detach().requires_grad_() for t in (x, update, weight)]
        assert leaves[0].stride() == x.stride()
        found = ours(backend)(*leaves, BF16)
        torch.autograd.backward(list(found), [grad, grad_total])
        for value, (name, wanted) in zip((*found, *(t.grad for t in leaves)), expected.items(), strict=True):
            assert torch.equal(value, wanted), name
    x = c.x.clone().requires_grad_()
    layer_norm(x, c.weight, eps=EPS, backend=backend).sum().backward()  # a gradient of strides 0
    ones = c._replace(update=None, grad=torch.ones_like(c.x), grad_total=None)
    baseline, truth = results(plain, ones), results(plain, ones.to(torch.float64))
    assert_within_error_budget(x.grad, baseline["d x"], truth["d x"])


def test_gradcheck_of_the_specification() -> None:
    leaves = [t.requires_grad_() for t in case(4, 5).to(torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *args: ours("reference")(*args, torch.float64), leaves)


@everywhere
def test_only_the_gradients_asked_for(target: Target) -> None:
    backend, device = target
    c = typed(case(10, 24), FP32, BF16, BF16).to(device)
    everything = results(ours(backend), c)
    for i, name in enumerate(("x", "update", "weight")):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(c[:3])]
        found = ours(backend)(*leaves, BF16)
        torch.autograd.backward(list(found), [c.grad, c.grad_total])
        assert [t.grad is not None for t in leaves] == [i == j for j in range(3)]
        assert torch.equal(leaves[i].grad, everything[f"d {name}"])
    with torch.no_grad():
        assert not any(t.requires_grad for t in ours(backend)(*leaves, BF16))


@everywhere
def test_only_one_of_the_results_used(target: Target) -> None:
    backend, device = target
    c = typed(case(10, 24), FP32, BF16, BF16).to(device)
    leaves = [t.clone().requires_grad_() for t in c[:3]]
    ours(backend)(*leaves, BF16)[1].backward(c.grad_total)
    assert torch.equal(leaves[0].grad, c.grad_total)
    assert torch.equal(leaves[1].grad, c.grad_total.bfloat16())
    assert leaves[2].grad is None
    leaves = [t.clone().requires_grad_() for t in c[:3]]
    ours(backend)(*leaves, BF16)[0].backward(c.grad)
    zero = results(ours(backend), c._replace(grad_total=torch.zeros_like(c.grad_total)))
    for leaf, name in zip(leaves, ("x", "update", "weight"), strict=True):
        assert torch.equal(leaf.grad, zero[f"d {name}"])


def test_sums_depend_on_the_shape_alone() -> None:
    triton = pytest.importorskip("m4kernels.ops.layer_norm.triton")
    for tokens in (1, 2, 2047, 2048, 2049, 13_312, 10**6):
        for warps in (1, 2, 8):
            rows, programs = triton.rows_of_programs(tokens, warps)
            assert programs <= triton.WARPS // warps
            assert (programs - 1) * rows < tokens <= programs * rows


@everywhere
def test_autocast_changes_nothing(target: Target) -> None:
    backend, device = target
    c = typed(case(10, 24), FP32, FP32, FP32).to(device)
    with torch.autocast(device, torch.bfloat16):
        inside = results(ours(backend), c)
    assert all(torch.equal(value, inside[name]) for name, value in results(ours(backend), c).items())


def test_the_automatic_choice_on_a_cpu_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for update in (True, False):
        c = typed(case(30, 24, update=update), FP32, FP32, FP32)
        expected = results(plain, c)
        for backend in (None, "auto"):
            assert all(torch.equal(value, expected[name]) for name, value in results(ours(backend), c).items())
    x = torch.randn(3, 4, requires_grad=True)
    (first,) = torch.autograd.grad(layer_norm(x, torch.rand(4)).square().sum(), x, create_graph=True)
    first.sum().backward()  # as often as PyTorch does
    monkeypatch.setenv("M4KERNELS_BACKEND", "reference")
    (first,) = torch.autograd.grad(layer_norm(x, torch.rand(4)).square().sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="second derivative"):
        first.sum().backward()


@everywhere
def test_opcheck(target: Target) -> None:
    backend, device = target
    for update in (True, False):
        c = typed(case(5, 12, update=update), FP32, BF16, BF16).to(device)
        leaves = [None if t is None else t.requires_grad_() for t in c[:3]]
        torch.library.opcheck(torch.ops.m4kernels.layer_norm.default, (*leaves, EPS, BF16, backend))
        kept = torch.rand(2, 5, device=device) + 0.5
        wanted = (FP32, BF16, True) if update else (None, BF16, False)
        torch.library.opcheck(
            torch.ops.m4kernels.layer_norm_backward.default,
            (c.grad, c.grad_total, c.x.detach(), c.weight.detach(), *kept, *wanted, backend),
        )


@pytest.mark.parametrize("update", [True, False], ids=["added", "alone"])
@pytest.mark.parametrize("target", [*TARGETS, pytest.param((None, "cpu"), id="automatic")])
def test_compiles_without_graph_break(target: tuple[str | None, str], update: bool) -> None:
    backend, device = target
    torch._dynamo.reset()
    c = typed(case(5, 12, update=update), FP32, FP32 if backend is None else BF16, BF16).to(device)
    expected = results(ours(backend), c)
    compiled = results(torch.compile(ours(backend), fullgraph=True, backend="aot_eager"), c)
    for name, value in expected.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-5)


@everywhere
def test_activation_checkpointing_changes_no_bit(target: Target) -> None:
    backend, device = target
    c = typed(case(8, 30), FP32, BF16, BF16).to(device)
    kept = results(ours(backend), c)
    again = results(lambda *args: checkpoint(ours(backend), *args, use_reentrant=False), c)
    assert all(torch.equal(again[name], value) for name, value in kept.items())


@everywhere
def test_vmap_of_grad(target: Target) -> None:
    backend, device = target
    c = typed(case(5, 12), FP32, FP32, FP32).to(device)

    def loss(x: Tensor) -> Tensor:
        normed, total = add_layer_norm(x, c.update, c.weight, backend=backend)
        return (normed * c.grad).sum() + (total * c.grad_total).sum()

    both = torch.vmap(torch.func.grad(loss))(torch.stack([c.x, 2 * c.x]))
    torch.testing.assert_close(both, torch.stack([torch.func.grad(loss)(c.x), torch.func.grad(loss)(2 * c.x)]))


def test_what_is_kept_for_the_backward_pass() -> None:
    """The sum, mean and deviation of every row; not the normed rows, and not the update."""
    c = typed(case(300, 128), FP32, BF16, BF16)
    leaves = [t.requires_grad_() for t in c[:3]]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, total = ours("reference")(*leaves, BF16)
    assert sum(t.nbytes for t in kept) == total.nbytes + c.weight.nbytes + 2 * 4 * 300
    assert peak_extra_memory(lambda: ours("reference")(*leaves, BF16)) < 4 * total.nbytes


BAD: list[tuple[dict[str, Any], str]] = [
    (dict(x=torch.zeros(4, 3, 2)), r"x must have shape (T, D), D at least 1, got (4, 3, 2)"),
    (dict(x=torch.zeros(4, 0)), r"x must have shape (T, D), D at least 1, got (4, 0)"),
    (dict(x=[1.0]), "x must be a torch.Tensor, got list"),
    (dict(x=torch.zeros(4, 6, dtype=torch.int64)), "x must be float32, bfloat16, float16 or float64, got torch.int64"),
    (dict(weight=torch.zeros(5)), "weight must have shape (6,), got (5,)"),
    (dict(weight=torch.zeros(6, device="meta")), "weight is on meta, x on cpu; expected one device"),
    (dict(update=torch.zeros(6)), "update must have the shape of x, (4, 6), got (6,)"),
    (dict(update=None), "update must be a torch.Tensor, got NoneType"),
    (dict(eps=-1.0), "eps must be at least 0 and finite, got -1.0"),
    (dict(eps=float("nan")), "eps must be at least 0 and finite, got nan"),
    (dict(eps="1e-6"), "eps must be a number, got '1e-6' (str)"),
    (dict(out_dtype=torch.int32), "out_dtype must be float32, bfloat16, float16 or float64, got torch.int32"),
    (dict(out_dtype="bf16"), "out_dtype must be a torch.dtype, got 'bf16'"),
    (dict(backend="fast"), "backend='fast' is unknown; expected one of triton, reference, or auto"),
    (dict(backend="cpp"), "backend 'cpp' cannot run: layer_norm has no such backend"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments = dict(x=torch.zeros(4, 6), update=torch.zeros(4, 6), weight=torch.zeros(6)) | change
    with pytest.raises(ValueError, match=f"layer_norm: .*{re.escape(message)}"):
        add_layer_norm(**arguments)


@pytest.mark.parametrize("target", targets("triton"))
def test_what_triton_refuses(target: Target) -> None:
    backend, device = target
    x, weight = torch.zeros(2, 4, device=device), torch.zeros(4, device=device)
    for arguments in (dict(out_dtype=torch.float64), dict(weight=weight.double())):
        with pytest.raises(ValueError, match=r"'triton' cannot run: it computes in float32, got torch\.float64"):
            layer_norm(x, **({"weight": weight} | arguments), backend=backend)
    with pytest.raises(ValueError, match=r"'triton' cannot run: it takes up to 8,192 columns, got 8,193"):
        layer_norm(x.new_zeros(1, 8193), x.new_zeros(8193), backend=backend)


def test_bad_gradients_are_refused() -> None:
    c = case(4, 6)
    kept = torch.ones(2, 4)
    backward = torch.ops.m4kernels.layer_norm_backward
    for change, message in (
        (dict(grad=c.grad[:3]), r"grad must be floating \(4, 6\) on cpu, got torch.float32 \(3, 6\)"),
        (dict(grad_total=c.grad.long()), r"grad_total must be floating \(4, 6\) on cpu, got torch.int64"),
        (dict(mean=kept[0].double()), r"mean must be torch.float32 \(4,\) on cpu, got torch.float64 \(4,\)"),
        (dict(rstd=kept[0, :3]), r"rstd must be torch.float32 \(4,\) on cpu, got torch.float32 \(3,\)"),
    ):
        given = dict(grad=c.grad, grad_total=None, total=c.x, weight=c.weight, mean=kept[0], rstd=kept[1]) | change
        with pytest.raises(ValueError, match=f"layer_norm: {message}"):
            backward(*given.values(), FP32, None, True, "reference")
