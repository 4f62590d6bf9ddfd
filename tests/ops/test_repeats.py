"""Ten runs, the same bits; on a GPU at the shapes of M4's batch of 96, and 100,000 samples get the masks of the CPU."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from m4kernels import (
    add_layer_norm,
    cross_modal_attention,
    dequantize_coords,
    layer_norm,
    linear_cross_entropy,
    mask_tokens,
    quantize_coords,
)
from m4kernels.cases import M4_INPUT_MEANS, M4_TARGET_MEANS, m4_counts
from m4kernels.cases import M4_MASKING as M4
from m4kernels.dispatch import unavailable
from m4kernels.segments import Segments

ON_CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CPP = pytest.param("cpp", "cpu", id="cpp")


def on_cuda(*backends: str) -> list:
    return [pytest.param(name, "cuda", id=f"{name} cuda", marks=ON_CUDA) for name in backends]


def require(op: str, backend: str, device: str) -> None:
    """Skip, saying why, where the backend is not built; a backend that the op lacks altogether is skipped too."""
    if backend not in importlib.import_module(f"m4kernels.ops.{op}.api").dispatcher.backends:
        pytest.skip(f"{op} has no backend {backend}")
    reason = unavailable(backend, device)
    if reason is not None:
        pytest.skip(reason)


def batch_of(device: str) -> int:
    return 96 if device == "cuda" else 3


def assert_ten_times_the_same(run: Callable[[], list[Tensor]]) -> None:
    first = [x.clone() for x in run()]
    assert all(x.isfinite().all() for x in first if x.is_floating_point())
    for repeat in range(9):
        litter = [torch.full_like(x, repeat) for x in first]  # so that results land elsewhere, on other contents
        for a, b in zip(first, run(), strict=True):
            assert torch.equal(a, b), f"run {repeat + 2} of 10 differs from the first"
        del litter


@pytest.mark.parametrize(("backend", "device"), [CPP, *on_cuda("triton", "cuda")])
def test_quantize_coords(backend: str, device: str) -> None:
    require("quantize_coords", backend, device)
    g = torch.Generator().manual_seed(0)
    xy = (torch.rand(batch_of(device), 13, 2, generator=g) * 300).to(device)
    visible = (torch.rand(batch_of(device), 13, generator=g) < 0.8).to(device)

    def run() -> list[Tensor]:
        tokens = quantize_coords(xy, visible, backend=backend)
        return [tokens, *dequantize_coords(tokens, backend=backend)]

    assert_ten_times_the_same(run)


@pytest.mark.parametrize(("backend", "device"), [CPP, *on_cuda("triton", "cuda")])
def test_mask_tokens(backend: str, device: str) -> None:
    require("mask_tokens", backend, device)
    batch = batch_of(device)
    tokens = torch.arange(batch * M4.num_tokens).reshape(batch, -1).to(device)
    ids = torch.arange(batch, device=device)
    capacity = (batch * 256, batch * 256)
    assert_ten_times_the_same(
        lambda: mask_tokens(tokens, M4, seed=1, sample_ids=ids, capacity=capacity, backend=backend).tensors()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross", "within_modality"])
@pytest.mark.parametrize(("backend", "device"), [CPP, *on_cuda("triton", "cuda")])
def test_cross_modal_attention(backend: str, device: str, kind: str, dtype: torch.dtype) -> None:
    require("cross_modal_attention", backend, device)
    g = torch.Generator().manual_seed(0)
    inputs, targets = (
        Segments.from_counts(m4_counts(batch_of(device), means, g)).to(device)
        for means in (M4_INPUT_MEANS, M4_TARGET_MEANS)
    )
    q_segments = targets if kind in ("decoder", "cross") else inputs
    k_segments = targets if kind == "decoder" else inputs
    allow = torch.eye(4, dtype=torch.bool, device=device) if kind == "within_modality" else None
    q, k, v, grad = (
        torch.randn(int(s.cu_seqlens[-1]) + 5, 10, 64, generator=g).to(device, dtype)  # and a tail
        for s in (q_segments, k_segments, k_segments, q_segments)
    )

    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = cross_modal_attention(*leaves, q_segments, k_segments, allow=allow, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    assert_ten_times_the_same(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limited", [False, True], ids=["whole", "limits"])
@pytest.mark.parametrize(("backend", "device"), [CPP, *on_cuda("triton", "cuda")])
def test_linear_cross_entropy(backend: str, device: str, limited: bool, dtype: torch.dtype) -> None:
    require("linear_cross_entropy", backend, device)
    tokens, dim, classes = (9120, 640, 65536) if device == "cuda" else (24, 16, 512)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, dim, generator=g).to(device, dtype)
    weight = (torch.randn(classes, dim, generator=g) * 0.05).to(device, dtype)
    limit = torch.tensor([classes, classes // 8])[torch.randint(0, 2, (tokens,), generator=g)]
    targets = (torch.rand(tokens, generator=g) * limit).long()
    targets[::7] = -100
    targets, limit = targets.to(device), limit.to(device)

    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        out = linear_cross_entropy(*leaves, targets, vocab_limit=limit if limited else None, backend=backend)
        return [out.loss.detach(), out.nll, out.correct, *torch.autograd.grad(out.loss, leaves)]

    assert_ten_times_the_same(run)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(("backend", "device"), on_cuda("triton", "cuda"))
def test_layer_norm(backend: str, device: str, added: bool) -> None:
    require("layer_norm", backend, device)
    g = torch.Generator().manual_seed(0)
    x, grad_total = torch.randn(2, 13_312, 640, generator=g).to(device)
    update, grad = torch.randn(2, 13_312, 640, generator=g).to(device, torch.bfloat16)
    weight = torch.rand(640, generator=g).to(device)

    def run() -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in (x, weight, update)]
        if added:
            found = add_layer_norm(leaves[0], leaves[2], leaves[1], out_dtype=torch.bfloat16, backend=backend)
            gradients = torch.autograd.grad(found, leaves, (grad, grad_total))
        else:
            found = (layer_norm(*leaves[:2], out_dtype=torch.bfloat16, backend=backend),)
            gradients = torch.autograd.grad(found, leaves[:2], (grad,))
        return [*(value.detach() for value in found), *gradients]

    assert_ten_times_the_same(run)


@pytest.mark.parametrize(("backend", "device"), on_cuda("reference", "triton", "cuda"))
def test_masks_of_100_000_samples_are_those_of_the_cpu(backend: str, device: str) -> None:
    require("mask_tokens", backend, device)
    g = torch.Generator().manual_seed(0)
    for first in range(0, 100_000, 10_000):
        ids = torch.arange(first, first + 10_000)
        ids[::2] += 2**40
        tokens = torch.randint(0, 64_000, (10_000, M4.num_tokens), generator=g)
        expected = mask_tokens(tokens, M4, seed=2**63 + 5, epoch=3, sample_ids=ids)
        capacity = len(expected.encoder.ids), len(expected.decoder.ids)
        actual = mask_tokens(
            tokens.to(device),
            M4,
            seed=2**63 + 5,
            epoch=3,
            sample_ids=ids.to(device),
            capacity=capacity,
            backend=backend,
        )
        for a, b in zip(actual.tensors(), expected.tensors(), strict=True):
            assert torch.equal(a.cpu(), b), f"samples {first} to {first + 9_999} differ"
