"""The arguments of one call of cross_modal_attention, checked; what every backend receives."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m4kernels._dtypes import compute_dtype
from m4kernels.backend import Backend
from m4kernels.segments import Segments

OP = "cross_modal_attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Of q, k and v, for a backend to write into: heads of a token lie side by side; tokens may lie any number of heads
# apart, those of k and v the same number.
Gradients = tuple[Tensor, Tensor, Tensor]


class Names(NamedTuple):
    """What messages call an op and what it takes; the same name twice where one argument holds both."""

    op: str = OP
    q: str = "q"
    k: str = "k"
    v: str = "v"
    q_segments: str = "q_segments"
    k_segments: str = "k_segments"


NAMES = Names()


class AttentionArguments(NamedTuple):
    """One call of the op; shapes as in `api.cross_modal_attention`."""

    q: Tensor  # (Tq, H, Dh)
    k: Tensor  # (Tk, Hkv, Dh)
    v: Tensor  # (Tk, Hkv, Dh)
    q_segments: Segments
    k_segments: Segments
    allow: Tensor | None  # (M, M)
    scale: float

    @classmethod
    def from_flat(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_cu_seqlens: Tensor,
        q_counts: Tensor,
        q_max_seqlen: int,
        k_cu_seqlens: Tensor,
        k_counts: Tensor,
        k_max_seqlen: int,
        allow: Tensor | None,
        scale: float | None,
    ) -> "AttentionArguments":
        """From what the op's schema takes; a scale of None is the default."""
        q_segments = Segments(q_cu_seqlens, q_counts, q_max_seqlen)
        k_segments = Segments(k_cu_seqlens, k_counts, k_max_seqlen)
        if scale is None:
            scale = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0  # a shape that is refused must not matter
        return cls(q, k, v, q_segments, k_segments, allow, scale)

    @property
    def names(self) -> Names:
        return NAMES

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def lse_shape(self) -> tuple[int, int]:
        """(H, Tq)"""
        return self.q.shape[1], self.q.shape[0]

    def check_structure(self) -> None:
        """Raise ValueError where shapes, dtypes, devices or numbers do not fit; reads no values of tensors."""
        q, k, v, q_segments, k_segments, allow, scale = self
        names, q_dtype, device = self.names, q.dtype, q.device
        op = names.op
        for name, x in ((names.q, q), (names.k, k), (names.v, v)):
            shape = x.shape
            if len(shape) != 3 or shape[1] == 0 or shape[2] == 0:
                raise ValueError(f"{op}: {name} must have shape (tokens, heads, head_dim), got {tuple(shape)}")
            if x.dtype is not q_dtype:
                raise ValueError(f"{op}: {name} must have the dtype of {names.q}, {q.dtype}, got {x.dtype}")
            if x.device != device:
                raise ValueError(f"{op}: {name} must be on the device of {names.q}, {q.device}, got {x.device}")
        if q_dtype not in DTYPES:
            raise ValueError(f"{op}: {names.q} must be float32, bfloat16, float16 or float64, got {q.dtype}")
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"{op}: {names.k} must have the head_dim of {names.q}, {q.shape[2]}, got {k.shape[2]}")
        if v.shape != k.shape:
            raise ValueError(
                f"{op}: {names.v} must have the shape of {names.k}, {tuple(k.shape)}, got {tuple(v.shape)}"
            )
        if q.shape[1] % k.shape[1]:
            raise ValueError(
                f"{op}: the heads of {names.q} must be a multiple of those of {names.k}, {k.shape[1]}, got {q.shape[1]}"
            )
        for name, segments in ((names.q_segments, q_segments), (names.k_segments, k_segments)):
            segments.check_structure(f"{op}: {name}")
            if segments.counts.device != device:
                raise ValueError(
                    f"{op}: {name} must be on the device of {names.q}, {device}, got {segments.counts.device}"
                )
        if q_segments.counts.shape != k_segments.counts.shape:
            raise ValueError(
                f"{op}: {names.k_segments}.counts must have the shape (B, M) of {names.q_segments}.counts, "
                f"{tuple(q_segments.counts.shape)}, got {tuple(k_segments.counts.shape)}"
            )
        if allow is not None:
            self._check_allow(allow)
        if not abs(scale) <= torch.finfo(compute_dtype(q_dtype)).max:
            raise ValueError(f"{op}: scale must be finite in {compute_dtype(q_dtype)}, got {scale}")

    def _check_allow(self, allow: Tensor) -> None:
        op, modalities = self.names.op, self.q_segments.num_modalities
        if allow.dtype != torch.bool or allow.shape != (modalities, modalities):
            raise ValueError(
                f"{op}: allow must be bool ({modalities}, {modalities}), got {allow.dtype} {tuple(allow.shape)}; "
                "convert numbers with allow.bool()"
            )
        if allow.device != self.q.device:
            raise ValueError(
                f"{op}: allow must be on the device of {self.names.q}, {self.q.device}, got {allow.device}"
            )

    def check_values(self) -> None:
        """Raise ValueError where the segments are inconsistent or leave q and k; on a CPU only, where nothing waits."""
        if self.q.device.type == "cpu":
            names = self.names
            self.q_segments.check_values(f"{names.op}: {names.q_segments}", self.q.shape[0])
            self.k_segments.check_values(f"{names.op}: {names.k_segments}", self.k.shape[0])

    def check_gradient(self, grad_out: Tensor, out: Tensor, lse: Tensor) -> None:
        """Raise ValueError where what the backward pass takes besides does not fit; reads no values."""
        op, q = self.names.op, self.q
        for name, x in (("grad_out", grad_out), ("out", out)):
            if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
                raise ValueError(
                    f"{op}: {name} must be {q.dtype} {tuple(q.shape)} on {q.device}, "
                    f"got {x.dtype} {tuple(x.shape)} on {x.device}"
                )
        shape, dtype = self.lse_shape, compute_dtype(q.dtype)
        if lse.shape != shape or lse.dtype != dtype or lse.device != q.device:
            raise ValueError(
                f"{op}: lse must be {dtype} {shape} on {q.device}, got {lse.dtype} {tuple(lse.shape)} on {lse.device}"
            )


class AttentionBackend(Backend, Protocol):
    """What a backend of this op has."""

    def cross_modal_attention(self, call: AttentionArguments) -> tuple[Tensor, Tensor]:
        """out (Tq, H, Dh) and lse (H, Tq), the logsumexp of the scaled scores of every row, -inf where it has no key"""

    def cross_modal_attention_backward(
        self, call: AttentionArguments, grad_out: Tensor, out: Tensor, lse: Tensor, grads: Gradients
    ) -> None:
        """Write the gradients with respect to q, k and v, from grad_out (Tq, H, Dh) and what the forward pass gave"""
