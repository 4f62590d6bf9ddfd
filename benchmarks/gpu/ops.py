"""Every backend of every op once, at M4's shapes, against the reference in float64.

The ops are those that the package has. For one that has no inputs here its benchmark's are run, if there is one: then
it is known to run, not what it computes. The tests hold the precise error budgets, at all kinds of shapes; here a
result passes that errs no more than four times as much as PyTorch does in the same dtype.
"""

import importlib
import importlib.util
import pkgutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import m4kernels.ops
from benchmarks import bench_adamw_step, bench_layer_norm, bench_linear
from benchmarks.bench_cross_modal_attention import Layer, layer
from benchmarks.bench_linear_cross_entropy import Tokens, tokens
from benchmarks.bench_mask_tokens import Samples, samples
from benchmarks.bench_quantize_coords import Joints, joints
from benchmarks.device import DEVICE, ON_GPU, backends, moved
from benchmarks.gpu.folder import Folder
from benchmarks.results import machine
from m4kernels import (
    adamw_step,
    add_layer_norm,
    cross_modal_attention,
    cross_modal_attention_kvpacked,
    cross_modal_attention_qkvpacked,
    dequantize_coords,
    embedding,
    linear,
    linear_cross_entropy,
    mask_tokens,
    quantize_coords,
)
from m4kernels.cases import M4_MASKING
from m4kernels.testing import assert_within_error_budget

FACTOR, FLOOR = 4.0, 16.0  # of the error budget
HALF, SINGLE = torch.bfloat16, torch.float32


class Check(NamedTuple):
    """What to run of an op.

    Args:
        name: of the inputs.
        build: makes them, in float32 or of integers, on the CPU.
        run: (inputs, backend) → what it computes, gradients included.
        dtypes: of the floating inputs; none: only integers are compared, which must be equal.
        largest: of the inputs in 16 bits, the largest number that a backend may round to 16 bits and the reference does
            not, of which the first result is a difference of two: that far it may err further. Default: none.
    """

    name: str
    build: Callable[[], Any]
    run: Callable[[Any, str], Sequence[Tensor]]
    dtypes: tuple[torch.dtype, ...] = ()
    largest: Callable[[Any], float] = lambda inputs: 0.0


def _differentiated(out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """`out` and the gradients of the leaves for a gradient of ones."""
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def _quantize(inputs: Joints, backend: str) -> list[Tensor]:
    found = quantize_coords(*inputs, backend=backend)
    return [found, *dequantize_coords(found, backend=backend)]


def _mask(inputs: Samples, backend: str) -> Sequence[Tensor]:
    return mask_tokens(inputs.tokens, inputs.spec, seed=1, sample_ids=inputs.sample_ids, backend=backend).tensors()


def _attention(inputs: Layer, backend: str) -> list[Tensor]:
    q, k, v, q_segments, k_segments, allow, _ = inputs
    out = cross_modal_attention(q, k, v, q_segments, k_segments, allow=allow, backend=backend)
    return _differentiated(out, (q, k, v))


def _packed_attention(inputs: Layer, backend: str) -> list[Tensor]:
    """As the model's layers call it: the gradients are one tensor a projection, joined here from three leaves."""
    q, k, v, q_segments, k_segments, allow, _ = inputs
    if q_segments is k_segments:
        qkv = torch.stack((q, k, v), 1)
        out = cross_modal_attention_qkvpacked(qkv, q_segments, allow=allow, backend=backend)
    else:
        kv = torch.stack((k, v), 1)
        out = cross_modal_attention_kvpacked(q, kv, q_segments, k_segments, allow=allow, backend=backend)
    return _differentiated(out, (q, k, v))


def _loss(inputs: Tokens, backend: str) -> list[Tensor]:
    out = linear_cross_entropy(inputs.x, inputs.weight, inputs.targets, vocab_limit=inputs.vocab_limit, backend=backend)
    return [out.nll.detach(), *_differentiated(out.loss, (inputs.x, inputs.weight))]


def _largest_logit(inputs: Tokens) -> float:
    """Whole logits are kept in the dtype of the operands; a token's loss is one of them less the log of a sum."""
    with torch.no_grad():
        return (inputs.x @ inputs.weight.T).abs().max().item()


def _linear(inputs: bench_linear.Layer, backend: str) -> list[Tensor]:
    out = linear(inputs.x, inputs.weight, residual=inputs.residual, gelu=inputs.gelu, backend=backend)
    leaves = [x for x in (inputs.x, inputs.weight, inputs.residual) if x is not None]
    return _differentiated(out, leaves)


def _adamw(inputs: bench_adamw_step.Tensors, backend: str) -> list[Tensor]:
    *lists, factor = inputs
    params, grads, first, second, steps = ([x.clone() for x in some] for some in lists)
    settings, betas = bench_adamw_step.SETTINGS, (bench_adamw_step.BETA1, bench_adamw_step.BETA2)
    adamw_step(
        params, grads, first, second, [s.float() for s in steps], betas=betas, **settings,
        grad_factor=factor.float(), backend=backend,
    )  # fmt: skip
    return [*params, *first, *second]


def _norm(inputs: bench_layer_norm.Rows, backend: str) -> list[Tensor]:
    x, update, weight, grad, grad_total = inputs
    assert update is not None
    out = add_layer_norm(x, update, weight, eps=bench_layer_norm.EPS, backend=backend)
    leaves = (x, update, weight)
    return [*(y.detach() for y in out), *torch.autograd.grad(out, leaves, (grad.to(out[0].dtype), grad_total))]


class Looked(NamedTuple):
    weight: Tensor
    ids: Tensor


def _looked(rows: int, count: int) -> Looked:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, rows, (count,), generator=g)
    return Looked(torch.randn(rows, 640, generator=g).requires_grad_(), ids % torch.tensor(max(1, rows // 2)))


def _embedding(inputs: Looked, backend: str) -> list[Tensor]:
    return _differentiated(embedding(inputs.weight, inputs.ids, backend=backend), [inputs.weight])


def checks(*, small: bool) -> dict[str, list[Check]]:
    """By op. small: inputs for a rehearsal, or for a program that runs every kernel under a memory checker."""
    batch, count, classes, rows = (2, 40, 512, 64) if small else (96, 9120, 65536, 13_312)
    dim = 64 if small else 640

    def attention(kind: str, within: bool) -> Check:
        build = partial(layer, kind, batch, backward=True, within_modality=within)
        dtypes = (HALF, SINGLE) if kind == "encoder" and not within else (HALF,)  # each compiles for seconds
        return Check(f"{kind}, within" if within else kind, build, _attention, dtypes)

    def packed(kind: str) -> Check:
        return Check(f"{kind}, packed", partial(layer, kind, batch, backward=True), _packed_attention, (HALF,))

    fc2 = partial(bench_linear.layer, rows, 4 * dim, dim, gelu=True, residual=True)
    whole = partial(tokens, count, dim, classes, ignored=0.1)
    limits = partial(tokens, count, dim, classes, limits=(classes, classes // 8))
    norm = partial(bench_layer_norm.rows, rows, added=True)
    block = partial(bench_adamw_step.tensors, (dim, 3 * dim), (dim,))
    return {
        "quantize_coords": [Check("joints", partial(joints, batch), _quantize)],
        "mask_tokens": [Check("samples", partial(samples, batch, M4_MASKING), _mask)],
        "cross_modal_attention": [
            *(attention(kind, False) for kind in ("encoder", "decoder", "cross")),
            attention("encoder", True),
            *(packed(kind) for kind in ("encoder", "cross")),
        ],
        "linear_cross_entropy": [
            Check("whole", whole, _loss, (HALF, SINGLE), _largest_logit),
            Check("limits", limits, _loss, (HALF,), _largest_logit),
        ],
        "linear": [Check("fc2", fc2, _linear, (HALF, SINGLE))],
        "layer_norm": [Check("after a sum", norm, _norm, (HALF, SINGLE))],
        "adamw_step": [Check("a block", block, _adamw, (SINGLE,))],
        "embedding": [Check("tokens", partial(_looked, classes, rows), _embedding, (SINGLE,))],
    }


def ops() -> list[str]:
    """Those of the package."""
    return sorted(module.name for module in pkgutil.iter_modules(m4kernels.ops.__path__))


def compare(check: Check, op: str, backend: str, dtype: torch.dtype | None, inputs: Any, folder: Folder) -> None:
    """Run a backend once and hold its results against float64's; what fails raises."""
    name = "integers" if dtype is None else str(dtype).removeprefix("torch.")
    given = moved(inputs, DEVICE, dtype)
    start = time.perf_counter()
    actual = check.run(given, backend)
    if ON_GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    truth = check.run(moved(given, DEVICE, None if dtype is None else torch.float64), "reference")
    worst = 0.0
    if dtype is None:
        for n, (a, b) in enumerate(zip(actual, truth, strict=True)):
            assert torch.equal(a, b), f"{op}, {check.name}: result {n} of {backend} is not the reference's"
    else:
        plain = check.run(given, "reference")
        rounding = torch.finfo(dtype).eps * check.largest(given) if dtype == HALF else 0.0  # half of it, twice
        for n, (a, p, b) in enumerate(zip(actual, plain, truth, strict=True)):
            worst = max(worst, ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item())
            what = f"{op}, {check.name}, {backend}, {name}: result {n}"
            further = 0.0 if n else rounding
            budget = {"factor": FACTOR, "floor": FLOOR, "further": further}
            assert_within_error_budget(a, p.to(a.dtype), b.double(), **budget, what=what)
    folder.append("op", op=op, case=check.name, backend=backend, dtype=name, first_seconds=seconds, error=worst)
    print(f"{op:<22} {check.name:<15} {backend:<10} {name:<9} {seconds:7.2f} s the first time, error {worst:.1e}")


def run(folder: Folder) -> None:
    """The stage "every op"."""
    with folder.part("the extension"):
        folder.append("environment", **machine())
    known = checks(small=not ON_GPU)
    for op in ops():
        usable = backends(op)
        folder.append("backends", op=op, usable=usable)
        if op not in known:
            with folder.part(f"{op}, of which no inputs are known here"):
                run_benchmark(op, folder)
        for check in known.get(op, []):
            for dtype in check.dtypes or (None,):
                inputs = check.build()
                for backend in usable:
                    with folder.part(f"{op}, {check.name}, {backend}, {dtype or 'integers'}"):
                        compare(check, op, backend, dtype, inputs, folder)


def run_benchmark(op: str, folder: Folder) -> None:
    """Run what its benchmark runs, in the smallest case that a GPU has, once each."""
    name = f"benchmarks.bench_{op}"
    if importlib.util.find_spec(name) is None:
        raise LookupError(f"{op} has neither inputs in benchmarks/gpu/ops.py nor a benchmark: add one")
    suite = importlib.import_module(name).SUITE
    case = next((name for name, case in suite.cases.items() if case.gpu), next(iter(suite.cases)))
    for backend in backends(op):
        providers = [provider for provider in suite.providers if provider == backend]
        for provider in providers:
            start = time.perf_counter()
            suite.prepared(case, provider)()
            if ON_GPU:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            folder.append("op", op=op, case=case, backend=backend, dtype="its own", first_seconds=seconds)
            print(f"{op:<22} {case:<15} {backend:<10} ran in {seconds:.2f} s the first time; not compared")
