"""Input builders shared by tests and benchmarks."""

import torch
from torch import Tensor

from m4kernels.ops.mask_tokens.spec import MaskingSpec
from m4kernels.segments import MaskedBatch, PackedTokens, Segments

# Mean tokens of (tok_rgb, coords, tok_rgb_next, coords_next) in a sample under the M4 masking rule.
M4_INPUT_MEANS = (66.7, 33.5, 21.5, 16.3)
M4_TARGET_MEANS = (18.3, 2.6, 55.4, 19.1)
M4_MAX_SEQ_LENS = (256, 39, 256, 39)
M4_MASKING = MaskingSpec(M4_MAX_SEQ_LENS, (1.5, 1.5, 0.5, 0.5), (0.5, 0.5, 1.5, 1.5), (96, 256), (39, 256))


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


def random_packed(
    segments: Segments, vocab_sizes: tuple[int, ...], generator: torch.Generator, *, tail: int = 0, tail_id: int = 0
) -> PackedTokens:
    """Random ids below vocab_sizes[m] at ascending positions of each modality, then `tail` tokens of no sample."""
    modalities, positions = [], []
    for row in segments.counts.tolist():
        for index, count in enumerate(row):
            modalities.append(torch.full((count,), index))
            positions.append(torch.randperm(max(2 * count, 1), generator=generator)[:count].sort().values)
    nothing = torch.zeros(0, dtype=torch.int64)
    modality = torch.cat([nothing, *modalities])
    limit = torch.tensor(vocab_sizes)[modality]
    ids = (torch.rand(len(modality), generator=generator, dtype=torch.float64) * limit).long()
    pad = torch.zeros(tail, dtype=torch.int64)
    return PackedTokens(
        torch.cat([ids, pad + tail_id]),
        torch.cat([nothing, *positions, pad]),
        torch.cat([modality, pad]),
        segments,
    )


def random_masked_batch(
    batch: int,
    max_inputs: tuple[int, ...],
    max_targets: tuple[int, ...],
    vocab_sizes: tuple[int, ...],
    generator: torch.Generator,
    *,
    tail: int = 0,
    empty: float = 0.15,
) -> MaskedBatch:
    """A masked batch with random counts, ids and positions; positions stay below twice the largest count."""
    inputs = random_segments(batch, max_inputs, generator, empty=empty)
    targets = random_segments(batch, max_targets, generator, empty=empty)
    return MaskedBatch(
        random_packed(inputs, vocab_sizes, generator, tail=tail),
        random_packed(targets, vocab_sizes, generator, tail=tail, tail_id=-100),
    )


def non_contiguous(x: Tensor) -> Tensor:
    """A view with the values of `x` and a stride of 2 in its last dimension."""
    doubled = torch.stack([x, torch.zeros_like(x)], dim=-1)
    return doubled[..., 0]
