"""mask_tokens: what only the Triton backend has, and cannot be reached through the op."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from m4kernels import MaskingSpec, mask_tokens
from m4kernels.ops.mask_tokens import reference
from m4kernels.ops.mask_tokens import triton as backend
from m4kernels.ops.mask_tokens.triton_kernels import _chosen, _divide
from tests.ops.masking import TIED_LENGTHS, assert_equal, is_interpreted, make_inputs, mask_on, tied_keys
from tests.ops.targets import targets

Target = tuple[str, str]


@triton.jit
def roles_kernel(
    keys,  # uint32 (rows, n)
    counts,  # int32 (3, rows): available, inputs, targets
    roles,  # int32 (rows, n)
    rows,
    n,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_row = i_row < rows
    position = tl.arange(0, BLOCK_N)[None, :]
    available = tl.load(counts + i_row, mask=m_row, other=0)
    m_position = m_row[:, None] & (position < available[:, None])
    key = tl.load(keys + i_row[:, None] * n + position, mask=m_position, other=5)
    in_count = tl.load(counts + rows + i_row, mask=m_row, other=0)
    out_count = tl.load(counts + 2 * rows + i_row, mask=m_row, other=0)
    is_input, is_target = _chosen(key, m_position, in_count, out_count)
    role = is_input.to(tl.int32) + 2 * is_target.to(tl.int32)
    tl.store(roles + i_row[:, None] * n + position, role, mask=m_row[:, None] & (position < n))


@pytest.mark.parametrize("n", TIED_LENGTHS)
@pytest.mark.parametrize("target", targets("triton"))
def test_key_ties_go_to_the_lower_position(target: Target, n: int) -> None:
    keys, *counts = tied_keys(n)
    rows, device = len(keys), target[1]
    samples = 512 if is_interpreted(target) else 1
    roles = torch.empty(keys.shape, dtype=torch.int32, device=device)
    roles_kernel[(triton.cdiv(rows, samples),)](
        keys.to(torch.uint32).to(device),
        torch.stack(counts).to(torch.int32).to(device),
        roles,
        rows,
        n,
        BLOCK_S=samples,
        BLOCK_N=max(16, triton.next_power_of_2(n)),
    )
    assert torch.equal(roles.cpu().long(), reference.select(keys, *counts))


@triton.jit
def divide_kernel(a, b, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, _divide(tl.load(a + i, mask=i < n, other=0), tl.load(b + i, mask=i < n, other=1)), mask=i < n)


@pytest.mark.parametrize("target", targets("triton"))
def test_division_is_exact(target: Target) -> None:
    """Also next to multiples, where a quotient that is off by the least would show."""
    g = torch.Generator().manual_seed(0)
    exponents = torch.rand(3, 20_000, generator=g, dtype=torch.float64)
    b = (2 ** (exponents[0] * 38)).long()  # the sum of 256 weights is at most 2^38
    q = (2 ** (exponents[1] * 31)).long().clamp(max=2**31 - 1)
    r = ((exponents[2] * 5).long() - 2).clamp(min=0) * (b // 2)  # remainder 0, half or all of b
    a = torch.stack([q * b + r + e for e in (-1, 0, 1)]).clamp(min=0, max=2**61).flatten()
    b = b.repeat(3)
    keep = a // b < 2**31
    a, b = a[keep], b[keep]
    out = torch.empty_like(a, device=target[1])
    block = 2**16 if is_interpreted(target) else 256
    divide_kernel[(triton.cdiv(len(a), block),)](a.to(target[1]), b.to(target[1]), out, len(a), BLOCK=block)
    assert torch.equal(out.cpu(), a // b)


@pytest.mark.parametrize("target", targets("triton"))
def test_blocks_of_samples_join(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of the first kernel, whose sums the second reads in several chunks."""
    spec = MaskingSpec((9,), (0.5,), (3.0,), (0, 9), (0, 9))
    tiles = backend.tiles_of

    def small_tiles(*args: Any, **keywords: Any) -> dict[str, int]:
        return tiles(*args, **keywords) | {"BLOCK_B": 4, "BLOCK_S": 2, "CHUNK": 2}

    monkeypatch.setattr(backend, "tiles_of", small_tiles)
    tokens, ids, lengths = make_inputs(spec, 18, ragged=True)
    keywords = {"seed": 5, "sample_ids": ids, "lengths": lengths}
    expected = mask_tokens(tokens, spec, **keywords, backend="reference")
    assert_equal(mask_on(target, tokens, spec, **keywords), expected)


@pytest.mark.parametrize("target", targets("triton"))
def test_longest_modality(target: Target) -> None:
    spec = MaskingSpec((backend.MAX_LENGTH,), (1.0,), (1.0,), (1000, 2000), (1, 3000))
    tokens, ids, lengths = make_inputs(spec, 3, ragged=False)
    expected = mask_tokens(tokens, spec, seed=5, sample_ids=ids, backend="reference")
    assert_equal(mask_on(target, tokens, spec, seed=5, sample_ids=ids), expected)
    longer = MaskingSpec((8, backend.MAX_LENGTH + 1), (1.0, 1.0), (1.0, 1.0), (0, 1), (0, 1))
    tokens, ids, lengths = make_inputs(longer, 3, ragged=True)
    with pytest.raises(ValueError, match="'triton' cannot run: it ranks modalities of up to 4096 tokens, got 4097"):
        mask_on(target, tokens, longer, seed=5, sample_ids=ids, lengths=lengths)
