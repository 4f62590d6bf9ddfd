"""mask_tokens: every backend against the reference bit for bit, invariances, packing.

Calls themselves are in test_mask_tokens_call.py, what only a GPU or Triton has in test_mask_tokens_cuda.py and
test_mask_tokens_triton.py.
"""

import hashlib

import pytest
import torch

from m4kernels import _ext, mask_tokens
from m4kernels.ops.mask_tokens import reference
from tests.ops.masking import (
    M4,
    SPECS,
    TIED_LENGTHS,
    assert_equal,
    check_packing,
    is_interpreted,
    make_inputs,
    mask_on,
    split,
    tied_keys,
)
from tests.ops.targets import targets

# Plain PyTorch is slow when it shares busy cores with other threads; tests of threads set their own.
pytestmark = pytest.mark.usefixtures("one_thread")
Target = tuple[str, str]


def check_equals_reference(target: Target, name: str, ragged: bool, batches: tuple[int, ...]) -> None:
    spec = SPECS[name]
    draws = {300: (1, 0), 1: (-1, 2**32 - 1), 0: (2**64 - 1, 1), 33: (2**63, 7)}
    for batch in batches:
        seed, epoch = draws[batch]
        tokens, ids, lengths = make_inputs(spec, batch, ragged=ragged, seed=batch)
        keywords = {"seed": seed, "epoch": epoch, "sample_ids": ids, "lengths": lengths}
        expected = mask_tokens(tokens, spec, **keywords, backend="reference")
        assert_equal(mask_on(target, tokens, spec, **keywords), expected)
        check_packing(expected, tokens, spec, lengths)


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("name", SPECS)
def test_cpp_equals_reference_bit_for_bit(name: str, ragged: bool) -> None:
    check_equals_reference(("cpp", "cpu"), name, ragged, (300, 1, 0, 33))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("target", targets("cuda", "triton"))
def test_equals_reference_bit_for_bit(target: Target, name: str) -> None:
    if not is_interpreted(target):
        batches = (300, 1, 0, 33)
    else:
        batches = (1, 0, 33) if name == "one modality" else (33,)
    # 40 modalities are 40 programs, of which once is enough in the interpreter.
    for ragged in (True,) if is_interpreted(target) and name == "many" else (False, True):
        check_equals_reference(target, name, ragged, batches)


@pytest.mark.parametrize(
    ("name", "samples", "ragged"), [("m4", 16_000, False), ("m4", 8_000, True), ("small", 84_000, True)]
)
@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", interpreter=False))
def test_equals_reference_over_100_000_samples(target: Target, name: str, samples: int, ragged: bool) -> None:
    spec = SPECS[name]
    for start in range(0, samples, 4_000):
        tokens, _, lengths = make_inputs(spec, 4_000, ragged=ragged, seed=start)
        keywords = {"seed": 42, "sample_ids": torch.arange(start, start + 4_000), "lengths": lengths}
        expected = mask_tokens(tokens, spec, **keywords, backend="reference")
        assert_equal(mask_on(target, tokens, spec, **keywords), expected)


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("n", TIED_LENGTHS)
def test_key_ties_go_to_the_lower_position(n: int) -> None:
    keys, available, inputs, targets = tied_keys(n)
    expected = reference.select(keys, available, inputs, targets)
    actual = torch.full(keys.shape, 0, dtype=torch.uint8)
    words = keys.to(torch.uint32)
    for b in range(len(keys)):
        _ext.require().mask_tokens_select(
            keys=words[b].data_ptr(),
            n=int(available[b]),
            inputs=int(inputs[b]),
            targets=int(targets[b]),
            roles=actual[b].data_ptr(),
        )
    assert torch.equal(actual.long(), expected)
    # The reference itself against sorting pairs.
    for b in range(0, len(keys), 13):
        ranked = sorted(range(int(available[b])), key=lambda i: (int(keys[b, i]), i))
        assert sorted(ranked[: int(inputs[b])]) == (expected[b] == 1).nonzero().flatten().tolist()


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    words = reference.philox4x32_10(tuple(torch.tensor(c) for c in counter), key)
    from_reference = [int(w) for w in words]
    assert _ext.require().philox4x32_10(counter, key) == from_reference
    return from_reference


def test_philox_known_answers() -> None:
    """Of the Random123 distribution (kat_vectors)."""
    ones = 2**32 - 1
    assert philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((ones,) * 4, (ones,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"))
def test_golden_hashes(target: Target) -> None:
    """Masks never change: a checkpointed run resumes with the masks it began with, on any machine."""
    rows = torch.arange(64)
    tokens = (torch.arange(64 * M4.num_tokens) * 40503 % 65536).view(64, -1).to(torch.uint16)
    ids = rows * 0x1E3779B97F4A7C15  # wraps: both halves of the ids are in use
    lengths = (rows[:, None] * torch.tensor([5, 1, 7, 3])) % torch.tensor([257, 40, 257, 40])
    hashes = []
    for seed, epoch, available in ((0, 0, None), (-5, 3, lengths)):
        batch = mask_on(target, tokens, M4, seed=seed, epoch=epoch, sample_ids=ids, lengths=available)
        data = b"".join(t.numpy().astype("<i8").tobytes() for t in batch.tensors())
        hashes.append(hashlib.sha256(data).hexdigest())
    assert hashes == [
        "db250299a1be0973fa5cf5238409c5a84008cab9de378ca80ea8befb867b8cb3",
        "56690285c5a21f0d57ac42e337f052461d840da357d0f27317c3c609ff404237",
    ]


def test_independent_of_batch_composition_and_order() -> None:
    tokens, ids, lengths = make_inputs(M4, 200, ragged=True)
    whole = split(mask_tokens(tokens, M4, seed=9, sample_ids=ids, lengths=lengths))
    g = torch.Generator().manual_seed(1)
    for rows in (torch.randperm(200, generator=g), torch.arange(3, 200, 17), torch.tensor([5, 5, 199])):
        part = split(mask_tokens(tokens[rows], M4, seed=9, sample_ids=ids[rows], lengths=lengths[rows]))
        for row, sample in zip(rows.tolist(), part, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(sample, whole[row], strict=True))


def test_depends_on_seed_epoch_and_every_bit_of_the_sample_id() -> None:
    tokens, _, _ = make_inputs(M4, 4, ragged=False)
    ids = torch.tensor([1, 1 + 2**32, 1 - 2**63, 2])

    def positions(seed: int, epoch: int) -> list[list[int]]:
        batch = mask_tokens(tokens, M4, seed=seed, epoch=epoch, sample_ids=ids)
        return [sample[0].tolist() for sample in split(batch)]

    base = positions(1, 0)
    assert len({tuple(p) for p in base}) == 4
    for seed, epoch in ((2, 0), (1 + 2**32, 0), (1, 1), (1 - 2**63, 0)):
        assert all(a != b for a, b in zip(positions(seed, epoch), base, strict=True))
    assert positions(-1, 0) == positions(2**64 - 1, 0)


@pytest.mark.usefixtures("simd_level")
def test_independent_of_thread_count() -> None:
    tokens, ids, lengths = make_inputs(M4, 800, ragged=True)  # enough for the kernel to use three threads
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(mask_tokens(tokens, M4, seed=1, sample_ids=ids, lengths=lengths, capacity=(210_000, 210_000)))
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"))
def test_capacity(target: Target) -> None:
    tokens, ids, lengths = make_inputs(M4, 9, ragged=True)
    keywords = {"seed": 1, "sample_ids": ids, "lengths": lengths}
    exact = mask_on(target, tokens, M4, **keywords)
    sizes = [half.ids.shape[0] for half in (exact.encoder, exact.decoder)]
    assert_equal(mask_on(target, tokens, M4, **keywords, capacity=tuple(sizes)), exact)
    roomy = mask_on(target, tokens, M4, **keywords, capacity=(sizes[0] + 5, sizes[1] + 1070))
    for half, size, fill in ((roomy.encoder, sizes[0], 0), (roomy.decoder, sizes[1], -100)):
        assert (half.ids[size:] == fill).all()
        assert (half.positions[size:] == 0).all()
        assert (half.modalities[size:] == 0).all()
    for a, e in zip(roomy.tensors(), exact.tensors(), strict=True):
        assert torch.equal(a[: e.shape[0]], e)
    for key, value in exact.padded().items():
        assert torch.equal(roomy.padded()[key], value)
    for name, i in (("input", 0), ("target", 1)):
        if target[1] != "cpu":
            break  # there an assertion on the device reports it: test_mask_tokens_cuda.py
        small = list(sizes)
        small[i] -= 1
        with pytest.raises(
            ValueError, match=f"capacity is too small: the {name} tokens need {sizes[i]}, but it gives them {small[i]}"
        ):
            mask_on(target, tokens, M4, **keywords, capacity=tuple(small))
