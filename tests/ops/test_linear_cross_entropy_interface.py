"""linear_cross_entropy: what it refuses, and how it is registered with PyTorch."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from m4kernels import LinearCrossEntropyOutput, linear_cross_entropy
from tests.ops.linear_cross_entropy_cases import Case, case, keywords
from tests.ops.targets import targets as on

TARGETS = on("cpp", "reference", "triton")
everywhere = pytest.mark.parametrize("target", TARGETS)
Target = tuple[str, str]

BAD_STRUCTURE = [
    (dict(x=torch.zeros(4, 3, 2)), r"x must have shape \(T, D\), got \(4, 3, 2\)"),
    (dict(weight=torch.zeros(8)), r"weight must have shape \(V, D\), got \(8,\)"),
    (dict(weight=torch.zeros(8, 5)), "x has D = 6, weight has D = 5"),
    (dict(weight=torch.zeros(0, 6)), "at least one class"),
    (dict(weight=torch.zeros(8, 6).double()), "x is torch.float32, weight torch.float64; expected the same dtype"),
    (dict(x=torch.zeros(4, 6, dtype=torch.int64)), "x must be floating, got torch.int64"),
    (dict(targets=torch.zeros(5, dtype=torch.int64)), r"targets must have shape \(4,\), got \(5,\)"),
    (dict(targets=torch.zeros(4)), "targets must be torch.int64, got torch.float32"),
    (dict(vocab_limit=torch.ones(4)), "vocab_limit must be torch.int32 or torch.int64"),
    (dict(vocab_limit=torch.ones(3, dtype=torch.int32)), r"vocab_limit must have shape \(4,\), got \(3,\)"),
    (dict(token_weight=torch.ones(4, 1)), r"token_weight must have shape \(4,\), got \(4, 1\)"),
    (dict(token_weight=torch.ones(4, dtype=torch.int64)), "token_weight must be floating"),
    (dict(token_weight=torch.ones(4, requires_grad=True)), "token_weight requires grad.*detach it"),
    (dict(max_workspace_bytes=-1), "max_workspace_bytes is -1, but 4 tokens"),
    (dict(weight=torch.zeros(8, 6, device="meta")), "weight is on meta, x on .*; expected one device"),
]
BAD_VALUES = [
    (dict(targets=torch.tensor([0, 1, 8, 9])), r"targets\[2\] is 8; expected 0 <= target < 8 .*or -100 to ignore it"),
    (dict(targets=torch.tensor([0, -1, 0, 0])), r"targets\[1\] is -1"),
    (dict(vocab_limit=torch.tensor([8, 8, 8, 3])), r"targets\[3\] is 5; expected 0 <= target < 3"),
    (dict(vocab_limit=torch.tensor([8, 9, 8, 8])), r"vocab_limit\[1\] is 9, but weight has only 8 classes"),
    (dict(vocab_limit=torch.tensor([8, 0, 8, 8])), r"targets\[1\] is 1; expected 0 <= target < 0"),
]


def call(change: dict, target: Target) -> None:
    backend, device = target
    arguments = dict(x=torch.zeros(4, 6), weight=torch.zeros(8, 6), targets=torch.tensor([0, 1, 2, 5])) | change
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.device.type == "cpu":
            arguments[name] = value.detach().to(device).requires_grad_(value.requires_grad)
    linear_cross_entropy(**arguments, backend=backend)


@pytest.mark.parametrize(("change", "message"), BAD_STRUCTURE)
@everywhere
def test_bad_structure(change: dict, message: str, target: Target) -> None:
    with pytest.raises(ValueError, match=message):
        call(change, target)


@pytest.mark.parametrize(("change", "message"), BAD_VALUES)
@pytest.mark.parametrize("target", [target for target in TARGETS if target.values[0][1] == "cpu"])
def test_bad_values(change: dict, message: str, target: Target) -> None:
    with pytest.raises(ValueError, match=message):
        call(change, target)


# The assertion ends the CUDA context, so it needs a process of its own.
OUT_OF_RANGE = """
import sys, torch, m4kernels
x, weight = torch.zeros(4, 16, device="cuda"), torch.zeros(8, 16, device="cuda")
limit = torch.tensor([8, 8, int(sys.argv[2]), 8], device="cuda")
targets = torch.tensor([0, 1, int(sys.argv[1]), -100], device="cuda")
out = m4kernels.linear_cross_entropy(x, weight, targets, vocab_limit=limit, backend=sys.argv[3])
torch.cuda.synchronize()
print(out.loss.item())
"""


@pytest.mark.parametrize("target", [target for target in on("reference", "triton") if target.values[0][1] == "cuda"])
@pytest.mark.parametrize(("value", "limit"), [(8, 8), (-1, 8), (5, 5), (3, 9)])
def test_bad_values_trip_an_assertion_on_the_device(value: int, limit: int, target: Target) -> None:
    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", OUT_OF_RANGE, *map(str, arguments), target[0]]
        return subprocess.run(command, capture_output=True, text=True)

    assert run(3, 8).returncode == 0
    done = run(value, limit)
    assert done.returncode != 0
    assert "linear_cross_entropy: a target is outside [0, vocab_limit)" in done.stdout + done.stderr


@everywhere
def test_opcheck(target: Target) -> None:
    backend, device = target
    for limits in ((), (11, 4)):
        x, weight, targets, token_weight, vocab_limit = case(9, 5, 11, weighted=bool(limits), limits=limits).on(device)
        for x_grad, weight_grad in ((True, True), (True, False), (False, False)):
            arguments = (
                x.clone().requires_grad_(x_grad),
                weight.clone().requires_grad_(weight_grad),
                targets,
                token_weight,
                vocab_limit,
                -100,
                2**28,
                None,
                x_grad,
                weight_grad,
                backend,
            )
            torch.library.opcheck(torch.ops.m4kernels.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize("autocast", [False, True])
@everywhere
def test_compiles_without_graph_break(autocast: bool, target: Target) -> None:
    backend, device = target

    def loss(x: Tensor, arguments: Case) -> LinearCrossEntropyOutput:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return linear_cross_entropy(
                x * 2, arguments.weight, arguments.targets, **keywords(arguments), backend=backend
            )

    torch._dynamo.reset()  # the tests share a code object, and its graphs are limited in number
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    arguments = case(21, 6, 40, weighted=True, limits=(40, 8)).on(device)
    results = []
    for run in (loss, compiled):
        x, weight = arguments.x.clone().requires_grad_(), arguments.weight.clone().requires_grad_()
        out = run(x, arguments._replace(weight=weight))
        (out.loss * 3).backward()
        results.append((*out, x.grad, weight.grad))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)
    with torch.no_grad():
        assert torch.equal(compiled(arguments.x, arguments).loss, results[0][0])
