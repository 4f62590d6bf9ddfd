"""Calls of ops: straight to the implementation, or through PyTorch's dispatcher where something watches."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from m4kernels import cross_modal_attention, linear_cross_entropy, quantize_coords
from m4kernels._library import Op
from m4kernels.cases import random_segments

XY, VISIBLE = torch.rand(2, 13, 2) * 256, torch.ones(2, 13, dtype=torch.bool)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def forbid_the_dispatcher(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("went through the dispatcher")

    monkeypatch.setattr(op, "_registered", refuse)


def test_an_unwatched_call_skips_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from m4kernels.ops.quantize_coords.api import _quantize_op

    expected = quantize_coords(XY, VISIBLE)
    forbid_the_dispatcher(_quantize_op, monkeypatch)
    assert torch.equal(quantize_coords(XY, VISIBLE), expected)


def test_a_dispatch_mode_sees_the_op() -> None:
    with Seen() as seen:
        quantize_coords(XY, VISIBLE)
    assert seen.ops[0] == "m4kernels.quantize_coords.default"


def test_a_profiler_sees_the_op() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as record:
        quantize_coords(XY, VISIBLE)
    assert "m4kernels::quantize_coords" in {event.key for event in record.key_averages()}


def test_meta_tensors_get_the_fake() -> None:
    tokens = quantize_coords(XY.to("meta"), VISIBLE.to("meta"))
    assert tokens.device.type == "meta"
    assert tokens.shape == (2, 39)


def test_a_lazily_negated_tensor_is_negated() -> None:
    negated = torch.complex(torch.zeros(2, 13, 2), -XY).conj().imag
    assert negated.is_neg()
    assert torch.equal(quantize_coords(negated, VISIBLE), quantize_coords(XY, VISIBLE))


def losses(weight: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 8, generator=g, dtype=torch.float64)
    return linear_cross_entropy(x, weight, torch.arange(20) % 7, backend="cpp").loss  # not PyTorch's, as for small ones


def attention(weight: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(0)
    segments = random_segments(3, (4, 5), g, empty=0)
    x = torch.randn(int(segments.cu_seqlens[-1]), 2, 8, generator=g, dtype=torch.float64) * weight[0]
    return cross_modal_attention(x, x, x, segments, segments).square().sum()


@pytest.mark.parametrize("function", [losses, attention])
def test_both_ways_give_the_same_bits(function: Any) -> None:
    weight = torch.randn(7, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    (direct,) = torch.autograd.grad(function(weight), weight)
    with Seen() as seen:
        (watched,) = torch.autograd.grad(function(weight), weight)
    assert any("m4kernels" in name for name in seen.ops)
    assert torch.equal(direct, watched)


@pytest.mark.parametrize("function", [losses, attention])
def test_both_ways_refuse_second_derivatives(function: Any) -> None:
    weight = torch.ones(7, 8, dtype=torch.float64, requires_grad=True)

    def twice() -> None:
        (first,) = torch.autograd.grad(function(weight), weight, create_graph=True)
        first.sum().backward()

    with pytest.raises((RuntimeError, NotImplementedError), match="second derivative"):
        twice()


def test_no_gradient_where_none_is_wanted() -> None:
    weight = torch.ones(7, 8, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        assert not losses(weight).requires_grad
    with torch.inference_mode():
        assert losses(weight).is_inference()
