"""quantize_coords: one pass over memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.device import backends
from benchmarks.measure import Run, Work
from benchmarks.suite import Case, Suite, test_guard, test_time  # noqa: F401
from m4kernels import quantize_coords


class Joints(NamedTuple):
    xy: Tensor  # (B, 13, 2)
    visible: Tensor  # (B, 13)
    scale: Tensor  # (B, 2)
    offset: Tensor  # (B, 2)


def joints(samples: int) -> Joints:
    g = torch.Generator().manual_seed(0)
    xy = torch.rand(samples, 13, 2, generator=g) * 300
    return Joints(
        xy,
        torch.rand(samples, 13, generator=g) < 0.78,
        torch.rand(samples, 2, generator=g) + 0.5,
        torch.rand(samples, 2, generator=g),
    )


def work(inputs: Joints) -> Work:
    samples = inputs.xy.shape[0]
    return Work(
        samples * (13 * (8 + 1 + 24) + 16), "B", "bytes = samples x (13 joints x (8 xy + 1 visible + 24 tokens) + 16)"
    )


def provider(backend: str) -> Callable[[Joints], Run]:
    def prepare(inputs: Joints) -> Run:
        return lambda: quantize_coords(*inputs, backend=backend)

    return prepare


BACKENDS = backends("quantize_coords")
SUITE = Suite(
    "quantize_coords",
    {
        "M4 batch 96": Case(lambda: joints(96), work, gpu=True),
        "1 sample": Case(lambda: joints(1), work),
        "100,000 samples": Case(lambda: joints(100_000), work, gpu=True),
        "1,000,000 samples": Case(lambda: joints(1_000_000), work, full=True, gpu=True),
    },
    {name: provider(name) for name in BACKENDS},
    guards=tuple((name, "reference") for name in BACKENDS[:-1]),
)
