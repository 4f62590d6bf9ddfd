"""linear_cross_entropy, forward and backward: three matrix products and one pass over the logits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.device import ON_GPU, backends
from benchmarks.measure import Run, Work
from benchmarks.peers import installed, whole_logits
from benchmarks.suite import Case, Suite, test_guard, test_time  # noqa: F401
from m4.model.m4 import loss_workspace
from m4kernels import linear_cross_entropy

PADDED_SHARE = 95 / 256  # of the decoder's 256 slots a sample that hold a target, in M4


class Tokens(NamedTuple):
    x: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (T,)
    vocab_limit: Tensor | None  # (T,)


def tokens(count: int, dim: int, classes: int, *, ignored: float = 0.0, limits: tuple[int, ...] = ()) -> Tokens:
    g = torch.Generator().manual_seed(0)
    limit = torch.full((count,), classes)
    if limits:
        limit = torch.tensor(limits)[torch.randint(0, len(limits), (count,), generator=g)]
    targets = (torch.rand(count, generator=g, dtype=torch.float64) * limit).long()
    targets[torch.rand(count, generator=g) < ignored] = -100
    return Tokens(
        torch.randn(count, dim, generator=g).requires_grad_(),
        (torch.randn(classes, dim, generator=g) * 0.02).requires_grad_(),
        targets,
        limit if limits else None,
    )


def work(inputs: Tokens) -> Work:
    limit = (
        torch.full_like(inputs.targets, inputs.weight.shape[0]) if inputs.vocab_limit is None else inputs.vocab_limit
    )
    pairs = int(limit[inputs.targets >= 0].sum())
    return Work(6 * inputs.x.shape[1] * pairs, "FLOP", "FLOP = 6 x D x (sum of the valid tokens' classes)")


def trained(inputs: Tokens, loss: Callable[[], Tensor]) -> Run:
    def run() -> None:
        loss().backward()
        inputs.x.grad = inputs.weight.grad = None

    return run


def ours(backend: str) -> Callable[[Tokens], Run]:
    def prepare(inputs: Tokens) -> Run:
        x, weight, targets, limit = inputs
        return trained(
            inputs, lambda: linear_cross_entropy(x, weight, targets, vocab_limit=limit, backend=backend).loss
        )

    return prepare


def as_trained(inputs: Tokens) -> Run:
    """As the trainer calls it in bf16: x and weight are float32, which autocast rounds; the model's workspace."""
    x, weight = (tensor.detach().float().requires_grad_() for tensor in inputs[:2])
    arguments: dict[str, Any] = {
        "token_weight": torch.full(x.shape[:1], 1 / len(x), device=x.device),
        "vocab_limit": inputs.vocab_limit,
        "max_workspace_bytes": loss_workspace(x.device),
    }

    def loss() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return linear_cross_entropy(x, weight, inputs.targets, **arguments).loss

    return trained(inputs._replace(x=x, weight=weight), loss)


def padded(inputs: Tokens) -> Run:
    slots = round(inputs.x.shape[0] / PADDED_SHARE)
    x = inputs.x.new_empty(slots, inputs.x.shape[1]).normal_()
    x[: inputs.x.shape[0]] = inputs.x.detach()
    x.requires_grad_()
    targets = inputs.targets.new_full((slots,), -100)
    targets[: inputs.x.shape[0]] = inputs.targets

    def run() -> None:
        whole_logits.padded(x, inputs.weight, targets).backward()
        x.grad = inputs.weight.grad = None

    return run


def peer(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tokens], Run]:
    def prepare(inputs: Tokens) -> Run:
        run = trained(inputs, lambda: loss(inputs.x, inputs.weight, inputs.targets))
        if ON_GPU:
            run()  # one that is absent says so here
        return run

    return prepare


BACKENDS = backends("linear_cross_entropy")
FREE = "auto"  # where nobody names a backend, small losses are PyTorch's operators
BASELINES: tuple[str, ...] = ("reference", "whole logits packed", "whole logits padded")
if ON_GPU:
    BASELINES += ("whole logits compiled",)
elif hasattr(torch.nn.functional, "linear_cross_entropy"):  # torch 2.13
    BASELINES += ("F.linear_cross_entropy",)
GPU_PEERS = {
    "whole logits compiled": lambda *inputs: whole_logits.compiled()(*inputs),
    "Liger": installed.liger,
    "CCE": installed.cce,
}
TINY = "tiny (32 x 16 x 100)"
WITHOUT_LIMITS = ("F.linear_cross_entropy", *GPU_PEERS)

CASES = {
    "M4, 384 tokens": Case(lambda: tokens(384, 640, 65536), work, gpu=True),
    "small (256 x 128 x 1,000)": Case(lambda: tokens(256, 128, 1000), work, without=("whole logits padded",)),
    "sparse (limits, ignored)": Case(
        lambda: tokens(384, 640, 65536, ignored=0.4, limits=(65536, 8192)),
        work,
        without=("whole logits padded", *WITHOUT_LIMITS),
    ),
    "limits (9,120, 65,536 and 8,192 classes)": Case(
        lambda: tokens(9120, 640, 65536, limits=(65536, 8192)),
        work,
        without=("whole logits padded", *WITHOUT_LIMITS),
        gpu=True,
        cpu=False,
    ),
    "M4 batch 96 (9,120 tokens)": Case(
        lambda: tokens(9120, 640, 65536), work, without=("whole logits padded",), full=True, gpu=True
    ),
    TINY: Case(lambda: tokens(32, 16, 100), work, without=("whole logits padded",)),
    "32 tokens": Case(lambda: tokens(32, 640, 65536), work, full=True),
    "few classes (9,120 x 640 x 64)": Case(
        lambda: tokens(9120, 640, 64), work, without=("whole logits padded",), full=True
    ),
}

SUITE = Suite(
    "linear_cross_entropy",
    {name: case if name == TINY else replace(case, without=(FREE, *case.without)) for name, case in CASES.items()},
    {name: ours(name) for name in (FREE, *BACKENDS)}
    | {
        "whole logits packed": lambda i: trained(i, lambda: whole_logits.packed(*i)),
        "whole logits padded": padded,
        "F.linear_cross_entropy": peer(installed.torch_linear_cross_entropy),
    }
    # Its weight is rounded in every run, which takes reading 4 bytes an entry and writing 2 more than the others do.
    | ({"as trained": as_trained} | {name: peer(loss) for name, loss in GPU_PEERS.items()} if ON_GPU else {}),
    guards=tuple((name, baseline) for name in (FREE, *BACKENDS[:-1]) for baseline in BASELINES),
    dtype=torch.bfloat16,
)
