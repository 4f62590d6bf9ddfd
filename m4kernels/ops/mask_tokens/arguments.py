"""The arguments of one call of mask_tokens, checked; what every backend receives."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m4kernels import _checks
from m4kernels.backend import Backend
from m4kernels.ops.mask_tokens.plan import Plan, make_plan

OP = "mask_tokens"
MAX_CAPACITY = 2**31 - 1  # cu_seqlens are int32


class Draw(NamedTuple):
    """What a mask is a function of: seed and epoch, and sample_ids int64 (B,)."""

    seed: int
    epoch: int
    sample_ids: Tensor


class MaskArguments(NamedTuple):
    """One call of the op; shapes as in `api.mask_tokens`."""

    tokens: Tensor  # (B, L)
    draw: Draw
    lengths: Tensor | None  # (B, M)
    plan: Plan  # of the spec, on the device of the tokens
    capacity: Sequence[int] | None  # (encoder, decoder)

    @classmethod
    def from_flat(
        cls,
        tokens: Tensor,
        sample_ids: Tensor,
        lengths: Tensor | None,
        max_seq_lens: Sequence[int],
        input_alphas: Sequence[float],
        target_alphas: Sequence[float],
        token_ranges: Sequence[int],
        seed: int,
        epoch: int,
        capacity: Sequence[int] | None,
    ) -> "MaskArguments":
        """From what the op's schema takes."""
        spec = (tuple(max_seq_lens), tuple(input_alphas), tuple(target_alphas), tuple(token_ranges))
        return cls(tokens, Draw(seed, epoch, sample_ids), lengths, make_plan(*spec, tokens.device), capacity)

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def check_structure(self) -> None:
        """Raise ValueError where shapes, dtypes, devices or numbers do not fit; reads no values of tensors."""
        tokens, (_, epoch, sample_ids), lengths, plan, capacity = self
        spec, device = plan.spec, tokens.device
        lens, width = spec.max_seq_lens, spec.num_tokens
        if not _checks.is_integer_dtype(tokens.dtype):
            raise ValueError(f"{OP}: tokens must be integer, got {tokens.dtype}")
        if tokens.dim() != 2 or tokens.shape[1] != width:
            raise ValueError(f"{OP}: tokens must have shape (B, {width}) for this spec, got {tuple(tokens.shape)}")
        batch = tokens.shape[0]
        if sample_ids.dtype != torch.int64 or sample_ids.dim() != 1 or sample_ids.shape[0] != batch:
            raise ValueError(
                f"{OP}: sample_ids must be int64 ({batch},), got {sample_ids.dtype} {tuple(sample_ids.shape)}"
            )
        if sample_ids.device != device:
            raise ValueError(f"{OP}: sample_ids is on {sample_ids.device}, tokens on {device}")
        if lengths is not None:
            if not _checks.is_integer_dtype(lengths.dtype):
                raise ValueError(f"{OP}: lengths must be integer, got {lengths.dtype}")
            if lengths.shape != (batch, len(lens)):
                raise ValueError(f"{OP}: lengths must have shape ({batch}, {len(lens)}), got {tuple(lengths.shape)}")
            if lengths.device != device:
                raise ValueError(f"{OP}: lengths is on {lengths.device}, tokens on {device}")
        check_epoch(epoch)
        if capacity is not None:
            check_capacity(capacity)
        elif device.type == "meta":
            raise ValueError(f"{OP}: capacity is needed for meta tensors, since how many tokens are drawn is not known")
        if batch * min(width, max(plan.inputs.high, plan.targets.high)) >= 2**31:
            raise ValueError(f"{OP}: {batch} samples may have 2**31 tokens or more: use smaller batches")


class MaskBackend(Backend, Protocol):
    """What a backend of this op has."""

    def mask_tokens(self, call: MaskArguments) -> tuple[Tensor, ...]:
        """For inputs, then targets: ids, positions, modalities int64 (T,), cu_seqlens int32 (B + 1,), counts int32
        (B, M). Raises ValueError, or on a GPU a device assertion, where a length or the capacity does not fit."""


def check_epoch(epoch: int) -> None:
    """Refuse what is not a 32-bit word."""
    if not 0 <= epoch < 2**32:
        raise ValueError(f"{OP}: epoch must be 0 to 2**32 - 1, got {epoch}")


def check_capacity(capacity: Sequence[int]) -> None:
    """Refuse what is not two lengths."""
    if len(capacity) != 2 or min(capacity) < 0:
        raise ValueError(f"{OP}: capacity must be two numbers that are not negative, got {list(capacity)}")
    if max(capacity) > MAX_CAPACITY:
        raise ValueError(f"{OP}: capacity must be below 2**31, got {list(capacity)}")
