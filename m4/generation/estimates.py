"""Image codes that are shown: those of least expected error, where it is known what codes stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m4.data.tokenizers import code_values
from m4.modalities import RowLayout

_MOST_BYTES = 1 << 27  # of distances that are held at once
# Predicted probabilities are taken to this power before the mean: of 64,000 codes the many unlikely ones hold more than
# their share, which greys the picture. Chosen on training samples (docs/learning.md, "What frames show").
SHARPNESS = 1.5


class CodeValues(NamedTuple):
    """Of the image codes of a row what they stand for."""

    where: Tensor  # bool (L,): the places of image codes; or of some tokens (T,) which are
    values: Tensor  # float32 (V, C): a point for each code, see m4.data.tokenizers.code_values

    @classmethod
    def of(cls, layout: RowLayout, meta: Mapping[str, Any], device: torch.device) -> CodeValues | None:
        """Those of data with this meta.json; None where its image tokenizer has none, or names none."""
        values = code_values(meta)
        if values is None:
            return None
        return cls(layout.pictures().to(device), torch.from_numpy(values).to(device))

    def at(self, places: Tensor) -> CodeValues:
        """Of the tokens at these places (int64 (T,)) of rows."""
        return CodeValues(self.where[places], self.values)

    def closest(self, expected: Tensor, codes: int) -> Tensor:
        """The code whose expected squared distance from the true one is least: the nearest to the expected point.

        The likeliest code is the one that is most often right. Where a model is not sure that is often the background,
        and what moves is missing from the picture; the mean error of pixels, of which PSNR tells, is least here.

        Args:
            expected: float32 (T, C), the mean of the points under the predicted distribution, sharpened (SHARPNESS).
            codes: of the first so many.
        Returns:
            int64 (T,), below ``codes``.
        """
        values = self.values[:codes]
        square = values.square().sum(1)  # |e - v|² = |e|² - 2 e·v + |v|², and |e|² is the same for all codes
        rows = max(1, _MOST_BYTES // (4 * codes))
        parts = [torch.addmm(square, some, values.T, alpha=-2).argmin(1) for some in expected.split(rows)]
        return torch.cat(parts) if len(expected) else expected.new_empty(0, dtype=torch.int64)
