"""What the compiled backends, on the CPU and in CUDA, share: inputs and plans as the extension takes them."""

from typing import Any

import torch
from torch import Tensor

from m4kernels.ops.mask_tokens.plan import Plan
from m4kernels.ops.mask_tokens.reference import Draw

TOKEN_TYPES = {torch.uint16: 0, torch.int32: 1, torch.int64: 2}  # masking::TokenType; others are converted


def native_plan(kind: Any, plan: Plan) -> Any:
    """The extension's `MaskPlan` or `MaskBlockPlan`; it reads the plan's tables, so it must not outlive the plan."""
    spec, inputs, targets = plan.spec, plan.inputs, plan.targets
    return kind(
        spec.max_seq_lens,
        *(inputs.rows, inputs.low, inputs.high),
        *(targets.rows, targets.low, targets.high),
        *(plan.gamma.data_ptr(), plan.exp2.data_ptr()),
    )


def readable(tokens: Tensor, draw: Draw, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """tokens (B, L) of a type in `TOKEN_TYPES` with contiguous rows; sample ids int64 (B,) and lengths int64 (B, M),
    contiguous."""
    if tokens.dtype not in TOKEN_TYPES:
        tokens = tokens.to(torch.int64)
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    return tokens, draw.sample_ids.contiguous(), None if lengths is None else lengths.to(torch.int64).contiguous()
