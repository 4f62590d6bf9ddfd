"""One step of AdamW with clipping's factor: seven numbers an element pass between memory and the processor."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.device import backends
from benchmarks.measure import Run, Work
from benchmarks.suite import Case, Suite, test_guard, test_time  # noqa: F401
from m4kernels import adamw_step

SETTINGS: dict[str, Any] = {"lr": 1e-5, "eps": 1e-8, "weight_decay": 0.05}
BETA1, BETA2 = 0.9, 0.95


class Tensors(NamedTuple):
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    factor: Tensor  # () what clipping multiplies gradients by


def tensors(*shapes: tuple[int, ...]) -> Tensors:
    g = torch.Generator().manual_seed(0)

    def draw(scale: float) -> list[Tensor]:
        return [torch.randn(shape, generator=g) * scale for shape in shapes]

    squares = [x * x for x in draw(1e-2)]
    steps = [torch.tensor(100.0) for _ in shapes]
    # A factor so near to 1 that the gradients, which clipping on its own scales in place, keep their size.
    return Tensors(draw(1.0), draw(1e-2), draw(1e-3), squares, steps, torch.tensor(1 - 2**-20))


def work(inputs: Tensors) -> Work:
    amount = 28 * sum(p.numel() for p in inputs.params)
    return Work(amount, "B", "B = 28 x parameters (4 numbers read, 3 written)")


def ours(backend: str) -> Callable[[Tensors], Run]:
    def prepare(inputs: Tensors) -> Run:
        *lists, factor = inputs
        return lambda: adamw_step(*lists, betas=(BETA1, BETA2), **SETTINGS, grad_factor=factor, backend=backend)

    return prepare


def torch_fused(inputs: Tensors) -> Run:
    """torch's clipping and fused AdamW."""
    parameters = [torch.nn.Parameter(p) for p in inputs.params]
    for parameter, grad in zip(parameters, inputs.grads, strict=True):
        parameter.grad = grad
    optimizer = torch.optim.AdamW(parameters, betas=(BETA1, BETA2), fused=True, **SETTINGS)
    norm = torch.tensor(1.0)

    def run() -> None:
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0 - 2**-20, norm)
        optimizer.step()

    return run


MATRICES = ((640, 1920), (640, 640), (2560, 640), (640, 2560))  # of one block of M4's encoder
BACKENDS = backends("adamw_step", torch.device("cpu"))

SUITE = Suite(
    "adamw_step",
    {
        "a block (4.9 M)": Case(lambda: tensors(*MATRICES), work),
        "M4's vocabulary (84 M)": Case(lambda: tensors((65536, 640), (65536, 640)), work, full=True),
        "500 small ones": Case(lambda: tensors(*[(96,)] * 500), work, full=True),
    },
    {name: ours(name) for name in BACKENDS} | {"clip, fused AdamW": torch_fused},
    guards=tuple((name, other) for name in BACKENDS[:-1] for other in ("reference", "clip, fused AdamW")),
)
