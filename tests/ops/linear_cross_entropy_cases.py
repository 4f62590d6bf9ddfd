"""Arguments of linear_cross_entropy, and an independent formulation of it that holds whole logits."""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from m4kernels import LinearCrossEntropyOutput, linear_cross_entropy
from m4kernels.testing import assert_within_error_budget

T = TypeVar("T")


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    targets: Tensor
    token_weight: Tensor | None
    vocab_limit: Tensor | None

    def to(self, dtype: torch.dtype) -> "Case":
        return self._replace(x=self.x.to(dtype), weight=self.weight.to(dtype))

    def on(self, device: str) -> "Case":
        return Case(*(None if t is None else t.to(device) for t in self))


def case(
    tokens: int,
    dim: int,
    classes: int,
    *,
    ignored: float = 0.2,
    weighted: bool = False,
    limits: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Random arguments; `limits` are the vocabulary limits to choose from."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, dim, generator=g, dtype=torch.float64)
    weight = torch.randn(classes, dim, generator=g, dtype=torch.float64) * 3 / max(dim, 1) ** 0.5
    limit = torch.full((tokens,), classes)
    if limits:
        limit = torch.tensor(limits)[torch.randint(0, len(limits), (tokens,), generator=g)]
    targets = (torch.rand(tokens, generator=g, dtype=torch.float64) * limit).long()
    targets[torch.rand(tokens, generator=g) < ignored] = -100
    token_weight = torch.rand(tokens, generator=g) * 2 - 0.5 if weighted else None
    return Case(x.to(dtype), weight.to(dtype), targets, token_weight, limit if limits else None)


def whole_logits(arguments: Case, ignore_index: int = -100) -> LinearCrossEntropyOutput:
    """The definition, written with whole logits, one-hot targets and a class mask; in the dtype of x."""
    x, weight, targets, token_weight, vocab_limit = arguments
    valid = targets != ignore_index
    logits = x @ weight.T
    classes = torch.arange(weight.shape[0])
    if vocab_limit is not None:
        logits = logits.masked_fill((classes >= vocab_limit[:, None]) & valid[:, None], -torch.inf)
    onehot = classes == targets[:, None]
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    nll = -(log_p.masked_fill(~onehot, 0)).sum(1)
    if token_weight is None:
        token_weight = torch.full(targets.shape, 1 / max(int(valid.sum()), 1), dtype=torch.float64)
    loss = (nll * token_weight.to(nll.dtype) * valid).sum()
    return LinearCrossEntropyOutput(loss, nll.detach(), (log_p.argmax(1) == targets) & valid)


def gradients(
    run: object, arguments: Case, target: tuple[str, str] = ("", "cpu"), factor: float = 1.0, **options: object
) -> tuple[Tensor, ...]:
    """(loss, nll, d factor·loss / d x, d factor·loss / d weight, correct) on the CPU; of `whole_logits`, or of
    `linear_cross_entropy` by a (backend, device)."""
    backend, device = target
    arguments = arguments.on(device)
    x, weight = arguments.x.detach().requires_grad_(), arguments.weight.detach().requires_grad_()
    if run is whole_logits:
        out = whole_logits(arguments._replace(x=x, weight=weight))
    else:
        out = linear_cross_entropy(
            x, weight, arguments.targets, **keywords(arguments), backend=backend or None, **options
        )
    (out.loss * factor).backward()
    return tuple(t.cpu() for t in (out.loss.detach(), out.nll, x.grad, weight.grad, out.correct))


def keywords(arguments: Case) -> dict[str, Tensor | None]:
    return {"token_weight": arguments.token_weight, "vocab_limit": arguments.vocab_limit}


def small(target: tuple[str, str], full: T, reduced: T) -> T:
    """`reduced` where Triton's interpreter runs the kernels: some 2 ms a program, thus a token and kernel."""
    return reduced if target == ("triton", "cpu") else full


def assert_close_to_whole_logits(arguments: Case, target: tuple[str, str], **options: object) -> None:
    """Everything within the error budget of plain PyTorch; `correct` right wherever it is certain."""
    dtype = arguments.x.dtype
    truth = gradients(whole_logits, arguments.to(torch.float64), factor=0.7)
    plain = gradients(whole_logits, arguments, factor=0.7)
    actual = gradients(linear_cross_entropy, arguments, target, 0.7, **options)
    for name, a, p, t in zip(("loss", "nll", "dx", "dweight"), actual, plain, truth, strict=False):
        if dtype == torch.float64:  # the truth is no better than this
            torch.testing.assert_close(a, t, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert_within_error_budget(a, p, t, what=name)
    # Where the two largest logits differ by more than the arithmetic's error the verdict is certain.
    logits = arguments.x.double() @ arguments.weight.double().T
    classes = logits.shape[1]
    if arguments.vocab_limit is not None:
        logits.masked_fill_(torch.arange(classes) >= arguments.vocab_limit[:, None], -torch.inf)
    best = logits.topk(min(2, classes), dim=1).values
    # The CPU backends hold logits in float32; Triton rounds each to the dtype of x, by up to half its last place.
    error = 1e-4 if target[0] != "triton" else 1e-4 + torch.finfo(dtype).eps * best[:, 0].abs()
    certain = (best[:, 0] - best[:, -1] > error) | (classes == 1)
    assert certain.float().mean() > (0.6 if dtype == torch.bfloat16 else 0.8)
    assert torch.equal(actual[4][certain], truth[4][certain])
