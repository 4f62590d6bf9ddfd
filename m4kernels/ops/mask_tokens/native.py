"""What the compiled backends, on the CPU and in CUDA, share: inputs, plans and outputs as the extension takes them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m4kernels.ops.mask_tokens.arguments import MaskArguments
from m4kernels.ops.mask_tokens.plan import Plan
from m4kernels.segments import IGNORE_INDEX

TOKEN_TYPES = {torch.uint16: 0, torch.int32: 1, torch.int64: 2}  # masking::TokenType; others are converted


def native_plan(kind: Any, plan: Plan) -> Any:
    """The extension's `MaskPlan` or `MaskBlockPlan`; it reads the plan's tables, so it must not outlive the plan."""
    spec, inputs, targets = plan.spec, plan.inputs, plan.targets
    return kind(
        lens=spec.max_seq_lens,
        input_rows=inputs.rows,
        input_low=inputs.low,
        input_high=inputs.high,
        target_rows=targets.rows,
        target_low=targets.low,
        target_high=targets.high,
        gamma=plan.gamma.data_ptr(),
        exp2=plan.exp2.data_ptr(),
    )


class Inputs(NamedTuple):
    """The tensors of a call as the extension reads them; they must live as long as it does."""

    tokens: Tensor  # (B, L) of a type in TOKEN_TYPES, rows contiguous
    sample_ids: Tensor  # int64 (B,), contiguous
    lengths: Tensor | None  # int64 (B, M), contiguous

    @classmethod
    def of(cls, call: MaskArguments) -> "Inputs":
        tokens, lengths = call.tokens, call.lengths
        if tokens.dtype not in TOKEN_TYPES:
            tokens = tokens.to(torch.int64)
        if tokens.stride(1) != 1:
            tokens = tokens.contiguous()
        ids = call.draw.sample_ids.contiguous()
        return cls(tokens, ids, None if lengths is None else lengths.to(torch.int64).contiguous())


def draw_arguments(call: MaskArguments, given: Inputs, native: Any) -> dict[str, Any]:
    """What both passes take."""
    return {
        "plan": native,
        "seed": call.draw.seed,
        "epoch": call.draw.epoch,
        "sample_ids": given.sample_ids.data_ptr(),
        "batch": given.tokens.shape[0],
        "lengths": 0 if given.lengths is None else given.lengths.data_ptr(),
    }


class Side(NamedTuple):
    """The outputs of the inputs or of the targets, of which the first pass writes counts and cu_seqlens."""

    counts: Tensor  # int32 (B, M)
    cu_seqlens: Tensor  # int32 (B + 1,)

    @classmethod
    def empty(cls, call: MaskArguments, empty: Callable[..., Tensor]) -> "Side":
        """Memory from `empty`: torch.empty, with the device if that is not the CPU, where to name it takes 1 µs."""
        batch, modalities = call.tokens.shape[0], len(call.plan.spec.max_seq_lens)
        return cls(empty((batch, modalities), dtype=torch.int32), empty(batch + 1, dtype=torch.int32))


def fill(
    function: Any,
    given: Inputs,
    sides: Sequence[Side],
    sizes: Sequence[int],
    empty: Callable[..., Tensor],
    **others: Any,
) -> tuple[Tensor, ...]:
    """The second pass, by one of the extension's functions, which takes `others` besides: the op's outputs."""
    packed = [[empty(size, dtype=torch.int64) for _ in range(3)] for size in sizes]
    (inputs, targets), (input_ids, input_positions, input_modalities) = sides, packed[0]
    target_ids, target_positions, target_modalities = packed[1]
    function(
        **others,
        tokens=given.tokens.data_ptr(),
        token_type=TOKEN_TYPES[given.tokens.dtype],
        tokens_stride=given.tokens.stride(0),
        input_counts=inputs.counts.data_ptr(),
        input_cu_seqlens=inputs.cu_seqlens.data_ptr(),
        input_ids=input_ids.data_ptr(),
        input_positions=input_positions.data_ptr(),
        input_modalities=input_modalities.data_ptr(),
        input_size=sizes[0],
        input_fill=0,
        target_counts=targets.counts.data_ptr(),
        target_cu_seqlens=targets.cu_seqlens.data_ptr(),
        target_ids=target_ids.data_ptr(),
        target_positions=target_positions.data_ptr(),
        target_modalities=target_modalities.data_ptr(),
        target_size=sizes[1],
        target_fill=IGNORE_INDEX,
    )
    return (*packed[0], inputs.cu_seqlens, inputs.counts, *packed[1], targets.cu_seqlens, targets.counts)
