"""Copies of weights in bfloat16: rounded once a step, never out of date."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from m4kernels import linear
from m4kernels.ops.linear import copies


@pytest.fixture(autouse=True)
def outside_a_step() -> Iterator[None]:
    yield
    copies.end()


def run(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The result and the gradient of x."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, backend="cpp")
    y.float().square().sum().backward()
    return y.detach(), x.grad


def weight_and_x() -> tuple[nn.Parameter, Tensor]:
    g = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(40, 24, generator=g)), torch.randn(70, 24, generator=g)


def test_the_same_bits_as_without() -> None:
    weight, x = weight_and_x()
    without = run(x, weight)
    copies.begin()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(run(x, weight), without, strict=True))


def test_rounded_once_a_step() -> None:
    weight, _ = weight_and_x()
    assert copies.rounded(weight) is weight  # outside a step
    copies.begin()
    copy = copies.rounded(weight)
    assert copy.dtype == torch.bfloat16
    assert copies.rounded(weight) is copy
    with torch.no_grad():
        weight.data.mul_(2)  # which no version counter tells: that is why a step ends
    copies.end()
    assert copies.rounded(weight) is weight
    copies.begin()
    assert copies.rounded(weight) is copy  # its memory
    assert torch.equal(copy, weight.bfloat16())


def test_a_change_within_a_step_is_seen() -> None:
    weight, x = weight_and_x()
    copies.begin()
    run(x, weight)
    with torch.no_grad():
        weight.add_(1)
    changed = run(x, weight)
    weight.data = torch.randn(40, 24)
    replaced = run(x, weight)
    copies.end()
    assert all(torch.equal(a, b) for a, b in zip(replaced, run(x, weight), strict=True))
    assert not torch.equal(changed[0], replaced[0])


def test_only_parameters_are_copied_and_only_while_they_live() -> None:
    weight, x = weight_and_x()
    before = copies.held()
    copies.begin()
    assert copies.rounded(weight.detach()).dtype == torch.float32
    assert copies.rounded(weight * 1).dtype == torch.float32
    half = nn.Parameter(weight.detach().bfloat16())
    assert copies.rounded(half) is half
    assert copies.held() == before
    run(x, weight)
    assert copies.held() == before + weight.numel() * 2
    del weight, half
    gc.collect()
    assert copies.held() == before
