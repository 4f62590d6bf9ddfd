"""A norm with what surrounds it, forward and backward: the sum before it, the rounding after it, as in M4's trunk.

The residual stream is float32, what a layer adds to it and what the next one reads bfloat16.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.device import ON_GPU, backends
from benchmarks.measure import Run, Work
from benchmarks.suite import Case, Suite, test_guard, test_time  # noqa: F401
from m4kernels import add_layer_norm, layer_norm

DIM, EPS = 640, 1e-6


class Rows(NamedTuple):
    x: Tensor  # (T, D) float32
    update: Tensor | None  # (T, D) bfloat16
    weight: Tensor  # (D,)
    grad: Tensor  # (T, D) bfloat16, of the normed rows
    grad_total: Tensor | None  # (T, D) float32, of x + update


def rows(tokens: int, *, added: bool) -> Rows:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    update = draw(tokens, DIM).bfloat16().requires_grad_() if added else None
    weight = (1 + 0.1 * draw(DIM)).requires_grad_()
    grad_total = draw(tokens, DIM) if added else None
    return Rows(draw(tokens, DIM).requires_grad_(), update, weight, draw(tokens, DIM).bfloat16(), grad_total)


def work(inputs: Rows) -> Work:
    if inputs.update is None:
        return Work(16 * inputs.x.numel(), "B", "B = (6 + 10) x T x D, forward and backward")
    return Work(28 * inputs.x.numel(), "B", "B = (12 + 16) x T x D, forward and backward")


Function = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]


def in_pytorch(x: Tensor, update: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x if update is None else x + update
    return F.layer_norm(total, weight.shape, weight, None, EPS).bfloat16(), total


def ours(backend: str) -> Function:
    def run(x: Tensor, update: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        if update is None:
            return layer_norm(x, weight, eps=EPS, out_dtype=torch.bfloat16, backend=backend), x
        return add_layer_norm(x, update, weight, eps=EPS, out_dtype=torch.bfloat16, backend=backend)

    return run


def trained(function: Function) -> Callable[[Rows], Run]:
    def prepare(inputs: Rows) -> Run:
        x, update, weight, grad, grad_total = inputs
        leaves = [leaf for leaf in (x, update, weight) if leaf is not None]

        def run() -> None:
            normed, total = function(x, update, weight)
            if grad_total is None:
                torch.autograd.grad(normed, leaves, grad)
            else:
                torch.autograd.grad([normed, total], leaves, [grad, grad_total])

        return run

    return prepare


OWN = backends("layer_norm")
PROVIDERS = {name: trained(ours(name)) for name in OWN} | {"F.layer_norm": trained(in_pytorch)}
if ON_GPU:
    PROVIDERS["F.layer_norm, compiled"] = trained(torch.compile(in_pytorch))

SUITE = Suite(
    "layer_norm",
    {
        "M4, 4 samples": Case(partial(rows, 552, added=True), work),
        "M4, 96 samples": Case(partial(rows, 13_248, added=True), work, full=True, gpu=True),
        "M4, 96 samples, nothing added": Case(partial(rows, 13_248, added=False), work, full=True, gpu=True),
    },
    PROVIDERS,
    guards=tuple((name, "F.layer_norm") for name in OWN[:-1]),
)
