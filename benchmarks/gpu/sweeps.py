"""What depends on a choice of ours: the loss by its workspace, attention by the launches of its kernels."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_cross_modal_attention import Layer, layer
from benchmarks.bench_linear_cross_entropy import tokens
from benchmarks.device import DEVICE, ON_GPU, Unavailable, backends, moved
from benchmarks.gpu.folder import Folder
from benchmarks.measure import Run, gpu_median, gpu_peak_memory, timed
from m4.model.m4 import loss_workspace
from m4kernels import cross_modal_attention, linear_cross_entropy
from m4kernels.testing import peak_extra_memory

SECONDS = 0.15  # of measuring one choice
MIB = 2**20
WORKSPACES = (64, 256, 512, 1024, 1536, 2560, 5120)  # MiB
ROWS = (9120, 45_600)  # the mean targets of 96 samples, and of 480
PARTS = ("block_q", "block_k", "num_warps", "num_stages")
# By kernel: (rows of queries, rows of keys, warps, stages) beside the one it has. Few: each is compiled first.
CHOICES = {
    "forward": ((64, 32, 4, 2), (128, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3), (128, 32, 4, 2), (64, 128, 4, 2)),
    "grad_q": ((64, 32, 4, 3), (64, 64, 4, 2), (128, 32, 8, 2), (128, 32, 4, 2), (64, 64, 8, 2)),
    "grad_kv": ((32, 64, 4, 3), (64, 64, 4, 2), (32, 128, 8, 2), (32, 128, 4, 2), (64, 64, 8, 2)),
}


def seconds_of(run: Run) -> float:
    return gpu_median(run, seconds=SECONDS, clock=False)[0] if ON_GPU else timed(run)


def loss_runs(rows: int) -> Callable[[int], Run]:
    """By the memory that it may take: the loss of so many tokens as the trainer calls it."""
    inputs = tokens(*((rows, 640, 65536) if ON_GPU else (40, 16, 128)))
    x, weight = (value.detach().to(DEVICE).requires_grad_() for value in inputs[:2])
    targets = inputs.targets.to(DEVICE)
    share = torch.full(targets.shape, 1 / len(targets), device=DEVICE)

    def of(size: int) -> Run:
        def run() -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                out = linear_cross_entropy(x, weight, targets, token_weight=share, max_workspace_bytes=size)
            out.loss.backward()
            x.grad = weight.grad = None

        return run

    return of


def workspaces(folder: Folder) -> None:
    """The loss by the memory that it may take, that of the trainer last."""
    for rows in ROWS:
        run_of = loss_runs(rows)
        for size in (*(mib * MIB for mib in WORKSPACES), loss_workspace(DEVICE)):
            with folder.part(f"the loss of {rows} tokens in {size // MIB} MiB"):
                run = run_of(size)
                seconds = seconds_of(run)
                peak = gpu_peak_memory(run) if ON_GPU else peak_extra_memory(run)
                folder.append("workspace", rows=rows, bytes=size, microseconds=seconds * 1e6, peak_bytes=peak)
                print(
                    f"loss of {rows} tokens, {size // MIB:5} MiB: {seconds * 1e6:9.1f} us, {peak // MIB} MiB",
                    flush=True,
                )


def attention_runs(inputs: Layer) -> dict[str, Run]:
    """Forward alone, and backward alone."""
    q, k, v, q_segments, k_segments, allow, _ = inputs

    def forward() -> Tensor:
        return cross_modal_attention(q, k, v, q_segments, k_segments, allow=allow)

    out = forward()
    grad = torch.randn_like(out)

    def backward() -> Any:
        return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    return {"forward": forward, "backward": backward}


def choices(launches: Any, key: tuple[int, int]) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """(kernel, choice, the launches with it) of one kernel at a time, what is there first."""
    own = launches[key]
    for kernel in own._fields:
        launch = getattr(own, kernel)
        present = tuple(getattr(launch, part) for part in PARTS)
        yield kernel, present, own
        for choice in CHOICES.get(kernel, ()):
            if choice != present:
                yield kernel, choice, own._replace(**{kernel: launch._replace(**dict(zip(PARTS, choice, strict=True)))})


def attention(folder: Folder) -> None:
    """The launches of attention's kernels, each changed alone."""
    if "triton" not in backends("cross_modal_attention"):
        raise Unavailable("Triton's kernels do not run here")
    from m4kernels.ops.cross_modal_attention import triton as backend

    key = (2, 64)  # bytes of a number, head_dim
    own = backend.LAUNCHES[key]
    for kind in ("encoder", "cross"):
        inputs = moved(layer(kind, 96, backward=True), DEVICE, torch.bfloat16)
        try:
            for kernel, choice, launches in choices(backend.LAUNCHES, key):
                with folder.part(f"attention, {kind}, {kernel} with {choice}"):
                    backend.LAUNCHES[key] = launches
                    pair = attention_runs(inputs)
                    what = "forward" if kernel == "forward" else "backward"
                    seconds = seconds_of(pair[what])
                    present = launches is own
                    folder.append(
                        "launch", case=kind, kernel=kernel, choice=choice, present=present,
                        measured=what, microseconds=seconds * 1e6,
                    )  # fmt: skip
                    note = " (as it is)" if present else ""
                    print(f"attention, {kind}, {kernel} {choice}{note}: {what} {seconds * 1e6:.1f} us", flush=True)
        finally:
            backend.LAUNCHES[key] = own


def run(folder: Folder) -> None:
    """The stage "sweeps"."""
    workspaces(folder)
    with folder.part("launches of attention"):
        attention(folder)
