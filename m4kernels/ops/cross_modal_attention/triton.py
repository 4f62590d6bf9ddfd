"""cross_modal_attention in Triton: the launches of the kernels in triton_kernels.py.

The backward pass is two launches: the gradient of the queries, which also writes the row sums of out * grad_out, then
those of keys and values, which read them. In one launch every program of the second half would have to read `out` too
and sum it anew for each pair of tiles, and both halves would pay for the larger one's registers.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from m4kernels.aot import AotCase
from m4kernels.ops.cross_modal_attention import triton_kernels as kernels
from m4kernels.segments import Segments

MAX_HEAD_DIM = 128


class Launch(NamedTuple):
    """Tile of queries, tile of keys, and how a kernel runs on them."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class Launches(NamedTuple):
    """The launches of the three kernels."""

    forward: Launch
    grad_q: Launch
    grad_kv: Launch


# By (bytes of a number, padded head_dim). Chosen from what `python -m m4kernels.aot` says, not yet from times on a GPU:
# tiles of 64 rows fill the tensor cores of 4 warps; M4's samples average 95 to 138 tokens, so that 128 x 64 would
# compute 1.7 to 2.0 times the scores that exist, 64 x 64 1.5 to 1.8, 64 x 32 1.35 to 1.5. The backward kernels hold two
# tiles of scores, so their inner side is 32: 64 would leave registers for 2 instead of 3 blocks a multiprocessor
# (grad_kv with head_dim 64, 228 against 168). Loops take few steps, so 2 stages do. In float32, tiles that do not spill
# with Triton 3.6, 3.7 or 3.8 (grad_kv with head_dim 64: 32 x 32 spills with 3.6 and 3.7, 16 x 32 takes up to 154
# registers with 3.8; 32 x 16 takes at most 110 with all).
_HALF = Launches(Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(32, 64, 4, 2))
_FLOAT = Launches(Launch(32, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 2))
LAUNCHES = {
    (2, 32): _HALF,
    (2, 64): _HALF,
    (2, 128): Launches(Launch(64, 64, 8, 2), Launch(64, 32, 8, 2), Launch(32, 64, 8, 2)),
    (4, 32): _FLOAT,
    (4, 64): Launches(Launch(64, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 16, 4, 2)),
    (4, 128): _FLOAT,
}


def can_run(q: Tensor, *_args: object) -> str | None:
    """float32, bfloat16 from compute capability 8.0 on, and float16; heads of at most 128."""
    if q.dtype == torch.float64:
        return "it computes in float32, got torch.float64 tensors"
    if q.shape[2] > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[2]}: use more heads, or backend='reference'"
    if q.dtype == torch.bfloat16 and q.is_cuda and _capability(q.device) < (8, 0):
        have = ".".join(map(str, _capability(q.device)))
        return f"bfloat16 needs a GPU of compute capability 8.0, got {have}: use float16 or float32"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def cross_modal_attention(
    q: Tensor,  # (Tq, H, Dh)
    k: Tensor,  # (Tk, Hkv, Dh)
    v: Tensor,  # (Tk, Hkv, Dh)
    q_segments: Segments,
    k_segments: Segments,
    allow: Tensor | None,  # (M, M)
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (Tq, H, Dh) and lse (H, Tq)."""
    q, k, v = (_readable(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    launch = LAUNCHES[q.element_size(), _block_d(q.shape[2])].forward
    where, constants = _where(q_segments, k_segments, allow), _constants(q, k, q_segments, launch)
    grid, numbers = _grid(q, q_segments, launch.block_q)
    with _device(q):
        kernels.forward_kernel[grid](
            q, k, v, out, lse, *where, scale, *numbers, *_strides(q, k, v), **constants
        )  # fmt: skip
    return out, lse


def cross_modal_attention_backward(
    grad_out: Tensor,  # (Tq, H, Dh)
    q: Tensor,  # (Tq, H, Dh)
    k: Tensor,  # (Tk, Hkv, Dh)
    v: Tensor,  # (Tk, Hkv, Dh)
    out: Tensor,  # (Tq, H, Dh)
    lse: Tensor,  # (H, Tq)
    q_segments: Segments,
    k_segments: Segments,
    allow: Tensor | None,  # (M, M)
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to q, k and v."""
    grad_out, q, k, v, out = (_readable(x) for x in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    launches = LAUNCHES[q.element_size(), _block_d(q.shape[2])]
    where = _where(q_segments, k_segments, allow)
    with _device(q):
        grid, numbers = _grid(q, q_segments, launches.grad_q.block_q)
        kernels.grad_q_kernel[grid](
            grad_out, q, k, v, out, lse, delta, grad_q, *where, scale, *numbers, *_strides(grad_out, q, k, v, out),
            **_constants(q, k, q_segments, launches.grad_q),
        )  # fmt: skip
        grid, numbers = _grid(k, k_segments, launches.grad_kv.block_k)
        kernels.grad_kv_kernel[grid](
            grad_out, q, k, v, lse, delta, grad_k, grad_v, *where, scale, q.shape[0], *numbers,
            *_strides(grad_out, q, k, v), **_constants(q, k, q_segments, launches.grad_kv),
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def _readable(x: Tensor) -> Tensor:
    """x as the kernels read it: any steps between tokens and heads, none within a head."""
    return x if x.stride(2) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> Iterator[int]:
    return (stride for x in tensors for stride in x.stride()[:2])


def _device(x: Tensor) -> Any:
    """Triton launches on the current device, whatever the tensors' is."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def _block_d(head_dim: int) -> int:
    return max(32, triton.next_power_of_2(head_dim))


def _where(q_segments: Segments, k_segments: Segments, allow: Tensor | None) -> tuple[Tensor | None, ...]:
    """Where the samples and modalities lie, as every kernel takes it."""
    segments = (q_segments.cu_seqlens, k_segments.cu_seqlens, q_segments.counts, k_segments.counts)
    return *(x.contiguous() for x in segments), None if allow is None else allow.contiguous()


def _grid(x: Tensor, segments: Segments, block: int) -> tuple[tuple[int], tuple[int, int, int, int]]:
    """One program a head, tile and sample, one more sample being the tail; and (total, samples, heads, tiles). No value
    on the device is asked for."""
    tiles = max(1, triton.cdiv(segments.max_seqlen, block))
    total, heads, _ = x.shape
    return (heads * tiles * (segments.batch_size + 1),), (total, segments.batch_size, heads, tiles)


def _constants(q: Tensor, k: Tensor, segments: Segments, launch: Launch) -> dict[str, int]:
    """The compile-time arguments that every kernel takes, and how it is launched."""
    return _launch_options(launch, q.shape[1] // k.shape[1], segments.num_modalities, q.shape[2])


def _launch_options(launch: Launch, group: int, modalities: int, head_dim: int) -> dict[str, int]:
    return {
        "GROUP": group,
        "MODALITIES": modalities,
        "HEAD_DIM": head_dim,
        "BLOCK_MODALITIES": triton.next_power_of_2(modalities),
        "BLOCK_D": _block_d(head_dim),
        "BLOCK_Q": launch.block_q,
        "BLOCK_K": launch.block_k,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def aot_cases() -> list[AotCase]:
    """Every launch of the table, with 4 modalities, and without `allow` at M4's head_dim; and odd ones."""
    cases = []
    for (size, head_dim), launches in LAUNCHES.items():
        dtype = "bf16" if size == 2 else "fp32"
        for kernel, launch in zip(Launches._fields, launches, strict=True):
            for masked in (True, False) if head_dim == 64 else (True,):
                case = _aot_case(kernel, launch, dtype, head_dim, masked=masked)
                if dtype == "fp32":
                    cases.append(replace(case, max_registers=128))  # 2 blocks of 8 warps a multiprocessor
                elif head_dim == 64:
                    cases.append(replace(case, max_registers=168, architectures=(90, 100)))  # 3 blocks of 4 warps
                    cases.append(replace(case, architectures=(80,)))
                else:
                    cases.append(case)
    for kernel, launch in zip(Launches._fields, LAUNCHES[2, 128], strict=True):
        cases.append(replace(_aot_case(kernel, launch, "fp16", 72, group=2), architectures=(90,)))
        case = _aot_case(kernel, launch, "fp16", 72, modalities=33)
        # Looking every score up takes 64-bit addresses: a form that is right, but not tuned.
        cases.append(replace(case, architectures=(90,), max_stack_bytes=512))
    return cases


def _aot_case(
    name: str, launch: Launch, dtype: str, head_dim: int, *, masked: bool = True, group: int = 1, modalities: int = 4
) -> AotCase:
    """One launch, specialised as for views into a fused projection of M4: everything aligned, whatever the total."""
    kernel = getattr(kernels, f"{name}_kernel")
    options = _launch_options(launch, group, modalities, head_dim)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    constants: dict[str, Any] = options if masked else options | {"allow": None}
    types = {name: _aot_type(name, dtype, head_dim) for name in kernel.arg_names if name not in constants}
    title = f"{name} {dtype} head_dim {head_dim}{'' if masked else ', no allow'}"
    if (group, modalities) != (1, 4):
        title += f", {group} heads a group, {modalities} modalities"
    return AotCase(title, kernel, types, constants, warps, stages)


def _aot_type(argument: str, dtype: str, head_dim: int) -> str:
    if argument.startswith("stride"):
        return "i32" if head_dim % 16 else "i32:16"
    if argument.endswith(("cu_seqlens", "counts")):
        return "*i32:16"
    integers = ("total", "q_total", "samples", "heads", "tiles")
    types = {"allow": "*i1:16", "scale": "fp32", "lse": "*fp32:16", "delta": "*fp32:16"}
    return (types | dict.fromkeys(integers, "i32")).get(argument, f"*{dtype}:16")
