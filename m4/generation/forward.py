"""Decoder outputs for what is missing, given what is known, step after step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m4.generation.sampling import MIN_ROWS
from m4.modalities import RowLayout
from m4.model import M4
from m4kernels import PackedTokens, Segments


class Places:
    """Modality and position of every place of a row, on a device; packs the tokens at chosen places."""

    def __init__(self, layout: RowLayout, device: torch.device) -> None:
        self.layout = layout
        self.modality, self.position = layout.modality_ids().to(device), layout.positions().to(device)  # (L,)

    def of(self, names: Sequence[str]) -> Tensor:
        """bool (L,): the places of these modalities."""
        indices = torch.tensor([self.layout.modalities.index(name) for name in names], device=self.modality.device)
        return torch.isin(self.modality, indices)

    def pack(self, tokens: Tensor, chosen: Tensor) -> PackedTokens:
        """The chosen (bool (B, L)) of tokens (int64 (B, L)), sample after sample."""
        place = chosen.nonzero()[:, 1]
        counts = torch.zeros(len(chosen), len(self.layout.modalities), dtype=torch.int64, device=chosen.device)
        segments = Segments.from_counts(counts.index_add_(1, self.modality, chosen.long()))
        return PackedTokens(tokens[chosen], self.position[place], self.modality[place], segments)


class StepModel:
    """The model for a batch of rows whose tokens become known step by step.

    What the encoder makes of the modalities ``given`` is kept where no token that becomes known can change it, which is
    for ``attention.encoder`` to say: under "full" every token changes it.

    Args:
        given, wanted: bool (L,), the places that are known from the first, and those that are to be predicted.
        guidance: see `m4.generation.options.Decoding`.
    """

    def __init__(self, model: M4, places: Places, given: Tensor, wanted: Tensor, guidance: float = 1.0) -> None:
        self._model, self._places, self._guidance = model, places, guidance
        self._wanted = wanted
        self._kept = given & ~self._changeable(given | wanted, wanted)
        self._contexts: Tensor | None = None  # `_kept_contexts`

    def _changeable(self, used: Tensor, wanted: Tensor) -> Tensor:
        """bool (L,): places that the encoder connects with a wanted one, through any number of layers."""
        allow = self._model.allow_encoder
        if allow is None:
            return used
        count = len(allow)
        present = torch.zeros(count, dtype=torch.bool, device=allow.device)
        present[self._places.modality[used]] = True
        reached = torch.zeros_like(present)
        reached[self._places.modality[wanted]] = True
        between = (allow | allow.T) & present & present[:, None]
        for _ in range(count):
            reached = reached | (between & reached).any(-1)
        return reached[self._places.modality]

    def outputs(self, tokens: Tensor, known: Tensor, missing: Tensor) -> Tensor:
        """Decoder output of every missing token.

        Args:
            tokens: int64 (B, L).
            known, missing: bool (B, L), as many in every sample.
        Returns:
            (B, T, D), in the order of the row. The output layer being linear, guidance applies to it.
        """
        samples, left = len(tokens), int(missing[0].sum())
        if self._guidance == 1:
            return self._outputs(tokens, known, missing)[:samples].reshape(samples, left, -1)
        both = self._outputs(tokens.repeat(2, 1), torch.cat([known, known & self._wanted]), missing.repeat(2, 1))
        given, not_given = both[: 2 * samples].chunk(2)
        return not_given + self._guidance * (given - not_given)

    def _outputs(self, tokens: Tensor, known: Tensor, missing: Tensor) -> Tensor:
        """(B' >= B, T, D)"""
        kept, changing = known & self._kept, known & ~self._kept
        if self._contexts is None and kept.any():
            self._contexts = self._kept_contexts(tokens, kept)
        rows = _enough_rows(len(tokens), known, missing, changing)
        tokens, known, missing, changing = tokens[rows], known[rows], missing[rows], changing[rows]
        visible = self._places.pack(tokens, known)
        if self._contexts is None:
            context = self._model.context(visible)
        else:
            contexts = self._contexts[rows]
            if changing.any():
                contexts[changing] = self._model.context(self._places.pack(tokens, changing))
            context = contexts[known]
        targets = self._places.pack(tokens, missing)
        return self._model.answer(targets, context, visible.segments).unflatten(0, (len(rows), -1))

    def _kept_contexts(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """(B, L, D), filled at the places whose context is kept."""
        rows = _enough_rows(len(tokens), kept)
        contexts = self._model.pos_emb.new_zeros((len(rows), tokens.shape[1], self._model.config.dim))
        contexts[kept[rows]] = self._model.context(self._places.pack(tokens[rows], kept[rows]))
        return contexts[: len(tokens)]


def _enough_rows(samples: int, *chosen: Tensor) -> Tensor:
    """int64 (B' >= B,): samples, some more than once where else a matrix product over the tokens ``chosen`` (bool
    (B, L)) of all would have fewer rows than MIN_ROWS."""
    tokens = [count for count in (int(some.sum()) for some in chosen) if count]
    times = max((-(-MIN_ROWS // count) for count in tokens), default=1)
    return torch.arange(samples * times, device=chosen[0].device) % samples
