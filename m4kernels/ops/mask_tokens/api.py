"""Public function mask_tokens and its registration with torch.library."""

from collections.abc import Sequence

import torch
from torch import Tensor

from m4kernels._library import Op
from m4kernels.dispatch import Dispatcher
from m4kernels.ops.mask_tokens.plan import make_plan
from m4kernels.ops.mask_tokens.reference import Draw
from m4kernels.ops.mask_tokens.spec import MaskingSpec
from m4kernels.segments import MaskedBatch, PackedTokens, Segments

dispatcher = Dispatcher("mask_tokens", ("cuda", "triton", "cpp", "reference"))


def mask_tokens(
    tokens: Tensor,  # (B, L)
    spec: MaskingSpec,
    *,
    seed: int,
    sample_ids: Tensor,  # (B,)
    epoch: int = 0,
    lengths: Tensor | None = None,  # (B, M)
    capacity: tuple[int, int] | None = None,
    backend: str | None = None,
) -> MaskedBatch:
    """Random input and target tokens of every sample, packed: nano4M's masking rule.

    A sample gets n_in input and n_out target tokens, uniform in the spec's ranges. A Dirichlet draw shares them out
    among the modalities; leftovers of rounding down go to the largest of a fresh draw each; inputs are clamped to the
    length of the modality, then targets to what is left of it. Which positions these are is a random permutation for
    each modality. The mask is a pure function of (seed, epoch, sample id): whatever the batch, the device or the
    backend, to the last bit. `ops/mask_tokens/reference.py` says how.

    Args:
        tokens: integer, L = sum(spec.max_seq_lens), modality after modality.
        spec: what to draw.
        seed: any 64-bit number; a negative one stands for its two's complement.
        sample_ids: int64, the samples' identities, on the device of the tokens.
        epoch: 0 to 2**32 - 1.
        lengths: integer, tokens that each modality of a sample has, 0 to max_seq_lens; default all.
        capacity: (encoder, decoder) packed lengths to fill up to, so that shapes do not depend on data. The tail
            belongs to no sample: ids 0, targets -100, positions and modalities 0. Without it a GPU is waited for, and
            torch.compile needs torch._dynamo.config.capture_dynamic_output_shape_ops = True.
        backend: "cuda", "triton", "cpp" or "reference"; default the fastest that can run.

    Returns:
        Encoder (inputs) and decoder (targets): ids, positions, modalities int64 (T,), in every sample ordered by
        modality, then position; segments with cu_seqlens int32 (B + 1,) and counts int32 (B, M).

    Raises:
        ValueError: a shape, dtype, device or number does not fit, a length is out of range, or the capacity is too
            small; the message names the argument. On a GPU a device assertion may report the last two, and does where
            a capacity is given.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"mask_tokens: seed must fit in 64 bits, got {seed}")
    if capacity is not None and len(capacity) != 2:
        raise ValueError(f"mask_tokens: capacity must be (encoder, decoder), got {capacity}")
    outputs = _op(
        tokens,
        sample_ids,
        lengths,
        spec.max_seq_lens,
        spec.input_alphas,
        spec.target_alphas,
        (*spec.input_tokens_range, *spec.target_tokens_range),
        seed if seed < 2**63 else seed - 2**64,
        epoch,
        capacity,
        backend or "",
    )
    longest_in = min(spec.input_tokens_range[1], spec.num_tokens)
    longest_out = min(spec.target_tokens_range[1], spec.num_tokens)
    return MaskedBatch(_packed(outputs[:5], longest_in), _packed(outputs[5:], longest_out))


def _packed(outputs: Sequence[Tensor], max_seqlen: int) -> PackedTokens:
    ids, positions, modalities, cu_seqlens, counts = outputs
    return PackedTokens(ids, positions, modalities, Segments(cu_seqlens, counts, max_seqlen))


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _check(
    tokens: Tensor,
    sample_ids: Tensor,
    lengths: Tensor | None,
    max_seq_lens: Sequence[int],
    token_ranges: Sequence[int],
    epoch: int,
    capacity: Sequence[int] | None,
) -> None:
    op = "mask_tokens"
    width = sum(max_seq_lens)
    if not _is_integer(tokens):
        raise ValueError(f"{op}: tokens must be integer, got {tokens.dtype}")
    if tokens.dim() != 2 or tokens.shape[1] != width:
        raise ValueError(f"{op}: tokens must have shape (B, {width}) for this spec, got {tuple(tokens.shape)}")
    batch = tokens.shape[0]
    if sample_ids.dtype != torch.int64 or sample_ids.dim() != 1 or sample_ids.shape[0] != batch:
        raise ValueError(f"{op}: sample_ids must be int64 ({batch},), got {sample_ids.dtype} {tuple(sample_ids.shape)}")
    if sample_ids.device != tokens.device:
        raise ValueError(f"{op}: sample_ids is on {sample_ids.device}, tokens on {tokens.device}")
    if lengths is not None:
        if not _is_integer(lengths):
            raise ValueError(f"{op}: lengths must be integer, got {lengths.dtype}")
        if lengths.shape != (batch, len(max_seq_lens)):
            raise ValueError(
                f"{op}: lengths must have shape ({batch}, {len(max_seq_lens)}), got {tuple(lengths.shape)}"
            )
        if lengths.device != tokens.device:
            raise ValueError(f"{op}: lengths is on {lengths.device}, tokens on {tokens.device}")
    if not 0 <= epoch < 2**32:
        raise ValueError(f"{op}: epoch must be 0 to 2**32 - 1, got {epoch}")
    if capacity is not None and (len(capacity) != 2 or min(capacity) < 0):
        raise ValueError(f"{op}: capacity must be two numbers that are not negative, got {list(capacity)}")
    if batch * min(width, max(token_ranges[1], token_ranges[3])) >= 2**31:
        raise ValueError(f"{op}: {batch} samples may have 2**31 tokens or more: use smaller batches")


def _mask_tokens(
    tokens: Tensor,
    sample_ids: Tensor,
    lengths: Tensor | None,
    max_seq_lens: Sequence[int],
    input_alphas: Sequence[float],
    target_alphas: Sequence[float],
    token_ranges: Sequence[int],
    seed: int,
    epoch: int,
    capacity: Sequence[int] | None,
    backend: str,
) -> tuple[Tensor, ...]:
    plan = make_plan(tuple(max_seq_lens), tuple(input_alphas), tuple(target_alphas), tuple(token_ranges), tokens.device)
    _check(tokens, sample_ids, lengths, max_seq_lens, token_ranges, epoch, capacity)
    args = (tokens, Draw(seed, epoch, sample_ids), lengths, plan, capacity)
    return dispatcher.select(backend, *args).mask_tokens(*args)


def _mask_tokens_fake(
    tokens: Tensor,
    sample_ids: Tensor,
    lengths: Tensor | None,
    max_seq_lens: Sequence[int],
    input_alphas: Sequence[float],
    target_alphas: Sequence[float],
    token_ranges: Sequence[int],
    seed: int,
    epoch: int,
    capacity: Sequence[int] | None,
    backend: str,
) -> tuple[Tensor, ...]:
    _check(tokens, sample_ids, lengths, max_seq_lens, token_ranges, epoch, capacity)
    batch = tokens.shape[0]
    sizes: Sequence[int | torch.SymInt]
    if capacity is not None:
        sizes = capacity
    else:
        context = torch.library.get_ctx()
        sizes = [context.new_dynamic_size(), context.new_dynamic_size()]
    out: list[Tensor] = []
    for size in sizes:
        out += [tokens.new_empty(size, dtype=torch.int64) for _ in range(3)]
        out.append(tokens.new_empty(batch + 1, dtype=torch.int32))
        out.append(tokens.new_empty((batch, len(max_seq_lens)), dtype=torch.int32))
    return tuple(out)


_op = Op(
    "mask_tokens(Tensor tokens, Tensor sample_ids, Tensor? lengths, int[] max_seq_lens, float[] input_alphas,"
    " float[] target_alphas, int[] token_ranges, SymInt seed, SymInt epoch, SymInt[]? capacity, str backend)"
    f" -> ({', '.join(['Tensor'] * 10)})",
    _mask_tokens,
    _mask_tokens_fake,
)
