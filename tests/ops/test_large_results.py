"""Memory of large results, used again: only once nobody holds them, within bounds, poisoned like fresh memory."""

import copy
import threading

import pytest
import torch

from m4kernels import _memory, linear_cross_entropy, quantize_coords

ROW = 1024
ROWS = _memory.SMALLEST // (4 * ROW)  # of float32, the fewest that are kept


@pytest.fixture(autouse=True)
def nothing_kept():
    _memory.release()
    yield
    _memory.release()


def large(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return _memory.empty((rows, ROW), dtype)


def test_memory_comes_back_once_nobody_holds_it() -> None:
    first = large()
    place = first.data_ptr()
    assert first.isnan().all()  # poisoned, as tests want fresh memory to be
    for holder in (lambda x: x[3:], lambda x: x.numpy(), lambda x: x.detach(), torch.nn.Parameter, lambda x: x.T):
        held = holder(first)
        del first
        other = large()
        assert other.data_ptr() != place
        del other, held
        _memory.release()
        first = large()
        place = first.data_ptr()
        first.fill_(7)
    del first
    again = large()
    assert again.data_ptr() == place
    assert again.isnan().all()
    assert (again.shape, again.stride(), again.is_contiguous()) == ((ROWS, ROW), (ROW, 1), True)


def test_other_shapes_and_dtypes_that_fit() -> None:
    first = large(2 * ROWS)
    place = first.data_ptr()
    del first
    smaller = _memory.empty((ROWS // 2, 2, ROW // 2), torch.int64)
    assert smaller.data_ptr() == place
    assert (smaller == torch.iinfo(torch.int64).max).all()
    del smaller
    larger = large(3 * ROWS)  # it takes the place of what is kept, which it does not fit
    assert [storage.nbytes() for storage in _memory._kept] == [larger.nbytes]


def test_small_and_huge_ones_are_not_kept() -> None:
    for shape in ((ROWS - 1, ROW), (0, ROW)):
        assert _memory.empty(shape, torch.float32).shape == shape
    huge = torch.Size((_memory.LARGEST // (4 * ROW) + 1, ROW))
    assert _memory.empty(huge, torch.float32).shape == huge
    assert _memory._kept == []


def test_no_more_than_a_few_are_kept() -> None:
    held = [large() for _ in range(_memory.MOST + 2)]
    assert len(_memory._kept) == _memory.MOST
    assert len({x.data_ptr() for x in held}) == len(held)
    del held
    again = [large() for _ in range(_memory.MOST)]
    assert len({x.data_ptr() for x in again}) == _memory.MOST


def test_memory_that_other_processes_see_is_left_alone() -> None:
    first = large()
    first.share_memory_()
    place = first.data_ptr()
    del first
    assert large().data_ptr() != place


def test_threads_never_share() -> None:
    errors = []

    def work(number: float) -> None:
        for _ in range(5):
            mine = large()
            mine[::512] = number
            if not (mine[::512] == number).all():
                errors.append(number)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_results_that_are_held_stay_as_they_are() -> None:
    """Of the ops that take memory here; gradients, too, while a leaf or a graph has them."""
    g = torch.Generator().manual_seed(0)
    xy, visible = torch.rand(2 * _memory.SMALLEST // 312 + 1, 13, 2, generator=g) * 256, None
    visible = torch.ones(xy.shape[:-1], dtype=torch.bool)
    tokens = quantize_coords(xy, visible, backend="cpp")
    kept = tokens.clone()
    other = quantize_coords(256 - xy, visible, backend="cpp")
    assert torch.equal(tokens, kept)
    assert not torch.equal(tokens, other)

    weight = (torch.randn(ROWS, ROW, generator=g) * 0.02).requires_grad_()
    x = torch.randn(3, ROW, generator=g)
    gradients = []
    for target in (0, 1, 0):
        linear_cross_entropy(x, weight, torch.full((3,), target), backend="cpp").loss.backward()
        gradients.append((weight.grad, copy.deepcopy(weight.grad)))
        weight.grad = None
    assert all(torch.equal(held, copied) for held, copied in gradients)
    assert torch.equal(gradients[0][0], gradients[2][0])
    assert not torch.equal(gradients[0][0], gradients[1][0])
    place = gradients[0][0].data_ptr()
    del gradients
    linear_cross_entropy(x, weight, torch.zeros(3, dtype=torch.int64), backend="cpp").loss.backward()
    assert len(_memory._kept) <= _memory.MOST
    assert any(storage.data_ptr() == weight.grad.data_ptr() for storage in _memory._kept), place
