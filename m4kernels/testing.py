"""Assertions shared by tests and benchmarks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def assert_within_error_budget(
    actual: Tensor,
    baseline: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    floor: float = 4.0,
    further: Tensor | float = 0.0,
    what: str = "result",
) -> None:
    """Assert that a kernel errs no more than plain PyTorch does in the same dtype, up to a factor.

    `|actual - truth| <= factor * max|baseline - truth| + floor * eps(dtype) * max|truth| + further` in every entry. The
    second term covers baselines that happen to be exact; the third is for roundings that the baseline does not make.

    Args:
        actual: the kernel's result.
        baseline: the plain PyTorch result in the kernel's dtype.
        truth: the float64 reference.
        factor: allowed ratio of the two errors.
        floor: absolute term in units of the dtype's machine epsilon at the largest true value.
        further: what follows from the arithmetic of the kernel and the conditioning of the case, for all entries or,
            in the shape of `truth`, for each; whoever gives it derives it.
        what: named in the message.
    """
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == baseline.dtype, f"{what}: dtype {actual.dtype}, expected {baseline.dtype}"
    if truth.numel() == 0:
        return
    assert bool(actual.isfinite().all()), f"{what}: not finite"
    error = (actual.double() - truth).abs()
    allowed = (baseline.double() - truth).abs().max().item()
    tiny = floor * torch.finfo(actual.dtype).eps * max(truth.abs().max().item(), 1e-30)
    further = torch.as_tensor(further, dtype=torch.float64, device=truth.device).expand(truth.shape)
    worst = (error - further).argmax()
    largest, more = error.flatten()[worst].item(), further.flatten()[worst].item()
    assert largest <= factor * allowed + tiny + more, (
        f"{what}: error {largest:.3e} exceeds {factor} x {allowed:.3e} (plain PyTorch) + {tiny:.1e} + {more:.1e}"
    )


def peak_extra_memory(function: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes of tensors that `function` holds at any time beyond those that live when it is called, its result
    included: as torch's allocator for the device sees them, temporaries inside operators and all. On CUDA, where bytes
    count as requested, not as rounded up, the function runs twice: libraries allocate a workspace when first used."""
    if device != "cpu":
        function()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
        function()
        return torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    assert record.profiler is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
