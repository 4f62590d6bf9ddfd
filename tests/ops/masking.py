"""Specs, inputs and assertions that the tests of mask_tokens share."""

import itertools
from typing import Any

import torch
from torch import Tensor

from m4kernels import MaskedBatch, MaskingSpec, mask_tokens
from m4kernels.cases import M4_MASKING as M4

SMALL = MaskingSpec((5, 9, 1, 17), (0.3, 2.0, 5.0, 1.0), (1.0, 0.05, 0.0, 10.0), (0, 20), (1, 30))
SPECS = {
    "m4": M4,
    "small": SMALL,
    "one modality": MaskingSpec((70,), (0.5,), (3.0,), (0, 70), (0, 70)),
    "one token": MaskingSpec((1,), (1.0,), (1.0,), (0, 1), (0, 1)),
    "never": MaskingSpec((64, 65, 3), (0, 0.01, 0), (1, 0, 100.0), (3, 3), (0, 200)),
    "nothing to see": MaskingSpec((8, 8), (1, 1), (1, 1), (0, 0), (0, 0)),
    "everything": MaskingSpec((8, 129), (1000, 1000), (1, 1), (10**9, 10**9), (2**31 - 1, 2**31 - 1)),
    # 40 modalities have more than eight leftovers, so that they take several random blocks.
    "many": MaskingSpec((3,) * 40, (1.0,) * 40, (0.2, 0.0) * 20, (60, 70), (50, 60)),
}


def is_interpreted(target: tuple[str, str]) -> bool:
    """Whether a target of `targets` runs in Triton's interpreter, where a program takes tens of milliseconds."""
    return target == ("triton", "cpu")


def make_inputs(spec: MaskingSpec, batch: int, *, ragged: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """uint16 tokens, arbitrary 64-bit sample ids, and lengths with every fifth at 0 and every fifth full."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 65536, (batch, spec.num_tokens), generator=g).to(torch.uint16)
    ids = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g)
    if not ragged:
        return tokens, ids, None
    longest = torch.tensor(spec.max_seq_lens)
    shape = (batch, len(longest))
    lengths = (torch.rand(shape, generator=g) * (longest + 1)).long()
    kind = torch.randint(0, 5, shape, generator=g)
    return tokens, ids, torch.where(kind == 0, 0, torch.where(kind == 1, longest, lengths))


def mask_on(target: tuple[str, str], tokens: Tensor, spec: MaskingSpec, **keywords: Any) -> MaskedBatch:
    """`mask_tokens` by a target's backend on its device; inputs and result on the CPU."""
    backend, device = target
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in keywords.items()}
    return mask_tokens(tokens.to(device), spec, **moved, backend=backend).to("cpu")


def assert_equal(actual: MaskedBatch, expected: MaskedBatch) -> None:
    for a, e in zip(actual.tensors(), expected.tensors(), strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


def split(batch: MaskedBatch) -> list[list[Tensor]]:
    """The tensors of each sample."""
    samples = []
    for half in (batch.encoder, batch.decoder):
        cu = half.segments.cu_seqlens.tolist()
        samples.append(
            [
                torch.cat([half.ids[a:b], half.positions[a:b], half.modalities[a:b], half.segments.counts[i]])
                for i, (a, b) in enumerate(itertools.pairwise(cu))
            ]
        )
    return [list(pair) for pair in zip(*samples, strict=True)]


def check_packing(batch: MaskedBatch, tokens: Tensor, spec: MaskingSpec, lengths: Tensor | None) -> None:
    """Ids are the tokens at their positions; order, disjointness, lengths and sizes hold."""
    lens = torch.tensor(spec.max_seq_lens)
    offsets = torch.nn.functional.pad(lens.cumsum(0), (1, 0))[:-1]
    used = torch.zeros(tokens.shape, dtype=torch.int64)
    for half, (_, most) in ((batch.encoder, spec.input_tokens_range), (batch.decoder, spec.target_tokens_range)):
        total = int(half.segments.cu_seqlens[-1])
        half.segments.check_values("segments", total)
        assert half.ids.shape == half.positions.shape == half.modalities.shape == (total,)
        assert half.segments.max_seqlen == min(most, spec.num_tokens)
        sample = half.segments.sample_of_token(total)
        place = offsets[half.modalities] + half.positions
        assert torch.equal(half.ids, tokens[sample, place].long())
        order = sample * spec.num_tokens + place
        assert (order.diff() > 0).all()
        available = lens.expand(tokens.shape[0], -1) if lengths is None else lengths
        assert (half.positions < available[sample, half.modalities]).all()
        one_hot = torch.nn.functional.one_hot(half.modalities, len(lens))
        counts = torch.zeros(tokens.shape[0], len(lens), dtype=torch.int64).index_add_(0, sample, one_hot)
        assert torch.equal(counts, half.segments.counts.long())
        used[sample, place] += 1
    assert (used <= 1).all()  # no position is both input and target


TIED_LENGTHS = (1, 2, 3, 63, 64, 65, 130, 256)


def tied_keys(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys int64 (480, n) with many ties; how many of the n are available, are inputs, are targets: (480,) each."""
    g = torch.Generator().manual_seed(n)
    top = 2**32 - 1
    pools = ([7], [0, top], [top], [0], [5, 6, 7], list(range(40)), [top - 1, top], [0, 1, 2**31, 2**31 - 1])
    keys = torch.cat([torch.tensor(pool)[torch.randint(0, len(pool), (60, n), generator=g)] for pool in pools])
    rows = len(keys)
    available = torch.randint(0, n + 1, (rows,), generator=g)
    inputs = (torch.rand(rows, generator=g) * (available + 1)).long()
    targets = (torch.rand(rows, generator=g) * (available - inputs + 1)).long()
    targets[::7] = (available - inputs)[::7]
    return keys, available, inputs, targets
