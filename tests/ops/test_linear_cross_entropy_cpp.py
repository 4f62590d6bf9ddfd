"""What only the compiled backend of linear_cross_entropy has: SIMD levels, threads, the plan of the chunks."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from m4kernels import _ext, linear_cross_entropy
from m4kernels.ops.linear_cross_entropy import cpp
from m4kernels.testing import assert_within_error_budget
from tests.ops.linear_cross_entropy_cases import Case, assert_close_to_whole_logits, case, gradients, whole_logits

CPP = ("cpp", "cpu")


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 2047, 2049, 4099])
def test_every_level_at_every_row_length(classes: int) -> None:
    limits = tuple({1, classes // 3 + 1, max(1, classes - 1), classes})
    arguments = case(37, 12, classes, weighted=True, limits=limits, seed=classes)
    truth = gradients(whole_logits, arguments.to(torch.float64))
    plain = gradients(whole_logits, arguments)
    actual = gradients(linear_cross_entropy, arguments, CPP)
    for name, a, p, t in zip(("loss", "nll", "dx", "dweight"), actual, plain, truth, strict=False):
        assert_within_error_budget(a, p, t, what=name)


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("own", [False, True])
def test_exponential_over_its_whole_range(own: bool, request: pytest.FixtureRequest) -> None:
    if own:
        request.getfixturevalue("own_products")
    # One token; its logits are the weights themselves, so nll[t] and the gradient show exp directly.
    z = torch.cat([torch.linspace(-120, 0, 5000), torch.tensor([-torch.inf, -1e30, -87.0, -87.4, -88.0, 0.0])])
    x = torch.ones(1, 1, requires_grad=True)
    weight = z.unsqueeze(1).requires_grad_()
    out = linear_cross_entropy(x, weight, torch.tensor([4999]), backend="cpp")
    out.loss.backward()
    p = torch.softmax(z.double(), 0)
    p[4999] -= 1
    normal = p.abs() > torch.finfo(torch.float32).tiny * 64
    torch.testing.assert_close(weight.grad[normal, 0].double(), p[normal], rtol=1e-6, atol=0)
    assert weight.grad[~normal].abs().max() < 1e-36


# Tokens about a register, a panel and a chunk of them; dimensions about a register block and, at 512, copied; classes
# about a tile and a block; logits kept, kept in part, and computed twice.
TILES = [(1, 1, 1), (15, 13, 13), (16, 14, 14), (17, 15, 15), (31, 31, 125), (32, 32, 126), (33, 33, 127), (49, 1, 253)]
TILES += [(20, 512, 300), (5, 1030, 130), (800, 20, 130), (1600, 5, 40)]


@pytest.fixture
def own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension's products, for every shape and at every SIMD level, where they are emulated if need be."""
    monkeypatch.setattr(cpp, "FEWEST_CLASSES", 1)
    monkeypatch.setattr(cpp, "FEWEST_TOKENS", 0)
    monkeypatch.setattr(cpp, "WIDEST", 2**20)
    monkeypatch.setattr(cpp, "dots_bf16", lambda: True)

    def refuse(*_: object) -> None:
        raise AssertionError("the library's products ran")

    monkeypatch.setattr(cpp, "_in_library", refuse)


@pytest.mark.usefixtures("simd_level", "own_products")
@pytest.mark.parametrize(("tokens", "dim", "classes"), TILES)
@pytest.mark.parametrize("kept", ["all", "some", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_every_size(tokens: int, dim: int, classes: int, kept: str, dtype: torch.dtype) -> None:
    limits = tuple({1, classes // 2 + 1, classes})
    arguments = case(tokens, dim, classes, weighted=True, limits=limits, ignored=0.1, seed=dim).to(dtype)
    bf16 = dtype == torch.bfloat16
    shape = {"count": int((arguments.targets >= 0).sum()), "dim": dim, "classes": classes}
    shape |= {"weight_row": dim, "weight_column": 1, "weight_is_bf16": bf16, "round": bf16, "bf16_products": bf16}
    shape |= {"x_grad": True, "weight_grad": True, "threads": torch.get_num_threads()}
    rows, floats, logits = _ext.require().lce_fused_plan(**shape, bytes=2**28)
    floats -= {"all": 0, "some": logits // 2, "none": logits}[kept]
    assert _ext.require().lce_fused_plan(**shape, bytes=4 * floats)[:2] == (rows, floats)
    workspace = 4 * floats + tokens * cpp.FIXED_BYTES_A_TOKEN
    assert_close_to_whole_logits(arguments, CPP, max_workspace_bytes=workspace)


@pytest.mark.usefixtures("simd_level", "own_products")
@pytest.mark.parametrize(("tokens", "dim", "classes"), [(50, 24, 200), (33, 13, 127), (1600, 5, 40)])
def test_operands_rounded_to_bf16(tokens: int, dim: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets, _, _ = case(tokens, dim, classes)
    rounded = Case(x.bfloat16(), weight.bfloat16(), targets, None, None)
    truth = gradients(whole_logits, rounded.to(torch.float64))
    plain = gradients(whole_logits, rounded)
    for mixed in (Case(x, weight, targets, None, None), rounded._replace(weight=weight), rounded._replace(x=x)):
        with torch.autocast("cpu", torch.bfloat16):
            actual = gradients(linear_cross_entropy, mixed, CPP)
        for a, t in zip(actual[:2], truth[:2], strict=True):  # only the operands are rounded: nothing else shows here
            torch.testing.assert_close(a.double(), t, rtol=1e-5, atol=1e-6)
        for name, i in (("dx", 2), ("dweight", 3)):  # the gradients of the logits are, too, as PyTorch rounds them
            assert_within_error_budget(actual[i].float(), plain[i].float(), truth[i], what=name, floor=0, further=1e-7)
        # Products of float32 numbers, for a processor without those of bfloat16: gradients lose nothing either.
        monkeypatch.setattr(cpp, "dots_bf16", lambda: False)
        with torch.autocast("cpu", torch.bfloat16):
            actual = gradients(linear_cross_entropy, mixed, CPP)
        for a, t in zip(actual[:4], truth[:4], strict=True):
            if a.dtype == torch.float32:
                torch.testing.assert_close(a.double(), t, rtol=1e-4, atol=1e-6)
        monkeypatch.setattr(cpp, "dots_bf16", lambda: True)


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_products_pass_on_what_is_not_finite(value: float, dtype: torch.dtype) -> None:
    arguments = case(40, 8, 300, ignored=0.3, limits=(300, 20)).to(dtype)
    valid = arguments.targets >= 0
    wide = valid & (arguments.vocab_limit == 300)
    spoilt = int(wide.nonzero()[3])
    arguments.x[spoilt, 2] = value
    loss, nll, dx, dweight, correct = gradients(linear_cross_entropy, arguments, CPP)
    assert loss.isnan()
    assert torch.equal(nll.isnan(), torch.arange(40) == spoilt)
    assert torch.equal(dx.isnan().any(1), torch.arange(40) == spoilt)
    assert dweight.isnan().all()
    assert not correct[spoilt]
    assert (dx[~valid] == 0).all()
    # A weight beyond a token's classes, in the same block, reaches neither its loss nor its verdict.
    arguments = case(40, 8, 300, ignored=0.3, limits=(300, 20)).to(dtype)
    clean = gradients(linear_cross_entropy, arguments, CPP)
    arguments.weight[25] = value
    nll, correct = (gradients(linear_cross_entropy, arguments, CPP)[i] for i in (1, 4))
    assert nll[wide].isnan().all()
    assert torch.equal(nll[~wide], clean[1][~wide])
    assert torch.equal(correct[~wide], clean[4][~wide])


@pytest.mark.usefixtures("simd_level", "own_products")
def test_the_first_of_equal_classes_across_blocks_and_parts() -> None:
    weight = torch.zeros(3000, 4)
    weight[[5, 40, 125, 126, 2999]] = 1
    targets = torch.tensor([5, 40, 125, 126, 2999, 0])
    assert (
        linear_cross_entropy(torch.ones(6, 4), weight, targets, backend="cpp").correct.tolist() == [True] + [False] * 5
    )
    low = torch.where(targets < 5, targets, -100)
    out = linear_cross_entropy(torch.ones(6, 4), weight, low, vocab_limit=torch.full((6,), 5), backend="cpp")
    assert out.correct.tolist() == [False] * 5 + [True]


def test_calls_at_the_same_time_have_a_workspace_each() -> None:
    arguments = case(64, 32, 3000)
    expected = gradients(linear_cross_entropy, arguments, CPP)
    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(lambda _: gradients(linear_cross_entropy, arguments, CPP), range(12)):
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


SIZES = [(3, 8, 5), (64, 32, 1000), (300, 64, 5000), (1100, 48, 700), (17, 640, 20000)]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_same_bits_on_every_run(size: tuple[int, int, int], set_threads: Callable[[int], None]) -> None:
    arguments = case(*size, weighted=True, limits=(size[2], size[2] // 2 + 1))
    by_threads = []
    for threads in (1, 2, 5):
        set_threads(threads)
        first, second = (gradients(linear_cross_entropy, arguments, CPP) for _ in range(2))
        for name, a, b in zip(("loss", "nll", "dx", "dweight", "correct"), first, second, strict=True):
            assert torch.equal(a, b), name
        by_threads.append(first)
    for other in by_threads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(by_threads[0], other, strict=True))


@pytest.mark.usefixtures("simd_level")
def test_the_pass_gives_the_same_bits_for_every_thread_count() -> None:
    extension, (rows, width) = _ext.require(), (257, 1003)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, width, generator=g) * 5
    order = torch.randperm(rows, generator=g)
    limit = torch.randint(1, width + 1, (rows,), generator=g)
    targets = torch.empty(rows, dtype=torch.int64)
    targets[order] = (torch.rand(rows, generator=g) * limit).long()
    scale = torch.randn(rows, generator=g)
    results = []
    for threads in (1, 2, 3, 7):
        out = (logits.clone(), torch.empty(rows), torch.empty(rows, dtype=torch.bool))
        tensors = {"order": order, "limit": limit, "scale": scale, "targets": targets}
        tensors |= dict(zip(("logits", "nll", "correct"), out, strict=True))
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        extension.lce_pass_f32(**addresses, first=0, rows=rows, width=width, gradient=True, threads=threads)
        results.append(out)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def plan(limits: list[int], logits: int, max_rows: int = 1024) -> list[tuple[int, int, int]]:
    limit = torch.tensor(limits)
    return _ext.require().lce_plan(
        limit=limit.data_ptr(), count=len(limits), bytes=logits * 4, per_logit=4, per_row=0, max_rows=max_rows
    )


@pytest.mark.parametrize("seed", range(20))
def test_plan_covers_every_token_within_the_budget(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    count, classes = int(torch.randint(1, 600, (), generator=g)), int(torch.randint(1, 3000, (), generator=g))
    distinct = torch.randint(1, classes + 1, (int(torch.randint(1, 50, (), generator=g)),), generator=g)
    limits = distinct[torch.randint(0, len(distinct), (count,), generator=g)].sort(descending=True).values.tolist()
    budget = classes * int(torch.randint(1, 100, (), generator=g))
    chunks, token = plan(limits, budget, 128), 0
    for first, rows, width in chunks:
        assert first == token
        assert 1 <= rows <= 128
        assert width == limits[first]
        assert rows * width <= budget
        token += rows
    assert token == count
    # The classes beyond the tokens' limits that are multiplied all the same cost less than the products saved by it.
    exact = sum(limits)
    done = sum(rows * width for _, rows, width in chunks)
    assert done <= exact * 1.05 + 48 * sum(width for _, _, width in chunks)


def test_plan_separates_vocabularies() -> None:
    assert plan([64000] * 500 + [8192] * 300, 10**9) == [(0, 500, 64000), (500, 300, 8192)]
    assert plan([64000] * 5 + [63999] * 5, 10**9) == [(0, 10, 64000)]
    assert [rows for _, rows, _ in plan([100] * 1000, 30000)] == [250] * 4  # equal parts, not 300, 300, 300, 100
    assert plan([], 100) == []


@pytest.mark.usefixtures("own_products")
def test_classes_beyond_the_limit_are_not_multiplied() -> None:
    # A product with an infinite weight leaves NaN in d x even where the class has probability 0.
    arguments = case(400, 16, 4000, limits=(4000, 40))
    arguments.weight[126:] = float("inf")  # a block of classes that only the wide tokens concern
    nll, dx = gradients(linear_cross_entropy, arguments, CPP)[1:3]
    valid, wide = arguments.targets >= 0, arguments.vocab_limit == 4000
    assert nll[valid & wide].isnan().all()
    assert nll[valid & ~wide].isfinite().all()
    assert dx[valid & wide].isnan().any(1).all()
    touched = dx[valid & ~wide].isnan().any(1)
    assert touched.sum() < 16  # those that share a register with a wide token
    assert torch.equal(touched, touched.sort(descending=True).values)


def test_classes_beyond_the_limit_are_not_multiplied_in_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    flops = []
    mm = torch.mm

    def counting(a: torch.Tensor, b: torch.Tensor, **keywords: torch.Tensor) -> torch.Tensor:
        flops.append(a.shape[0] * a.shape[1] * b.shape[1])
        return mm(a, b, **keywords)

    arguments = case(400, 16, 4000, limits=(4000, 40), ignored=0.3, dtype=torch.float64)
    valid = arguments.targets >= 0
    exact = int(arguments.vocab_limit[valid].sum()) * 16
    monkeypatch.setattr(cpp.torch, "mm", counting)
    with torch.no_grad():
        linear_cross_entropy(*arguments[:3], vocab_limit=arguments.vocab_limit, backend="cpp")
    assert sum(flops) == exact


def test_chunks_of_every_kind_agree() -> None:
    # All tokens valid and in order (no gathering) against the same tokens ignored in between and shuffled.
    x, weight, targets, _, _ = case(200, 16, 300, ignored=0)
    straight = gradients(linear_cross_entropy, Case(x, weight, targets, None, None), CPP)
    spread = torch.full((400, 16), float("nan"))
    spread[::2] = x
    spread_targets = torch.full((400,), -100)
    spread_targets[::2] = targets
    scattered = gradients(linear_cross_entropy, Case(spread, weight, spread_targets, None, None), CPP)
    assert torch.equal(scattered[1][::2], straight[1])
    assert torch.equal(scattered[2][::2], straight[2])
    assert torch.equal(scattered[3], straight[3])
    # One token at a time.
    tiny = 400 * 48 + 300 * 4 + 6 * 16 * 4
    one = gradients(linear_cross_entropy, Case(x, weight, targets, None, None), CPP, max_workspace_bytes=tiny)
    for a, b in zip(one, straight, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
