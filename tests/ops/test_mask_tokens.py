"""mask_tokens: the compiled backend against the reference, invariances, packing, errors, opcheck, compile."""

import hashlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from m4kernels import MaskedBatch, MaskingSpec, _ext, mask_tokens
from m4kernels.ops.mask_tokens import reference

M4 = MaskingSpec((256, 39, 256, 39), (1.5, 1.5, 0.5, 0.5), (0.5, 0.5, 1.5, 1.5), (96, 256), (39, 256))
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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Plain PyTorch is slow when it shares busy cores with other threads; tests of threads set their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def tensors(batch: MaskedBatch) -> list[Tensor]:
    out = []
    for half in (batch.encoder, batch.decoder):
        out += [half.ids, half.positions, half.modalities, half.segments.cu_seqlens, half.segments.counts]
    return out


def assert_equal(actual: MaskedBatch, expected: MaskedBatch) -> None:
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
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


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("name", SPECS)
def test_cpp_equals_reference_bit_for_bit(name: str, ragged: bool) -> None:
    spec = SPECS[name]
    for batch, seed, epoch in ((300, 1, 0), (1, -1, 2**32 - 1), (0, 2**64 - 1, 1), (33, 2**63, 7)):
        tokens, ids, lengths = make_inputs(spec, batch, ragged=ragged, seed=batch)
        keywords = {"seed": seed, "epoch": epoch, "sample_ids": ids, "lengths": lengths}
        expected = mask_tokens(tokens, spec, **keywords, backend="reference")
        assert_equal(mask_tokens(tokens, spec, **keywords, backend="cpp"), expected)
        check_packing(expected, tokens, spec, lengths)


@pytest.mark.parametrize(
    ("name", "samples", "ragged"), [("m4", 16_000, False), ("m4", 8_000, True), ("small", 84_000, True)]
)
def test_cpp_equals_reference_over_100_000_samples(name: str, samples: int, ragged: bool) -> None:
    spec = SPECS[name]
    for start in range(0, samples, 4_000):
        tokens, _, lengths = make_inputs(spec, 4_000, ragged=ragged, seed=start)
        keywords = {"seed": 42, "sample_ids": torch.arange(start, start + 4_000), "lengths": lengths}
        expected = mask_tokens(tokens, spec, **keywords, backend="reference")
        assert_equal(mask_tokens(tokens, spec, **keywords, backend="cpp"), expected)


@pytest.mark.usefixtures("simd_level")
def test_key_ties_go_to_the_lower_position() -> None:
    g = torch.Generator().manual_seed(0)
    top = 2**32 - 1
    for n in (1, 2, 3, 63, 64, 65, 130, 256):
        for pool in ([7], [0, top], [top], [0], [5, 6, 7], list(range(40)), [top - 1, top], [0, 1, 2**31, 2**31 - 1]):
            keys = torch.tensor(pool)[torch.randint(0, len(pool), (60, n), generator=g)]
            available = torch.randint(0, n + 1, (60,), generator=g)
            inputs = (torch.rand(60, generator=g) * (available + 1)).long()
            targets = (torch.rand(60, generator=g) * (available - inputs + 1)).long()
            targets[::7] = (available - inputs)[::7]
            expected = reference.select(keys, available, inputs, targets)
            actual = torch.full((60, n), 0, dtype=torch.uint8)
            words = keys.to(torch.uint32)
            for b in range(60):
                _ext.require().mask_tokens_select(
                    words[b].data_ptr(), int(available[b]), int(inputs[b]), int(targets[b]), actual[b].data_ptr()
                )
            assert torch.equal(actual.long(), expected)
            # The reference itself against sorting pairs.
            for b in range(0, 60, 13):
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


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_golden_hashes(backend: str) -> None:
    """Masks never change: a checkpointed run resumes with the masks it began with, on any machine."""
    rows = torch.arange(64)
    tokens = (torch.arange(64 * M4.num_tokens) * 40503 % 65536).view(64, -1).to(torch.uint16)
    ids = rows * 0x1E3779B97F4A7C15  # wraps: both halves of the ids are in use
    lengths = (rows[:, None] * torch.tensor([5, 1, 7, 3])) % torch.tensor([257, 40, 257, 40])
    hashes = []
    for seed, epoch, available in ((0, 0, None), (-5, 3, lengths)):
        batch = mask_tokens(tokens, M4, seed=seed, epoch=epoch, sample_ids=ids, lengths=available, backend=backend)
        data = b"".join(t.numpy().astype("<i8").tobytes() for t in tensors(batch))
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


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
)
def test_token_dtypes_and_strides(dtype: torch.dtype, backend: str) -> None:
    tokens, ids, _ = make_inputs(SMALL, 6, ragged=False)
    tokens = (tokens.long() % 128).to(dtype)
    expected = mask_tokens(tokens.long(), SMALL, seed=1, sample_ids=ids, backend="reference")
    wide = torch.zeros(6, 2 * SMALL.num_tokens, dtype=torch.int64)
    wide[:, ::2] = tokens.long()
    rows = torch.cat([tokens, tokens], dim=1)[:, : SMALL.num_tokens]
    ids2 = torch.stack([ids, ids], 1)[:, 0]
    for view in (tokens, wide.to(dtype)[:, ::2], rows):
        assert_equal(mask_tokens(view, SMALL, seed=1, sample_ids=ids2, backend=backend), expected)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_capacity(backend: str) -> None:
    tokens, ids, lengths = make_inputs(M4, 9, ragged=True)
    keywords = {"seed": 1, "sample_ids": ids, "lengths": lengths, "backend": backend}
    exact = mask_tokens(tokens, M4, **keywords)
    sizes = [half.ids.shape[0] for half in (exact.encoder, exact.decoder)]
    assert_equal(mask_tokens(tokens, M4, **keywords, capacity=tuple(sizes)), exact)
    roomy = mask_tokens(tokens, M4, **keywords, capacity=(sizes[0] + 5, sizes[1] + 70))
    for half, size, fill in ((roomy.encoder, sizes[0], 0), (roomy.decoder, sizes[1], -100)):
        assert (half.ids[size:] == fill).all()
        assert (half.positions[size:] == 0).all()
        assert (half.modalities[size:] == 0).all()
    for a, e in zip(tensors(roomy), tensors(exact), strict=True):
        assert torch.equal(a[: e.shape[0]], e)
    for key, value in exact.padded().items():
        assert torch.equal(roomy.padded()[key], value)
    for name, i in (("input", 0), ("target", 1)):
        small = list(sizes)
        small[i] -= 1
        with pytest.raises(
            ValueError, match=f"capacity is too small: the {name} tokens need {sizes[i]}, but it gives them {small[i]}"
        ):
            mask_tokens(tokens, M4, **keywords, capacity=tuple(small))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(4, 32)}, "tokens must be integer, got torch.float32"),
        ({"tokens": torch.zeros(4, 32, dtype=torch.bool)}, "tokens must be integer, got torch.bool"),
        ({"tokens": torch.zeros(4, 31, dtype=torch.int64)}, r"tokens must have shape \(B, 32\) .*got \(4, 31\)"),
        ({"tokens": torch.zeros(32, dtype=torch.int64)}, r"tokens must have shape \(B, 32\) .*got \(32,\)"),
        ({"sample_ids": torch.zeros(3, dtype=torch.int64)}, r"sample_ids must be int64 \(4,\), got torch.int64 \(3,\)"),
        ({"sample_ids": torch.zeros(4, dtype=torch.int32)}, r"sample_ids must be int64 \(4,\), got torch.int32"),
        ({"sample_ids": torch.zeros(4, dtype=torch.int64, device="meta")}, "sample_ids is on meta, tokens on cpu"),
        ({"lengths": torch.zeros(4, 4)}, "lengths must be integer, got torch.float32"),
        ({"lengths": torch.zeros(4, 3, dtype=torch.int64)}, r"lengths must have shape \(4, 4\), got \(4, 3\)"),
        ({"lengths": torch.tensor([[1, 1, 1, 1]] * 3 + [[5, 9, 2, 0]])}, r"lengths\[3, 2\] must be 0 to 1 .*got 2"),
        ({"lengths": torch.tensor([[5, -1, 0, 0]] * 4)}, r"lengths\[0, 1\] must be 0 to 9 .*got -1"),
        ({"epoch": -1}, r"epoch must be 0 to 2\*\*32 - 1, got -1"),
        ({"epoch": 2**32}, r"epoch must be 0 to 2\*\*32 - 1, got 4294967296"),
        ({"seed": 2**64}, "seed must fit in 64 bits, got 18446744073709551616"),
        ({"seed": -(2**63) - 1}, "seed must fit in 64 bits"),
        ({"capacity": (1, 2, 3)}, r"capacity must be \(encoder, decoder\), got \(1, 2, 3\)"),
        ({"capacity": (100, -1)}, r"capacity must be two numbers that are not negative, got \[100, -1\]"),
        ({"backend": "cuda"}, "no such backend|cannot run"),
    ],
)
def test_bad_input(change: dict, message: str, backend: str) -> None:
    arguments = {
        "tokens": torch.zeros(4, 32, dtype=torch.int64),
        "seed": 1,
        "sample_ids": torch.arange(4),
        "backend": backend,
    } | change
    with pytest.raises(ValueError, match=message):
        mask_tokens(arguments.pop("tokens"), SMALL, **arguments)


def test_batch_too_large_for_int32_offsets() -> None:
    huge = torch.zeros(1, 590, dtype=torch.uint8).expand(2**23, 590)
    with pytest.raises(ValueError, match=r"may have 2\*\*31 tokens or more: use smaller batches"):
        mask_tokens(huge, M4, seed=0, sample_ids=torch.zeros(1, dtype=torch.int64).expand(2**23))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seq_lens": []}, "max_seq_lens must name 1 to 256 modalities, got 0"),
        ({"max_seq_lens": [4, 0]}, r"max_seq_lens must be 1 to 262144 each, got \[4, 0\]"),
        ({"max_seq_lens": [4, 2**18 + 1]}, "max_seq_lens must be 1 to 262144 each"),
        ({"max_seq_lens": [4, 2.5]}, r"max_seq_lens must be integers, got \[4, 2.5\]"),
        ({"max_seq_lens": 4}, "max_seq_lens must be a list of integers, got 4"),
        ({"max_seq_lens": [4, True]}, "max_seq_lens must be integers"),
        ({"input_alphas": [1.0]}, "input_alphas has 1 values, but max_seq_lens has 2"),
        ({"input_alphas": [1.0, -0.5]}, r"input_alphas must be 0.01 to 1000 each, or 0 for never, got \[1.0, -0.5\]"),
        ({"target_alphas": [1.0, 0.001]}, "target_alphas must be 0.01 to 1000 each"),
        ({"target_alphas": [1.0, float("nan")]}, "target_alphas must be 0.01 to 1000 each"),
        ({"target_alphas": [0, 1e-9]}, "target_alphas must have a positive value"),
        ({"target_alphas": ["1", 1]}, "target_alphas must be numbers"),
        ({"input_tokens_range": [5, 4]}, "input_tokens_range must be two integers .*got"),
        ({"input_tokens_range": [-1, 4]}, "input_tokens_range must be two integers"),
        ({"target_tokens_range": [1, 2, 3]}, "target_tokens_range must be two integers"),
        ({"target_tokens_range": [1, 2**31]}, "target_tokens_range must be two integers"),
    ],
)
def test_bad_spec(change: dict, message: str) -> None:
    good = {
        "max_seq_lens": [4, 5],
        "input_alphas": [1, 1],
        "target_alphas": [1, 1],
        "input_tokens_range": [1, 2],
        "target_tokens_range": [1, 2],
    }
    with pytest.raises(ValueError, match=message):
        MaskingSpec(**(good | change))
    spec = MaskingSpec(**good)
    assert spec.input_alphas == (1.0, 1.0)
    assert hash(spec) == hash(MaskingSpec(**good))


def op_arguments(spec: MaskingSpec, batch: int, capacity: tuple[int, int] | None, backend: str) -> tuple:
    tokens, ids, lengths = make_inputs(spec, batch, ragged=True)
    ranges = (*spec.input_tokens_range, *spec.target_tokens_range)
    return (
        *(tokens.long(), ids, lengths, spec.max_seq_lens, spec.input_alphas, spec.target_alphas),
        *(ranges, -3, 1, capacity, backend),
    )


@pytest.mark.parametrize("capacity", [None, (99, 150)])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_opcheck(backend: str, capacity: tuple[int, int] | None) -> None:
    torch.library.opcheck(torch.ops.m4kernels.mask_tokens.default, op_arguments(SMALL, 5, capacity, backend))


@pytest.mark.parametrize("capacity", [None, (99, 150)])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_compiles_without_graph_break(backend: str, capacity: tuple[int, int] | None) -> None:
    def halves(tokens: Tensor, ids: Tensor, seed: int, epoch: int) -> MaskedBatch:
        return mask_tokens(tokens, SMALL, seed=seed, sample_ids=ids, epoch=epoch, capacity=capacity, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(halves, fullgraph=True, backend="aot_eager")
    # With a capacity shapes are static and the default settings do.
    settings = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=capacity is None, error_on_recompile=False)
    with settings:
        for batch, seed, epoch in ((5, 4, 0), (6, -7, 3), (7, 99, 5), (8, 2**62, 6)):
            if batch == 7:  # by now batch size, seed and epoch are symbols, so that new values compile nothing
                torch._dynamo.config.error_on_recompile = True
            tokens, ids, _ = make_inputs(SMALL, batch, ragged=False)
            actual = compiled(tokens.long(), ids, seed, epoch)
            assert_equal(actual, halves(tokens.long(), ids, seed, epoch))
