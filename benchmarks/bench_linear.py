"""linear, forward and backward: the trunk's layers at M4's shapes, three matrix products each.

Everybody does the work of one layer with what surrounds it: GELU before the product where the model has it, a residual
after it. Rows are the mean tokens of 4 and of 16 samples in the encoder.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.device import ON_GPU, backends, require_bf16
from benchmarks.measure import Run, Work
from benchmarks.peers.onednn import linear_onednn
from benchmarks.suite import Case, Suite, test_guard, test_time  # noqa: F401
from m4kernels import linear

DIM, HIDDEN = 640, 2560


class Layer(NamedTuple):
    x: Tensor  # (T, K)
    weight: Tensor  # (N, K)
    residual: Tensor | None  # (T, N)
    grad: Tensor  # (T, N), of the result
    gelu: bool


def layer(rows: int, depth: int, columns: int, *, gelu: bool = False, residual: bool = False) -> Layer:
    g = torch.Generator().manual_seed(0)
    return Layer(
        torch.randn(rows, depth, generator=g).requires_grad_(),
        (torch.randn(columns, depth, generator=g) * 0.02).requires_grad_(),
        torch.randn(rows, columns, generator=g).requires_grad_() if residual else None,
        torch.randn(rows, columns, generator=g),
        gelu,
    )


def work(inputs: Layer) -> Work:
    return Work(6 * inputs.x.numel() * inputs.weight.shape[0], "FLOP", "FLOP = 3 products x 2 x T x K x N")


Function = Callable[[Layer], Tensor]


def trained(function: Function, *, bf16: bool = False) -> Callable[[Layer], Run]:
    def prepare(inputs: Layer) -> Run:
        if bf16:
            require_bf16()

        def run() -> None:
            with torch.autocast(inputs.x.device.type, torch.bfloat16, enabled=bf16):
                y = function(inputs)
            y.backward(inputs.grad.to(y.dtype))
            for leaf in (inputs.x, inputs.weight, inputs.residual):
                if leaf is not None:
                    leaf.grad = None

        return run

    return prepare


def ours(backend: str) -> Function:
    return lambda i: linear(i.x, i.weight, residual=i.residual, gelu=i.gelu, backend=backend)


def with_product(product: Callable[[Tensor, Tensor], Tensor]) -> Function:
    def run(inputs: Layer) -> Tensor:
        y = product(F.gelu(inputs.x) if inputs.gelu else inputs.x, inputs.weight)
        return y if inputs.residual is None else y + inputs.residual

    return run


OWN = backends("linear")[:-1]
PROVIDERS = {name: trained(ours(name)) for name in OWN} | {f"{n}, bf16": trained(ours(n), bf16=True) for n in OWN}
PROVIDERS |= {"F.linear": trained(with_product(F.linear)), "F.linear, bf16": trained(with_product(F.linear), bf16=True)}
if not ON_GPU:
    PROVIDERS["oneDNN"] = trained(with_product(linear_onednn))


def shapes(samples: int, *, full: bool = False) -> dict[str, Case]:
    rows = 138 * samples
    return {
        f"{name}, {samples} samples": Case(partial(layer, rows, *shape, **more), work, full=full)
        for name, shape, more in (
            ("qkv", (DIM, 3 * DIM), {}),
            ("projection", (DIM, DIM), {"residual": True}),
            ("fc1", (DIM, HIDDEN), {}),
            ("fc2", (HIDDEN, DIM), {"gelu": True, "residual": True}),
        )
    }


SUITE = Suite(
    "linear",
    shapes(4)
    | shapes(16, full=True)
    | {"M4-tiny fc2, 32 samples": Case(lambda: layer(6400, 384, 96, gelu=True, residual=True), work)},
    PROVIDERS,
    guards=tuple((name, baseline) for name in OWN for baseline in ("F.linear", "oneDNN"))
    + tuple((f"{name}, bf16", "F.linear, bf16") for name in OWN),
    dtype=torch.float32,
)
