"""Input builders shared by tests and benchmarks."""

import torch
from torch import Tensor

from m4kernels.segments import Segments

# Mean tokens of (tok_rgb, coords, tok_rgb_next, coords_next) in a sample under the M4 masking rule.
M4_INPUT_MEANS = (66.7, 33.5, 21.5, 16.3)
M4_TARGET_MEANS = (18.3, 2.6, 55.4, 19.1)
M4_MAX_SEQ_LENS = (256, 39, 256, 39)


def random_counts(
    batch: int, max_counts: tuple[int, ...], generator: torch.Generator, *, empty: float = 0.15
) -> Tensor:
    """int32 (B, M) token counts, uniform in [0, max_counts[m]]; a share `empty` of the entries, and of whole samples,
    is 0."""
    top = torch.tensor(max_counts, dtype=torch.float64)
    uniform = torch.rand(batch, len(max_counts), generator=generator, dtype=torch.float64)
    counts = (uniform * (top + 1)).floor().to(torch.int32)
    counts[torch.rand(batch, len(max_counts), generator=generator) < empty] = 0
    counts[torch.rand(batch, generator=generator) < empty] = 0
    return counts


def m4_counts(batch: int, means: tuple[float, ...], generator: torch.Generator) -> Tensor:
    """int32 (B, M) token counts spread about `means`, within the maximum lengths of M4."""
    spread = -torch.rand(batch, len(means), generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
    counts = (torch.tensor(means, dtype=torch.float64) * (0.5 + 0.5 * spread)).round()
    return counts.clamp(max=torch.tensor(M4_MAX_SEQ_LENS, dtype=torch.float64)).to(torch.int32)


def random_segments(
    batch: int, max_counts: tuple[int, ...], generator: torch.Generator, *, empty: float = 0.15
) -> Segments:
    """Segments of `random_counts`."""
    return Segments.from_counts(random_counts(batch, max_counts, generator, empty=empty))


def non_contiguous(x: Tensor) -> Tensor:
    """A view with the values of `x` and a stride of 2 in its last dimension."""
    doubled = torch.stack([x, torch.zeros_like(x)], dim=-1)
    return doubled[..., 0]
