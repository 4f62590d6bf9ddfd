"""cross_modal_attention in Triton: the launches of the kernels in triton_kernels.py.

The backward pass is two launches: the gradient of the queries, which also writes the row sums of out * grad_out, then
those of keys and values, which read them. In one launch every program of the second half would have to read `out` too
and sum it anew for each pair of tiles, and both halves would pay for the larger one's registers.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from m4kernels._triton import bfloat16_unfit, launch_on
from m4kernels.ops.cross_modal_attention import triton_kernels as kernels
from m4kernels.ops.cross_modal_attention.arguments import AttentionArguments, Gradients
from m4kernels.segments import Segments

MAX_HEAD_DIM = 128
MAX_MODALITIES = 31  # bits of an integer, see triton_blocks.py


class Launch(NamedTuple):
    """Tile of queries, tile of keys, and how a kernel runs on them; at most so many registers a thread with `allow`."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


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
# With `allow` grad_kv with head_dim 64 would take up to 181 registers, one block less.
_HALF = Launches(Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(32, 64, 4, 2))
_FLOAT = Launches(Launch(32, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 2))
LAUNCHES = {
    (2, 32): _HALF,
    (2, 64): _HALF._replace(grad_kv=Launch(32, 64, 4, 2, max_registers=168)),
    (2, 128): Launches(Launch(64, 64, 8, 2), Launch(64, 32, 8, 2), Launch(32, 64, 8, 2)),
    (4, 32): _FLOAT,
    (4, 64): Launches(Launch(64, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 16, 4, 2)),
    (4, 128): _FLOAT._replace(grad_kv=Launch(16, 32, 8, 2)),
}


def can_run(call: AttentionArguments) -> str | None:
    """float32, bfloat16 from compute capability 8.0 on, and float16; heads of at most 128; with `allow` up to 31
    modalities."""
    q = call.q
    if q.dtype == torch.float64:
        return "it computes in float32, got torch.float64 tensors"
    if q.shape[2] > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[2]}: use more heads, or backend='reference'"
    modalities = call.q_segments.num_modalities
    if call.allow is not None and modalities > MAX_MODALITIES:
        return f"allow may have up to {MAX_MODALITIES} modalities, got {modalities}: use backend='reference'"
    return bfloat16_unfit(call.device) if q.dtype == torch.bfloat16 else None


def cross_modal_attention(call: AttentionArguments) -> tuple[Tensor, Tensor]:
    """out (Tq, H, Dh) and lse (H, Tq)."""
    q, k, v = (_readable(x) for x in call[:3])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(call.lse_shape, dtype=torch.float32, device=q.device)
    launch = launches_of(q).forward
    grid, sizes = _grid(q, call.q_segments, launch.block_q)
    with launch_on(q):
        kernels.forward_kernel[grid](
            **_strided(q=q, k=k, v=v),
            out=out,
            lse=lse,
            **sizes,
            **_where(call),
            **constants_of(call, launch),
        )
    return out, lse


def cross_modal_attention_backward(
    call: AttentionArguments,
    grad_out: Tensor,  # (Tq, H, Dh)
    out: Tensor,  # (Tq, H, Dh)
    lse: Tensor,  # (H, Tq)
    grads: Gradients,
) -> None:
    """Writes the gradients with respect to q, k and v."""
    grad_out, q, k, v, out = (_readable(x) for x in (grad_out, *call[:3], out))
    lse = lse.contiguous()
    grad_q, grad_k, grad_v = grads
    lse_delta = torch.empty(lse.shape, dtype=torch.int64, device=lse.device)
    launches = launches_of(q)
    both = _strided(grad_out=grad_out, q=q, k=k, v=v) | _where(call) | {"lse_delta": lse_delta}
    with launch_on(q):
        grid, sizes = _grid(q, call.q_segments, launches.grad_q.block_q)
        kernels.grad_q_kernel[grid](
            **both,
            **_strided(out=out),
            lse=lse,
            grad_q=grad_q,
            pitch=_pitch(grad_q),
            **sizes,
            **constants_of(call, launches.grad_q),
        )
        grid, sizes = _grid(k, call.k_segments, launches.grad_kv.block_k)
        kernels.grad_kv_kernel[grid](
            **both,
            grad_k=grad_k,
            grad_v=grad_v,
            pitch=_pitch(grad_k),
            q_total=len(q),
            **sizes,
            **constants_of(call, launches.grad_kv),
        )


def _readable(x: Tensor) -> Tensor:
    """x as the kernels read it: any steps between tokens and heads, none within a head."""
    return x if x.stride(2) == 1 else x.contiguous()


def _pitch(grad: Tensor) -> int:
    """Heads from token to token of a gradient. With head_dim, which is compiled in, the compiler knows from it how wide
    stores may be, more than from steps: those it knows by multiples of 16 only."""
    return grad.stride(0) // grad.shape[2]


def _strided(**tensors: Tensor) -> dict[str, Tensor | int]:
    """Tensors (tokens, heads, head_dim), and their steps between tokens and heads, as the kernels name them."""
    steps: dict[str, Tensor | int] = dict(tensors)
    for name, x in tensors.items():
        steps |= {f"stride_{name}": x.stride(0), f"stride_{name}_head": x.stride(1)}
    return steps


def _where(call: AttentionArguments) -> dict[str, Any]:
    """Where the samples and modalities lie, and the scale, as every kernel takes it."""
    q_segments, k_segments, allow = call.q_segments, call.k_segments, call.allow
    return {
        "q_cu_seqlens": q_segments.cu_seqlens.contiguous(),
        "k_cu_seqlens": k_segments.cu_seqlens.contiguous(),
        "q_counts": q_segments.counts.contiguous(),
        "k_counts": k_segments.counts.contiguous(),
        "allow": None if allow is None else allow.contiguous(),
        "scale": call.scale,
    }


def _grid(x: Tensor, segments: Segments, block: int) -> tuple[tuple[int], dict[str, int]]:
    """One program a head, tile and sample, one more sample being the tail; and the numbers of these. No value on the
    device is asked for."""
    tiles = max(1, triton.cdiv(segments.max_seqlen, block))
    total, heads, _ = x.shape
    sizes = {"total": total, "samples": segments.batch_size, "heads": heads, "tiles": tiles}
    return (heads * tiles * (segments.batch_size + 1),), sizes


def launches_of(q: Tensor) -> Launches:
    """The launches for q (Tq, H, Dh)."""
    return LAUNCHES[q.element_size(), block_d(q.shape[2])]


def block_d(head_dim: int) -> int:
    """The padded head_dim."""
    return max(32, triton.next_power_of_2(head_dim))


def constants_of(call: AttentionArguments, launch: Launch) -> dict[str, int]:
    """The compile-time arguments that every kernel takes, and how it is launched."""
    group = call.q.shape[1] // call.k.shape[1]
    masked = call.allow is not None
    return launch_options(launch, group, call.q_segments.num_modalities, call.q.shape[2], masked=masked)


def launch_options(launch: Launch, group: int, modalities: int, head_dim: int, *, masked: bool) -> dict[str, int]:
    ceiling = {"maxnreg": launch.max_registers} if masked and launch.max_registers is not None else {}
    return ceiling | {
        "GROUP": group,
        "MODALITIES": modalities,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d(head_dim),
        "BLOCK_Q": launch.block_q,
        "BLOCK_K": launch.block_k,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
