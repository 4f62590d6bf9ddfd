"""Calls of mask_tokens: dtypes and strides, errors, the spec, opcheck, compile."""

import pytest
import torch
from torch import Tensor

from m4kernels import MaskedBatch, MaskingSpec, mask_tokens
from tests.ops.masking import M4, SMALL, assert_equal, is_interpreted, make_inputs, mask_on
from tests.ops.targets import targets

Target = tuple[str, str]
TINY = MaskingSpec((5, 17), (0.3, 2.0), (1.0, 0.05), (0, 20), (1, 30))
# Where a length out of range raises; on CUDA an assertion on the device reports it: test_mask_tokens_cuda.py.
ON_CPU = [parameter for parameter in targets("cpp", "cuda", "triton", "reference") if parameter.values[0][1] == "cpu"]


@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"))
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
)
def test_token_dtypes_and_strides(dtype: torch.dtype, target: Target) -> None:
    tokens, ids, _ = make_inputs(SMALL, 6, ragged=False)
    tokens = (tokens.long() % 128).to(dtype)
    expected = mask_tokens(tokens.long(), SMALL, seed=1, sample_ids=ids, backend="reference")
    device = target[1]  # a copy to another device may not keep the strides
    tokens, ids = tokens.long().to(device), ids.to(device)
    wide = torch.zeros(6, 2 * SMALL.num_tokens, dtype=torch.int64, device=device)
    wide[:, ::2] = tokens
    rows = torch.cat([tokens, tokens], dim=1).to(dtype)[:, : SMALL.num_tokens]
    ids2 = torch.stack([ids, ids], 1)[:, 0]
    views = (wide.to(dtype)[:, ::2], tokens.to(dtype), rows)
    for view in views[:1] if is_interpreted(target) else views:
        assert_equal(mask_on(target, view, SMALL, seed=1, sample_ids=ids2), expected)


@pytest.mark.parametrize("target", ON_CPU)
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
def test_bad_input(change: dict, message: str, target: Target) -> None:
    arguments = {
        "tokens": torch.zeros(4, 32, dtype=torch.int64),
        "seed": 1,
        "sample_ids": torch.arange(4),
        "backend": target[0],
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


def op_arguments(spec: MaskingSpec, batch: int, capacity: tuple[int, int] | None, target: Target) -> tuple:
    backend, device = target
    tokens, ids, lengths = make_inputs(spec, batch, ragged=True)
    ranges = (*spec.input_tokens_range, *spec.target_tokens_range)
    return (
        *(
            tokens.long().to(device),
            ids.to(device),
            lengths.to(device),
            spec.max_seq_lens,
            spec.input_alphas,
            spec.target_alphas,
        ),
        *(ranges, -3, 1, capacity, backend),
    )


@pytest.mark.parametrize("capacity", [None, (99, 150)])
@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"))
def test_opcheck(target: Target, capacity: tuple[int, int] | None) -> None:
    torch.library.opcheck(torch.ops.m4kernels.mask_tokens.default, op_arguments(TINY, 5, capacity, target))


@pytest.mark.parametrize("capacity", [None, (99, 150)])
@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"))
def test_compiles_without_graph_break(target: Target, capacity: tuple[int, int] | None) -> None:
    backend, device = target

    def halves(tokens: Tensor, ids: Tensor, seed: int, epoch: int) -> MaskedBatch:
        return mask_tokens(tokens, TINY, seed=seed, sample_ids=ids, epoch=epoch, capacity=capacity, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(halves, fullgraph=True, backend="aot_eager")
    # With a capacity shapes are static and the default settings do.
    settings = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=capacity is None, error_on_recompile=False)
    with settings:
        for batch, seed, epoch in ((5, 4, 0), (6, -7, 3), (7, 99, 5), (8, 2**62, 6)):
            if batch == 7:  # by now batch size, seed and epoch are symbols, so that new values compile nothing
                torch._dynamo.config.error_on_recompile = True
            tokens, ids, _ = make_inputs(TINY, batch, ragged=False)
            expected = mask_tokens(
                tokens.long(), TINY, seed=seed, sample_ids=ids, epoch=epoch, capacity=capacity, backend="reference"
            )
            assert_equal(compiled(tokens.long().to(device), ids.to(device), seed, epoch).to("cpu"), expected)
