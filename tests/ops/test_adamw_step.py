"""adamw_step against float64 and torch.optim.AdamW; skipped steps, layouts, threads, SIMD levels, errors."""

import pytest
import torch
from torch import Tensor

from m4kernels import _ext, adamw_step
from m4kernels.testing import assert_within_error_budget
from tests.ops.targets import targets

Target = tuple[str, str]
BACKENDS = targets("cpp", "reference")
# None, one, a register and its neighbours at every level, a part of the kernel's and a bit, matrices.
SHAPES = [(0,), (), (1,), (3,), (4,), (15,), (16,), (17,), (2**15,), (2**15 + 5,), (7, 9), (3, 4, 5)]
SETTINGS = {"lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05}


class State:
    """Parameters, gradients, moments and steps."""

    def __init__(self, shapes: list[tuple[int, ...]] = SHAPES, device: str = "cpu", step: float = 3.0) -> None:
        g = torch.Generator().manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            return [(torch.randn(shape, generator=g) * scale).to(device) for shape in shapes]

        self.params, self.grads, self.exp_avgs = draw(1.0), draw(0.3), draw(0.1)
        self.exp_avg_sqs = [x * x for x in draw(0.1)]
        self.steps = [torch.tensor(step, device=device) for _ in shapes]

    def to(self, dtype: torch.dtype) -> "State":
        """A copy; steps stay float32."""
        copy = State([])
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
            setattr(copy, name, [x.to(dtype, copy=True) for x in getattr(self, name)])
        copy.steps = [x.clone() for x in self.steps]
        return copy

    def lists(self) -> tuple[list[Tensor], ...]:
        return self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps

    def results(self) -> dict[str, list[Tensor]]:
        return {"params": self.params, "exp_avgs": self.exp_avgs, "exp_avg_sqs": self.exp_avg_sqs, "steps": self.steps}


def same(a: State, b: State) -> bool:
    return all(torch.equal(x, y) for u, v in zip(a.lists(), b.lists(), strict=True) for x, y in zip(u, v, strict=True))


@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("factor", [None, 0.37])
def test_against_float64(target: Target, factor: float | None, simd_level: str) -> None:
    backend, device = target
    ours = State(device=device)
    plain, truth = ours.to(torch.float32), ours.to(torch.float64)
    scale = None if factor is None else torch.tensor(factor, device=device)
    for lr in (2e-3, 1e-2):  # two steps: the second starts from what the first left
        for state, how in ((ours, backend), (plain, "reference"), (truth, "reference")):
            adamw_step(*state.lists(), **{**SETTINGS, "lr": lr}, grad_factor=scale, backend=how)
    for name, tensors in ours.results().items():
        for i, tensor in enumerate(tensors):
            if name == "steps":
                assert tensor == 5
            else:
                expected = truth.results()[name][i].double()
                assert_within_error_budget(tensor, plain.results()[name][i], expected, what=f"{name} of {SHAPES[i]}")
    assert all(torch.equal(a, b.float()) for a, b in zip(ours.grads, truth.grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.3, 0.999), (0.0, 0.0)])
def test_it_is_torchs_adamw(dtype: torch.dtype, backend: str, betas: tuple[float, float]) -> None:
    """From fresh moments, over a few steps of changing rates."""
    ours, theirs = (State(step=0.0).to(dtype) for _ in range(2))
    for tensors in (ours.exp_avgs, ours.exp_avg_sqs):
        torch._foreach_zero_(tensors)
    leaves = [torch.nn.Parameter(p) for p in theirs.params]
    optimizer = torch.optim.AdamW(leaves, **{**SETTINGS, "betas": betas}, foreach=False)
    for lr in (1e-3, 3e-3, 2e-3):
        for leaf, grad in zip(leaves, theirs.grads, strict=True):
            leaf.grad = 0.5 * grad
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        half = torch.tensor(0.5)
        adamw_step(*ours.lists(), **{**SETTINGS, "lr": lr, "betas": betas}, grad_factor=half, backend=backend)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-7}
    for i, leaf in enumerate(leaves):
        torch.testing.assert_close(ours.params[i], leaf.detach(), **tolerance)
        torch.testing.assert_close(ours.exp_avgs[i], optimizer.state[leaf]["exp_avg"], **tolerance)
        torch.testing.assert_close(ours.exp_avg_sqs[i], optimizer.state[leaf]["exp_avg_sq"], **tolerance)
        assert ours.steps[i] == optimizer.state[leaf]["step"] == 3


@pytest.mark.parametrize("target", BACKENDS)
def test_found_inf_leaves_everything(target: Target) -> None:
    """Whatever the gradients are."""
    backend, device = target
    state = State(device=device)
    for grad in state.grads:
        grad.fill_(torch.nan)
    before = state.to(torch.float32)
    number = torch.ones((), device=device)
    adamw_step(*state.lists(), **SETTINGS, grad_factor=number * torch.inf, found_inf=number, backend=backend)
    for name, tensors in state.results().items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, before.results()[name], strict=True)), name
    adamw_step(*state.lists(), **SETTINGS, found_inf=0 * number, backend=backend)
    assert state.params[-1].isnan().all()
    assert all(step == 4 for step in state.steps)


def test_the_same_bits_for_every_number_of_threads(simd_level: str) -> None:
    """And wherever a tensor is cut: its halves, updated on their own, get the same numbers."""
    start = State([(2**16 + 21,), (5, 3), (40_000,)])
    found = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            state = start.to(torch.float32)
            adamw_step(*state.lists(), **SETTINGS, backend="cpp")
            found.append(state)
        finally:
            torch.set_num_threads(before)
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    cut = start.to(torch.float32)
    halves = [[x[0][a:b] for x in cut.lists()[:4]] for a, b in ((0, 1003), (1003, None))]
    lists = [list(column) for column in zip(*halves, strict=True)]
    adamw_step(*lists, [torch.tensor(3.0), torch.tensor(3.0)], **SETTINGS, backend="cpp")
    for a, b in zip(cut.lists()[:4], found[0].lists()[:4], strict=True):
        assert torch.equal(a[0], b[0])


def test_the_same_bits_with_avx2_and_avx512() -> None:
    extension, found = _ext.require(), []
    for level in ("avx2", "avx512"):
        try:
            extension.set_simd_level(level)
        except ValueError as error:
            pytest.skip(str(error))
        state = State()
        adamw_step(*state.lists(), **SETTINGS, grad_factor=torch.tensor(0.7), backend="cpp")
        found.append(state)
        extension.set_simd_level("auto")
    assert same(*found)


def test_layouts() -> None:
    """Dense ones of any order of dimensions; gradients of another; gaps go to the reference."""
    start = State([(6, 10), (4, 3, 2)])
    plain, turned, gaps = (start.to(torch.float32) for _ in range(3))
    adamw_step(*plain.lists(), **SETTINGS, backend="cpp")
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        setattr(turned, name, [x.mT.contiguous().mT for x in getattr(turned, name)])
    adamw_step(*turned.lists(), **SETTINGS, backend="cpp")
    assert same(plain, turned)
    wide = torch.zeros(6, 20)
    wide[:, ::2] = gaps.params[0]
    gaps.params[0] = wide[:, ::2]
    with pytest.raises(ValueError, match=r"adamw_step: backend 'cpp' cannot run: params\[0\] and its moments must lie"):
        adamw_step(*gaps.lists(), **SETTINGS, backend="cpp")
    adamw_step(*gaps.lists(), **SETTINGS, backend="auto")
    torch.testing.assert_close(gaps.params[0], plain.params[0], rtol=1e-6, atol=1e-7)
    assert (wide[:, 1::2] == 0).all()


def test_a_rate_in_a_tensor_and_no_parameters() -> None:
    plain, rated = State(), State()
    rate = torch.tensor(2e-3)
    adamw_step(*plain.lists(), **{**SETTINGS, "lr": rate.item()}, backend="cpp")
    adamw_step(*rated.lists(), **{**SETTINGS, "lr": rate}, backend="cpp")
    assert same(plain, rated)
    adamw_step([], [], [], [], [], **SETTINGS)


def test_double_precision_goes_to_the_reference() -> None:
    state = State().to(torch.float64)
    with pytest.raises(ValueError, match=r"it computes in float32, params are torch\.float64"):
        adamw_step(*state.lists(), **SETTINGS, backend="cpp")


def test_parameters_that_autograd_knows() -> None:
    """They change in place, outside of the graph, and a backward pass that would need the old values is refused."""
    state = State([(3, 2)])
    leaf = torch.nn.Parameter(state.params[0])
    kept = (leaf * leaf).sum()
    adamw_step([leaf], *state.lists()[1:], **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize("target", BACKENDS)
def test_opcheck(target: Target) -> None:
    backend, device = target
    state = State([(5,), (2, 3)], device=device)
    rate = torch.tensor(1e-3, dtype=torch.float64)
    factor = torch.tensor(0.5, device=device)
    arguments = (*state.lists(), rate, 0.9, 0.95, 1e-8, 0.05, factor, None, backend)
    torch.library.opcheck(torch.ops.m4kernels.adamw_step.default, arguments)


def test_compiles() -> None:
    eager, compiled = State(), State()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(params, grads, exp_avgs, exp_avg_sqs, steps):
        adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, **SETTINGS)

    adamw_step(*eager.lists(), **SETTINGS)
    step(*compiled.lists())
    assert same(eager, compiled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"grads": s.grads[:-1]}, "grads has 11 tensors, params 12"),
        (lambda s: {"steps": s.steps[:-1]}, "steps has 11 tensors, params 12"),
        (lambda s: {"grads": [*s.grads[:-1], s.grads[0]]}, r"grads\[11\] must be as params\[11\], \(3, 4, 5\)"),
        (lambda s: {"exp_avgs": [x.double() for x in s.exp_avgs]}, r"exp_avgs\[0\] must be as .* got \(0,\) torch.fl"),
        (lambda s: {"params": [x.half() for x in s.params]}, "params must be float32 or float64, got torch.float16"),
        (lambda s: {"params": [s.params[0], s.params[1].double()], "grads": s.grads[:2], "exp_avgs": s.exp_avgs[:2],
                    "exp_avg_sqs": s.exp_avg_sqs[:2], "steps": s.steps[:2]}, r"params\[1\] is torch.float64 on cpu"),
        (lambda s: {"steps": [x.long() for x in s.steps]}, r"steps\[0\] must be a float32 tensor of shape \(\)"),
        (lambda _: {"grad_factor": torch.ones(1)}, r"grad_factor must be a float32 tensor of shape \(\)"),
        (lambda _: {"found_inf": torch.ones((), dtype=torch.bool)}, "found_inf must be a float32 tensor"),
        (lambda _: {"lr": torch.ones(2)}, r"lr must be a number or a tensor of shape \(\), got shape \(2,\)"),
        (lambda _: {"lr": "0.1"}, "lr must be a number"),
        (lambda _: {"betas": (1.0, 0.9)}, "beta1 must be at least 0 and below 1, got 1.0"),
        (lambda _: {"eps": -1.0}, "eps must be at least 0 and finite, got -1.0"),
        (lambda _: {"weight_decay": float("nan")}, "weight_decay must be at least 0 and finite, got nan"),
    ],
)  # fmt: skip
def test_bad_arguments(change, message: str) -> None:
    state = State()
    arguments = dict(zip(("params", "grads", "exp_avgs", "exp_avg_sqs", "steps"), state.lists(), strict=True))
    with pytest.raises(ValueError, match=f"adamw_step: {message}"):
        adamw_step(**{**arguments, **SETTINGS, **change(state)})
