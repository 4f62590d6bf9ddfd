"""What every backend needs of a MaskingSpec, worked out once."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from m4kernels.ops.mask_tokens.spec import MaskingSpec
from m4kernels.ops.mask_tokens.tables import exp2_table, gamma_tables

NEVER = -1


@dataclass(frozen=True)
class Side:
    """The draw of the inputs or of the targets.

    Args:
        rows: for each modality the row of its alpha in `Plan.gamma`, or NEVER.
        low: fewest tokens.
        high: most tokens.
    """

    rows: tuple[int, ...]
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A MaskingSpec for one device; its tables are made when first asked for.

    Args:
        spec: the spec.
        alphas: the positive alphas, each once, ascending.
        inputs: draw of the inputs.
        targets: draw of the targets.
        device: of the tables.
    """

    spec: MaskingSpec
    alphas: tuple[float, ...]
    inputs: Side
    targets: Side
    device: torch.device

    @functools.cached_property
    def gamma(self) -> Tensor:
        """int32 (len(alphas), 2, KNOTS)"""
        return gamma_tables(self.alphas, self.device)

    @functools.cached_property
    def exp2(self) -> Tensor:
        """int32 (EXP2_KNOTS,)"""
        return exp2_table(self.device)


@functools.lru_cache(maxsize=64)
def make_plan(
    max_seq_lens: tuple[int, ...],
    input_alphas: tuple[float, ...],
    target_alphas: tuple[float, ...],
    token_ranges: tuple[int, ...],
    device: torch.device,
) -> Plan:
    """The plan of a spec given as the op's arguments, `token_ranges` being both ranges one after the other."""
    if len(token_ranges) != 4:
        raise ValueError(f"mask_tokens: token_ranges must be both ranges, four numbers, got {token_ranges}")
    a, b, c, d = token_ranges
    spec = MaskingSpec(max_seq_lens, input_alphas, target_alphas, (a, b), (c, d))
    alphas = tuple(sorted({alpha for alpha in spec.input_alphas + spec.target_alphas if alpha > 0}))

    def side(of: tuple[float, ...], ends: tuple[int, int]) -> Side:
        return Side(tuple(alphas.index(alpha) if alpha > 0 else NEVER for alpha in of), *ends)

    inputs = side(spec.input_alphas, spec.input_tokens_range)
    return Plan(spec, alphas, inputs, side(spec.target_alphas, spec.target_tokens_range), device)
