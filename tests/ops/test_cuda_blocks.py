"""The block programs of the CUDA kernels, run on the host in a random order of threads and blocks: the same source, and
the same Python around it, as on a GPU."""

import dataclasses
import hashlib

import pytest
import torch
from torch import Tensor

from m4kernels import MaskingSpec, _cuda, _ext
from m4kernels.cases import non_contiguous
from m4kernels.dispatch import gpu_mismatch
from m4kernels.ops.mask_tokens import cuda as masking
from m4kernels.ops.mask_tokens import reference as masking_reference
from m4kernels.ops.mask_tokens.arguments import Draw, MaskArguments
from m4kernels.ops.mask_tokens.plan import Plan, make_plan
from m4kernels.ops.quantize_coords import cuda as coords
from m4kernels.ops.quantize_coords import reference as coords_reference
from m4kernels.ops.quantize_coords.arguments import DequantizeArguments, QuantizeArguments
from tests.ops.masking import M4, SMALL, SPECS, TIED_LENGTHS, make_inputs, tied_keys

SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 256.0, 256.0001, -1e-7, 1e38, -1e38)
# Tiles hold 1,024 joints: of many samples, of an odd number of joints, of one sample, or parts of one.
JOINTS = [(5, 1), (400, 13), (79, 13), (3, 341), (3, 342), (3, 511), (2, 513), (2, 700), (2, 1024), (2, 3000)]

ALL_SPECS = SPECS | {"longest": MaskingSpec((2048, 1025), (1.0, 1.0), (1.0, 1.0), (500, 2500), (500, 2500))}


@pytest.fixture(params=[0, 1], ids=["order 0", "order 1"])
def order(request: pytest.FixtureRequest) -> int:
    """The seed of the order of threads and blocks."""
    return request.param


def on_host(order: int, threads: int = 0) -> dict[str, int]:
    """Where the block programs run; 0 threads are as many as on a GPU."""
    return {"order": order, "threads": threads}


def make_joints(n: int, j: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Joints (n, j, 2), of which many lie outside the canvas or are special, visibility, and a pair a sample."""
    g = torch.Generator().manual_seed(n * j)
    xy = torch.rand(n, j, 2, generator=g, dtype=torch.float64) * 400 - 70
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    which = torch.randint(0, 6 * len(SPECIAL), xy.shape, generator=g)
    xy = torch.where(which < len(SPECIAL), special[which % len(SPECIAL)], xy).to(dtype)
    return xy, torch.rand(n, j, generator=g) < 0.8, (torch.rand(n, 2, generator=g) + 0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "j"), [(0, 13), (4, 0), *JOINTS])
def test_quantize_equals_reference_bit_for_bit(n: int, j: int, dtype: torch.dtype, order: int) -> None:
    xy, visible, pairs = make_joints(n, j, dtype)
    for scale, offset in ((None, None), (pairs, (pairs - 1) * 30), (pairs[:, :1], torch.tensor(3.5, dtype=dtype))):
        call = QuantizeArguments(xy, visible, scale, offset, 256.0, 8192)
        actual = coords._quantize("host", on_host(order), call)
        assert actual.dtype == torch.int64
        assert torch.equal(actual, coords_reference.quantize_coords(call))


@pytest.mark.parametrize(("n", "j"), [(0, 13), (4, 0), *JOINTS])
def test_dequantize_equals_reference_bit_for_bit(n: int, j: int, order: int) -> None:
    tokens = torch.randint(-5, 2**40, (n, 3 * j), generator=torch.Generator().manual_seed(j))
    tokens[:, 2 * j :] %= 3
    for kind in (tokens, (tokens % 8192).to(torch.uint16)):
        call = DequantizeArguments(kind, 256.0, 8192)
        actual = coords._dequantize("host", on_host(order), call)
        for a, e in zip(actual, coords_reference.dequantize_coords(call), strict=True):
            assert a.dtype == e.dtype
            assert torch.equal(a, e)


def test_quantize_takes_any_strides_and_alignment() -> None:
    xy, visible, pairs = make_joints(7, 13, torch.float32)
    expected = coords_reference.quantize_coords(QuantizeArguments(xy, visible, pairs, None, 256.0, 8192))
    shifted = torch.zeros(xy.numel() + 1)[1:].view_as(xy).copy_(xy)
    assert shifted.data_ptr() % 16 != 0
    for view in (shifted, non_contiguous(xy)):
        call = QuantizeArguments(view, non_contiguous(visible), non_contiguous(pairs), None, 256.0, 8192)
        assert torch.equal(coords._quantize("host", on_host(3), call), expected)
    assert _cuda.aligned(shifted).data_ptr() % 16 == 0
    assert _cuda.aligned(xy) is xy


def plan_of(spec: MaskingSpec) -> Plan:
    ranges = (*spec.input_tokens_range, *spec.target_tokens_range)
    return make_plan(spec.max_seq_lens, spec.input_alphas, spec.target_alphas, ranges, torch.device("cpu"))


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


@pytest.mark.parametrize("threads", [0, 128])  # as many as on a GPU; so few that every loop takes several passes
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("name", ALL_SPECS)
def test_mask_tokens_equals_reference_bit_for_bit(name: str, ragged: bool, threads: int, order: int) -> None:
    spec = ALL_SPECS[name]
    for batch, seed, epoch in ((40, 1, 0), (1, -1, 2**32 - 1), (0, -(2**63), 1)):
        tokens, ids, lengths = make_inputs(spec, batch, ragged=ragged, seed=batch)
        call = MaskArguments(tokens, Draw(seed, epoch, ids), lengths, plan_of(spec), None)
        actual = masking._mask_tokens("host", on_host(order, threads), call)
        assert_equal(actual, masking_reference.mask_tokens(call))


@pytest.mark.parametrize(("name", "samples", "ragged"), [("m4", 4_000, True), ("small", 20_000, True)])
def test_mask_tokens_equals_reference_over_many_samples(name: str, samples: int, ragged: bool) -> None:
    spec = SPECS[name]
    tokens, _, lengths = make_inputs(spec, samples, ragged=ragged)
    call = MaskArguments(tokens, Draw(42, 0, torch.arange(samples)), lengths, plan_of(spec), None)
    assert_equal(masking._mask_tokens("host", on_host(0), call), masking_reference.mask_tokens(call))


def test_golden_hash() -> None:
    """The same masks as every other backend's (tests/ops/test_mask_tokens.py)."""
    rows = torch.arange(64)
    tokens = (torch.arange(64 * M4.num_tokens) * 40503 % 65536).view(64, -1).to(torch.uint16)
    lengths = (rows[:, None] * torch.tensor([5, 1, 7, 3])) % torch.tensor([257, 40, 257, 40])
    draw = Draw(-5, 3, rows * 0x1E3779B97F4A7C15)
    out = masking._mask_tokens("host", on_host(5), MaskArguments(tokens, draw, lengths, plan_of(M4), None))
    data = b"".join(t.numpy().astype("<i8").tobytes() for t in out)
    digest = hashlib.sha256(data).hexdigest()
    assert digest == "56690285c5a21f0d57ac42e337f052461d840da357d0f27317c3c609ff404237"


@pytest.mark.parametrize("n", TIED_LENGTHS)
def test_key_ties_go_to_the_lower_position(n: int) -> None:
    keys, *_ = tied_keys(n)
    words = keys.to(torch.uint32)
    for b in range(0, len(keys), 7):
        ranks = torch.full((n,), -1, dtype=torch.int32)
        _ext.require().mask_tokens_ranks_host(keys=words[b].data_ptr(), n=n, ranks=ranks.data_ptr())
        ranked = keys[b].argsort(stable=True)
        assert torch.equal(ranks[ranked], torch.arange(n, dtype=torch.int32))


@pytest.mark.parametrize("value", [0, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("name", ["small", "never", "many"])
def test_draw_ties_go_to_the_lower_modality(name: str, value: int) -> None:
    """With constant tables all weights are equal, and all draws for what is left over."""
    spec = SPECS[name]
    plan = dataclasses.replace(plan_of(spec))  # of its own, with other tables
    vars(plan)["gamma"] = torch.full_like(plan_of(spec).gamma, value)
    tokens, ids, lengths = make_inputs(spec, 50, ragged=True)
    call = MaskArguments(tokens, Draw(3, 0, ids), lengths, plan, None)
    assert_equal(masking._mask_tokens("host", on_host(0), call), masking_reference.mask_tokens(call))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
)
def test_token_dtypes_and_strides(dtype: torch.dtype) -> None:
    tokens, ids, _ = make_inputs(SMALL, 6, ragged=False)
    tokens = (tokens.long() % 128).to(dtype)
    call = MaskArguments(tokens, Draw(1, 0, ids), None, plan_of(SMALL), None)
    expected = masking_reference.mask_tokens(call)
    rows = torch.cat([tokens, tokens], dim=1)[:, : SMALL.num_tokens]
    for view in (tokens, rows, non_contiguous(tokens)):
        assert_equal(masking._mask_tokens("host", on_host(1), call._replace(tokens=view)), expected)


@pytest.mark.parametrize("batch", [0, 9])
def test_capacity(batch: int) -> None:
    tokens, ids, lengths = make_inputs(M4, batch, ragged=True)
    call = MaskArguments(tokens, Draw(1, 0, ids), lengths, plan_of(M4), None)
    exact = masking_reference.mask_tokens(call)
    needed = exact[0].shape[0], exact[5].shape[0]
    assert_equal(masking._mask_tokens("host", on_host(0), call._replace(capacity=needed)), exact)
    roomy = call._replace(capacity=(needed[0] + 5, needed[1] + 6000))
    assert_equal(masking._mask_tokens("host", on_host(0), roomy), masking_reference.mask_tokens(roomy))
    for small in ((needed[0] - 1, needed[1]), (needed[0], needed[1] - 1)):
        if batch > 0:
            with pytest.raises(RuntimeError, match="mask_tokens: a length is out of range or the capacity too small"):
                masking._mask_tokens("host", on_host(0), call._replace(capacity=small))


def test_a_batch_that_does_not_fit_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the assertion stops the program later: until then no kernel may write out of bounds."""
    monkeypatch.setattr(torch, "_assert_async", lambda *_: None)
    tokens, ids, _ = make_inputs(M4, 9, ragged=False)
    bad = torch.tensor([[5, 40, 3, 3]]).expand(9, 4)
    poison = torch.iinfo(torch.int64).max
    for lengths, capacity in ((None, (3, 3000)), (None, (3000, 3)), (bad, (3000, 3000))):
        call = MaskArguments(tokens, Draw(1, 0, ids), lengths, plan_of(M4), capacity)
        out = masking._mask_tokens("host", on_host(0), call)
        for side in (out[:3], out[5:8]):
            assert all((values == poison).all() for values in side)  # as tests/ops/conftest.py left it


@pytest.mark.parametrize(("place", "value"), [((3, 2), 2), ((0, 1), -1), ((4, 3), 2**40), ((2, 0), -(2**62))])
def test_bad_length(place: tuple[int, int], value: int) -> None:
    tokens, ids, lengths = make_inputs(SMALL, 5, ragged=True)
    lengths[place] = value
    call = MaskArguments(tokens, Draw(1, 0, ids), lengths, plan_of(SMALL), None)
    with pytest.raises(ValueError, match=rf"lengths\[{place[0]}, {place[1]}\] must be 0 to .*, got {value}$"):
        masking._mask_tokens("host", on_host(0), call)
    with pytest.raises(RuntimeError, match="mask_tokens: a length is out of range"):
        masking._mask_tokens("host", on_host(0), call._replace(capacity=(500, 500)))


@pytest.mark.parametrize(
    ("lens", "reason"),
    [
        ((3,) * 64, None),
        ((3,) * 65, "it takes up to 64 modalities, got 65"),
        ((2048,) * 4, None),
        ((5, 2049), "it takes modalities of up to 2048 tokens, got one of 2049"),
        ((2048, 2048, 2048, 2048, 1), "samples of up to 8192 tokens, each modality rounded up to 32, got 8224"),
    ],
)
def test_specs_that_do_not_fit(lens: tuple[int, ...], reason: str | None) -> None:
    spec = MaskingSpec(lens, (1.0,) * len(lens), (1.0,) * len(lens), (1, 2), (1, 2))
    tokens, ids, _ = make_inputs(spec, 2, ragged=False)
    call = MaskArguments(tokens, Draw(0, 0, ids), None, plan_of(spec), None)
    if reason is not None:
        assert reason in masking.can_run(call)
    else:
        assert masking.can_run(call) is None
        assert_equal(masking._mask_tokens("host", on_host(0), call), masking_reference.mask_tokens(call))


def test_gpu_mismatch() -> None:
    def reason(driver: int, *capability: int) -> str | None:
        return gpu_mismatch("13.0", "80;90;100;120", driver, capability)

    runs = [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)]
    assert all(reason(13000, *capability) is None for capability in runs)
    assert "built for sm_80, sm_90, sm_100, sm_120, but the GPU is an sm_75" in reason(13000, 7, 5)
    assert "M4KERNELS_CUDA_ARCHS=110 pip install" in reason(13000, 11, 0)
    assert "built with CUDA 13.0, but the driver supports only CUDA 12.8: update the driver" in reason(12080, 9, 0)


def test_the_host_permutes_threads_and_blocks_and_misses_no_sync() -> None:
    order_of = _ext.require().host_block_order
    orders = [order_of(5, 64, seed, True) for seed in range(4)]
    for order in orders:
        assert sorted(order) == list(range(5 * 64))
        assert order[:64] != sorted(order[:64])  # threads of a block
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(i // 64 for i in order[::64]) for order in orders}) > 1  # blocks
    with pytest.raises(RuntimeError, match="block program: two phases without a sync between them"):
        order_of(5, 64, 0, False)
