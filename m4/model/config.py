"""The shape of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

INITS = ("fourier", "normal")  # m4.model.init
KERNELS = ("auto", "reference", "reference-matmul")
MAX_DIM, MAX_DEPTH = 65536, 1024  # more is a slip of the pen: no machine has the memory


@dataclass
class AttentionConfig:
    """Which modality may attend to which: "full", "within_modality", or M rows of M zeros and ones (row = query)."""

    encoder: Any = "full"
    decoder: Any = "full"
    cross: Any = "full"

    @classmethod
    def of(cls, patterns: Mapping[str, Any] | None) -> "AttentionConfig":
        """From patterns by name; those left out are "full".

        Raises:
            ValueError: a name is none of encoder, decoder and cross.
        """
        names = [field.name for field in fields(cls)]
        unknown = [name for name in patterns or {} if name not in names]
        if unknown:
            raise ValueError(f"attention must be a section of {', '.join(names)}, got {unknown[0]}")
        return cls(**(patterns or {}))


@dataclass
class ModelConfig:
    """The shape of an M4 model; M = number of modalities.

    Args:
        modalities: names, in the order of their tokens within a sample.
        vocab_sizes: (M,), the classes of each modality; the shared vocabulary is the largest.
        max_seq_lens: (M,), the longest sequence of each modality.
        dim: width of the trunk, a multiple of head_dim.
        enc_depth, dec_depth: number of blocks.
        head_dim: width of an attention head.
        mlp_ratio: hidden width of the MLP over dim.
        attention: modality sparsity.
        init: initial values, see `m4.model.init`: "fourier", or nano4M's "normal".
        kernels: "auto" runs packed batches through m4kernels; "reference" is the padded pure-PyTorch path with a dense
            boolean mask, SDPA and whole logits; "reference-matmul" the same with an explicit masked softmax.
        activation_checkpointing: compute the blocks again in the backward pass instead of keeping what they computed.

    Raises:
        ValueError: a value does not fit; the message names the key.
    """

    modalities: Sequence[str]
    vocab_sizes: Sequence[int]
    max_seq_lens: Sequence[int]
    dim: int = 640
    enc_depth: int = 8
    dec_depth: int = 8
    head_dim: int = 64
    mlp_ratio: float = 4.0
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    init: str = "fourier"
    kernels: str = "auto"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if not self.modalities:
            raise ValueError("modalities must name at least one modality, got []")
        if len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"modalities must name each modality once, got {list(self.modalities)}")
        for name in ("vocab_sizes", "max_seq_lens"):
            values, count = list(getattr(self, name)), len(self.modalities)
            if len(values) != count:
                raise ValueError(
                    f"{name} has {len(values)} entries, modalities has {count}: expected {count} values, one each of "
                    f"{', '.join(self.modalities)}, got {values}"
                )
            if any(value < 1 for value in values):
                raise ValueError(f"{name} must be positive, got {values}")
        if not 1 <= self.head_dim <= MAX_DIM:
            raise ValueError(f"head_dim must be 1 to {MAX_DIM}, got {self.head_dim}")
        if not 2 <= self.dim <= MAX_DIM or self.dim % 2 or self.dim % self.head_dim:
            raise ValueError(
                f"dim must be even and a multiple of head_dim={self.head_dim}, got {self.dim}"
                + (f"; at most {MAX_DIM}" if self.dim > MAX_DIM else "")
            )
        for name in ("enc_depth", "dec_depth"):
            if not 1 <= getattr(self, name) <= MAX_DEPTH:
                raise ValueError(f"{name} must be at least 1 and at most {MAX_DEPTH}, got {getattr(self, name)}")
        if not 1 <= self.dim * self.mlp_ratio < MAX_DIM * 16 + 1:
            raise ValueError(
                f"mlp_ratio must be positive and make the hidden width dim * mlp_ratio 1 to {MAX_DIM * 16}, "
                f"got {self.mlp_ratio}"
            )
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {self.kernels!r}")
        if self.activation_checkpointing and self.kernels != "auto":
            raise ValueError(f"activation_checkpointing must be false with kernels={self.kernels}, which keeps all")
        for name in ("encoder", "decoder", "cross"):
            allow_matrix(getattr(self.attention, name), len(self.modalities), f"attention.{name}")

    @property
    def vocabulary(self) -> int:
        return max(self.vocab_sizes)


def allow_matrix(pattern: Any, modalities: int, key: str) -> Tensor | None:
    """bool (M, M) of an attention pattern, None for "full".

    Raises:
        ValueError: the pattern is neither known nor an M x M matrix of 0 and 1.
    """
    if isinstance(pattern, str) and pattern == "full":
        return None
    if isinstance(pattern, str) and pattern == "within_modality":
        return torch.eye(modalities, dtype=torch.bool)
    try:
        rows = None if isinstance(pattern, (str, Mapping)) else [list(row) for row in pattern]
    except TypeError:
        rows = None
    if rows is None or len(rows) != modalities or any(len(row) != modalities for row in rows):
        raise ValueError(
            f"{key} must be 'full', 'within_modality' or {modalities} rows of {modalities} zeros and ones, "
            f"got {pattern!r}"
        )
    if any(value not in (0, 1) for row in rows for value in row):
        raise ValueError(f"{key} must hold only 0 and 1, got {pattern!r}")
    return torch.tensor(rows, dtype=torch.bool)
