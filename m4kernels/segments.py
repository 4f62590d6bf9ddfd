"""Packed ragged batches: the samples' tokens one after another, and where each sample and modality begins.

`Segments` is the (cu_seqlens, max_seqlen) of variable-length attention with, besides, the number of tokens of every
modality in every sample. Within a sample tokens are ordered by modality, then by position.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from m4kernels import _checks, _ext, _library


@dataclass(frozen=True)
class Segments:
    """Where each sample and modality lies in a packed sequence of T tokens.

    Args:
        cu_seqlens: int32 (B + 1,), sample b is tokens cu_seqlens[b] to cu_seqlens[b + 1]; the first is 0. Tokens from
            cu_seqlens[B] on belong to no sample: the tail of a batch of fixed capacity.
        counts: int32 (B, M), tokens of each modality in each sample; a row sums to the sample's length.
        max_seqlen: an upper bound of the longest sample, known without asking the device.
    """

    cu_seqlens: Tensor
    counts: Tensor
    max_seqlen: int

    @property
    def batch_size(self) -> int:
        return self.counts.shape[0]

    @property
    def num_modalities(self) -> int:
        return self.counts.shape[1]

    @classmethod
    def from_counts(cls, counts: Tensor, max_seqlen: int | None = None) -> "Segments":
        """Segments of samples with these token counts.

        Args:
            counts: integer (B, M), not negative, fewer than 2**31 tokens in all.
            max_seqlen: an upper bound of the longest sample; default the longest, which waits for the device.

        Raises:
            ValueError: a shape, dtype or value does not fit. With `max_seqlen` a device assertion reports values on a
                GPU, and nobody those of tensors without any (meta, under a tracer).
        """
        _checks.tensor("Segments: counts", counts)
        if counts.dim() != 2:
            raise ValueError(f"Segments: counts must have shape (B, M), got {tuple(counts.shape)}")
        if not _checks.is_integer_dtype(counts.dtype):
            raise ValueError(f"Segments: counts must be integer, got {counts.dtype}")
        if max_seqlen is not None:
            max_seqlen = _checks.integer("Segments: max_seqlen", max_seqlen)
        elif counts.is_meta:
            raise ValueError("Segments: max_seqlen is needed for counts on the meta device, which have no values")
        counts = counts.to(torch.int64)
        lengths = counts.sum(1)
        if max_seqlen is None or _has_values(counts):
            max_seqlen = _check_counts(counts, lengths, max_seqlen)
        elif counts.is_cuda:
            right = (counts >= 0).all() & (lengths.sum() < 2**31) & (lengths <= max_seqlen).all()
            torch._assert_async(right, "Segments: counts are negative, 2**31 or more, or exceed max_seqlen")
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return cls(cu_seqlens.to(torch.int32), counts.to(torch.int32), max_seqlen)

    def tensors(self) -> list[Tensor]:
        """cu_seqlens, counts"""
        return [self.cu_seqlens, self.counts]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Segments":
        """The same with every tensor replaced by what the function makes of it."""
        return replace(self, cu_seqlens=function(self.cu_seqlens), counts=function(self.counts))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Segments":
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def sample_of_token(self, total: int) -> Tensor:
        """int64 (total,): the sample of each token; B for tokens that belong to none."""
        tokens = torch.arange(total, dtype=torch.int32, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), tokens, right=True)

    def check_structure(self, name: str) -> None:
        """Raise ValueError where shapes or dtypes do not fit; reads no values, so it never waits for a device."""
        cu, counts = self.cu_seqlens, self.counts
        if type(self.max_seqlen) is not int:
            _checks.integer(f"{name}.max_seqlen", self.max_seqlen)
        if counts.dim() != 2 or counts.dtype != torch.int32:
            raise ValueError(f"{name}.counts must be int32 (B, M), got {counts.dtype} {tuple(counts.shape)}")
        if cu.dtype != torch.int32 or cu.shape != (counts.shape[0] + 1,):
            raise ValueError(
                f"{name}.cu_seqlens must be int32 ({counts.shape[0] + 1},), got {cu.dtype} {tuple(cu.shape)}"
            )
        if cu.device != counts.device:
            raise ValueError(f"{name}.cu_seqlens is on {cu.device}, {name}.counts on {counts.device}")
        if not 0 <= self.max_seqlen < 2**31:
            raise ValueError(f"{name}.max_seqlen must not be negative, and below 2**31, got {self.max_seqlen}")

    def check_values(self, name: str, total: int) -> None:
        """Raise ValueError unless the segments are consistent and lie within `total` tokens. Reads the values: use it
        on CPU tensors, where that is free of synchronisation."""
        self.check_structure(name)
        if self._found_consistent(total):
            return
        cu, counts = self.cu_seqlens, self.counts
        if int(cu[0]) != 0:
            raise ValueError(f"{name}.cu_seqlens must start at 0, got {int(cu[0])}")
        lengths = cu[1:] - cu[:-1]
        if bool((lengths < 0).any()):
            raise ValueError(f"{name}.cu_seqlens must not decrease, got {cu.tolist()[:16]}")
        if int(cu[-1]) > total:
            raise ValueError(f"{name}.cu_seqlens ends at {int(cu[-1])}, but there are only {total} tokens")
        if bool((counts < 0).any()):
            raise ValueError(f"{name}.counts must not be negative")
        wrong = counts.sum(1, dtype=torch.int32) != lengths
        if bool(wrong.any()):
            b = int(wrong.nonzero()[0])
            raise ValueError(
                f"{name}.counts of sample {b} add up to {int(counts[b].sum())}, but cu_seqlens gives it "
                f"{int(lengths[b])} tokens"
            )
        if lengths.numel() and int(lengths.max()) > self.max_seqlen:
            raise ValueError(f"{name}.max_seqlen is {self.max_seqlen}, but a sample has {int(lengths.max())} tokens")

    def _found_consistent(self, total: int) -> bool:
        """Whether the compiled check, in a microsecond instead of fifty, finds no fault: every layer of a model asks
        about the same segments. It does not say what a fault is, and may be absent."""
        cu, counts = self.cu_seqlens, self.counts
        extension = _ext.load()
        if extension is None or cu.device.type != "cpu" or not (cu.is_contiguous() and counts.is_contiguous()):
            return False
        samples, modalities = counts.shape
        return extension.segments_consistent(
            cu_seqlens=cu.data_ptr(),
            counts=counts.data_ptr(),
            batch=samples,
            modalities=modalities,
            total=total,
            max_seqlen=self.max_seqlen,
        )


def _has_values(x: Tensor) -> bool:
    """Whether values can be read without waiting: those of a plain tensor on the CPU, outside any tracer."""
    if torch.compiler.is_compiling() or _library.in_transform():
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu


def _check_counts(counts: Tensor, lengths: Tensor, max_seqlen: int | None) -> int:
    """`max_seqlen`, by default the longest; ValueError unless counts int64 (B, M), which add up to lengths, are fit."""
    if not counts.numel():
        return max_seqlen or 0
    lowest, longest = int(counts.min()), int(lengths.max())
    if lowest < 0:
        b, m = (counts < 0).nonzero()[0].tolist()
        raise ValueError(f"Segments: counts must not be negative, got counts[{b}, {m}] = {int(counts[b, m])}")
    # Sums of int64 might wrap around; float64 ones are near enough.
    total = float(counts.double().sum())
    if total >= 2**31:
        raise ValueError(f"Segments: counts must be fewer than 2**31 tokens in all, got {total:.0f}: use fewer samples")
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(f"Segments: max_seqlen is {max_seqlen}, but a sample has {longest} tokens")
    return longest if max_seqlen is None else max_seqlen


@dataclass(frozen=True)
class PackedTokens:
    """Packed tokens and where they belong.

    Args:
        ids: int64 (T,), token ids; for a decoder the targets. In the tail of a batch of fixed capacity 0, or -100 for
            targets.
        positions: int64 (T,), position within the token's modality.
        modalities: int64 (T,), index of the modality.
        segments: where each sample and modality lies.
    """

    ids: Tensor
    positions: Tensor
    modalities: Tensor
    segments: Segments

    def tensors(self) -> list[Tensor]:
        """ids, positions, modalities, cu_seqlens, counts"""
        return [self.ids, self.positions, self.modalities, *self.segments.tensors()]

    def map(self, function: Callable[[Tensor], Tensor]) -> "PackedTokens":
        """The same with every tensor replaced by what the function makes of it."""
        return PackedTokens(
            function(self.ids), function(self.positions), function(self.modalities), self.segments.map(function)
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedTokens":
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))


IGNORE_INDEX = -100  # a target that counts for nothing, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class MaskedBatch:
    """What the model trains on: the visible tokens (encoder) and the tokens to predict (decoder)."""

    encoder: PackedTokens
    decoder: PackedTokens

    def tensors(self) -> list[Tensor]:
        """Of the encoder, then the decoder: ids, positions, modalities, cu_seqlens, counts."""
        return [*self.encoder.tensors(), *self.decoder.tensors()]

    def map(self, function: Callable[[Tensor], Tensor]) -> "MaskedBatch":
        """The same with every tensor replaced by what the function makes of it."""
        return MaskedBatch(self.encoder.map(function), self.decoder.map(function))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MaskedBatch":
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def clone(self) -> "MaskedBatch":
        return self.map(Tensor.clone)

    def has_shapes_of(self, other: "MaskedBatch") -> bool:
        """Whether every tensor has the shape of its counterpart, and every bound is the same."""
        sides = ((self.encoder, other.encoder), (self.decoder, other.decoder))
        return all(a.segments.max_seqlen == b.segments.max_seqlen for a, b in sides) and all(
            a.shape == b.shape for a, b in zip(self.tensors(), other.tensors(), strict=True)
        )

    def padded(self) -> dict[str, Tensor]:
        """nano4M's padded batch: for enc and dec the (B, max_seqlen) int64 tensors `*_tokens` (0, or -100 for targets,
        in the padding), `*_positions`, `*_modalities` (0 there) and the bool `*_pad_mask`, True where a token is valid.
        """
        return _pad(self.encoder, "enc", 0) | _pad(self.decoder, "dec", IGNORE_INDEX)

    @staticmethod
    def from_padded(batch: Mapping[str, Tensor], num_modalities: int | None = None) -> "MaskedBatch":
        """The inverse of `padded`.

        Args:
            batch: nano4M's padded batch, each sample ordered by modality.
            num_modalities: M; default one more than the largest modality index found, which waits for the device.

        Raises:
            ValueError: a tensor is missing, has another shape than its mask, or a sample is not ordered by modality.
        """
        if num_modalities is None:
            found = [batch[f"{p}_modalities"][batch[f"{p}_pad_mask"]] for p in ("enc", "dec")]
            num_modalities = max((int(m.max()) + 1 for m in found if m.numel()), default=1)
        return MaskedBatch(_unpad(batch, "enc", num_modalities), _unpad(batch, "dec", num_modalities))


def _pad(packed: PackedTokens, prefix: str, pad_id: int) -> dict[str, Tensor]:
    segments = packed.segments
    samples, width, total = segments.batch_size, segments.max_seqlen, packed.ids.shape[0]
    device = packed.ids.device
    sample = segments.sample_of_token(total)
    column = torch.arange(total, device=device) - segments.cu_seqlens[sample]
    # One extra row and column take the tail, which belongs to no sample, and are cut off again.
    column = torch.where(sample < samples, column, width)

    def scatter(values: Tensor, fill: int | bool) -> Tensor:
        grid = torch.full((samples + 1, width + 1), fill, dtype=values.dtype, device=device)
        grid[sample, column] = values
        return grid[:samples, :width].contiguous()

    return {
        f"{prefix}_tokens": scatter(packed.ids, pad_id),
        f"{prefix}_positions": scatter(packed.positions, 0),
        f"{prefix}_modalities": scatter(packed.modalities, 0),
        f"{prefix}_pad_mask": scatter(torch.ones(total, dtype=torch.bool, device=device), False),
    }


def _unpad(batch: Mapping[str, Tensor], prefix: str, num_modalities: int) -> PackedTokens:
    names = [f"{prefix}_{field}" for field in ("tokens", "positions", "modalities", "pad_mask")]
    missing = [name for name in names if name not in batch]
    if missing:
        raise ValueError(f"from_padded: the batch lacks {', '.join(missing)}; it has {', '.join(batch)}")
    tokens, positions, modalities, mask = (batch[name] for name in names)
    for name in names[:3]:
        if batch[name].shape != mask.shape or mask.dim() != 2:
            raise ValueError(
                f"from_padded: {name} has shape {tuple(batch[name].shape)}, {names[3]} {tuple(mask.shape)}; "
                "expected the same (B, N)"
            )
    valid = mask.bool()
    modality = modalities.long()
    if bool((modality[valid] >= num_modalities).any()) or bool((modality[valid] < 0).any()):
        raise ValueError(f"from_padded: {prefix}_modalities must be 0 to {num_modalities - 1}")
    # Padding may hold anything: give it the modality before it, so that it never looks out of order.
    running = torch.where(valid, modality, -1).cummax(dim=1).values
    if bool((valid & (modality < running)).any()):
        raise ValueError(f"from_padded: the tokens of a sample in {prefix}_modalities must be ordered by modality")
    one_hot = (modality.unsqueeze(-1) == torch.arange(num_modalities, device=mask.device)) & valid.unsqueeze(-1)
    segments = Segments.from_counts(one_hot.sum(1), max_seqlen=mask.shape[1])
    return PackedTokens(tokens[valid].long(), positions[valid].long(), modality[valid], segments)
