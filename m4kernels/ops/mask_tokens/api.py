"""Public function mask_tokens and its registration with torch.library."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from m4kernels import _checks
from m4kernels._library import Op
from m4kernels.dispatch import Dispatcher
from m4kernels.ops.mask_tokens.arguments import OP, MaskArguments, MaskBackend, check_capacity, check_epoch
from m4kernels.ops.mask_tokens.spec import MaskingSpec
from m4kernels.segments import MaskedBatch, PackedTokens, Segments

dispatcher: Dispatcher[MaskBackend] = Dispatcher(OP, ("cuda", "triton", "cpp", "reference"), MaskBackend)


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
        tokens: integer, L = sum(spec.max_seq_lens), modality after modality; uint64 as `tokens.to(torch.int64)` reads
            it.
        spec: what to draw.
        seed: any 64-bit number; a negative one stands for its two's complement.
        sample_ids: int64, the samples' identities, on the device of the tokens.
        epoch: 0 to 2**32 - 1.
        lengths: integer, tokens that each modality of a sample has, 0 to max_seq_lens; default all.
        capacity: (encoder, decoder) packed lengths to fill up to, so that shapes do not depend on data. The tail
            belongs to no sample: ids 0, targets -100, positions and modalities 0. Without it a GPU is waited for,
            torch.compile needs torch._dynamo.config.capture_dynamic_output_shape_ops = True, and meta tensors, whose
            values are not known, and vmap, whose results have one shape, are refused.
        backend: "cuda", "triton", "cpp", "reference" or "auto", the fastest that can run; default what the variable
            M4KERNELS_BACKEND names, else auto.

    Returns:
        Encoder (inputs) and decoder (targets): ids, positions, modalities int64 (T,), in every sample ordered by
        modality, then position; segments with cu_seqlens int32 (B + 1,) and counts int32 (B, M).

    Raises:
        ValueError: a shape, dtype, device or number does not fit, a length is out of range, or the capacity is too
            small; the message names the argument. On a GPU a device assertion may report the last two, and does where
            a capacity is given.
    """
    if not isinstance(spec, MaskingSpec):
        raise ValueError(f"mask_tokens: spec must be a MaskingSpec, got {type(spec).__name__}")
    if type(seed) is not int:
        seed = _checks.integer("mask_tokens: seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"mask_tokens: seed must fit in 64 bits, got {seed}")
    if type(epoch) is not int:
        epoch = _checks.integer("mask_tokens: epoch", epoch)
    if not 0 <= epoch < 2**32:
        check_epoch(epoch)  # before the schema, whose integers have 64 bits
    capacity = None if capacity is None else _capacity(capacity)
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


def _capacity(capacity: Any) -> tuple[int, int]:
    if isinstance(capacity, (str, Tensor)) or not isinstance(capacity, Iterable):
        raise ValueError(f"mask_tokens: capacity must be (encoder, decoder), got {capacity!r}; expected two integers")
    sizes = tuple(_checks.integer("mask_tokens: capacity", size) for size in capacity)
    if len(sizes) != 2:
        raise ValueError(f"mask_tokens: capacity must be (encoder, decoder), got {sizes}; expected two integers")
    check_capacity(sizes)
    return sizes


def _packed(outputs: Sequence[Tensor], max_seqlen: int) -> PackedTokens:
    ids, positions, modalities, cu_seqlens, counts = outputs
    return PackedTokens(ids, positions, modalities, Segments(cu_seqlens, counts, max_seqlen))


def _mask_tokens(*args: Any) -> tuple[Tensor, ...]:
    call = MaskArguments.from_flat(*args[:-1])
    call.check_structure()
    return dispatcher.select(args[-1], call).mask_tokens(call)


def _mask_tokens_fake(*args: Any) -> tuple[Tensor, ...]:
    call = MaskArguments.from_flat(*args[:-1])
    call.check_structure()
    tokens, batch = call.tokens, call.tokens.shape[0]
    sizes: Sequence[int | torch.SymInt]
    if call.capacity is not None:
        sizes = call.capacity
    else:
        context = torch.library.get_ctx()
        sizes = [context.new_dynamic_size(), context.new_dynamic_size()]
    out: list[Tensor] = []
    for size in sizes:
        out += [tokens.new_empty(size, dtype=torch.int64) for _ in range(3)]
        out.append(tokens.new_empty(batch + 1, dtype=torch.int32))
        out.append(tokens.new_empty((batch, call.plan.spec.num_modalities), dtype=torch.int32))
    return tuple(out)


_op = Op(
    "mask_tokens(Tensor tokens, Tensor sample_ids, Tensor? lengths, int[] max_seq_lens, float[] input_alphas,"
    " float[] target_alphas, int[] token_ranges, SymInt seed, SymInt epoch, SymInt[]? capacity, str backend)"
    f" -> ({', '.join(['Tensor'] * 10)})",
    _mask_tokens,
    _mask_tokens_fake,
)
