"""Image codes that are shown: those of least expected error, where it is known what codes stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m4.data.tokenizers import code_values
from m4.modalities import RowLayout

if TYPE_CHECKING:
    from scipy.spatial import KDTree

# Predicted probabilities are taken to this power before the mean: of 64,000 codes the many unlikely ones hold more than
# their share, which greys the picture. Chosen on training samples (docs/learning.md, "What frames show").
SHARPNESS = 1.5


def sharpened(p: Tensor) -> Tensor:
    """p to the power of SHARPNESS: a root and a product, since a power takes three times as long."""
    return p.sqrt().mul_(p)


@dataclass(frozen=True)
class CodeValues:
    """Of the image codes of a row what they stand for."""

    where: Tensor  # bool (L,): the places of image codes; or of some tokens (T,) which are
    values: Tensor  # float32 (V, C): a point for each code, see m4.data.tokenizers.code_values
    _trees: dict[int, KDTree] = field(default_factory=dict, repr=False)  # of the first so many codes, as asked for

    @classmethod
    def of(cls, layout: RowLayout, meta: Mapping[str, Any], device: torch.device) -> CodeValues | None:
        """Those of data with this meta.json; None where its image tokenizer has none, or names none."""
        values = code_values(meta)
        if values is None:
            return None
        return cls(layout.pictures().to(device), torch.from_numpy(values).to(device))

    def at(self, places: Tensor) -> CodeValues:
        """Of the tokens at these places (int64 (T,)) of rows; both share what `closest` keeps."""
        return replace(self, where=self.where[places])

    def closest(self, expected: Tensor, codes: int) -> Tensor:
        """The code whose expected squared distance from the true one is least: the nearest to the expected point.

        The likeliest code is the one that is most often right. Where a model is not sure that is often the background,
        and what moves is missing from the picture; the mean error of pixels, of which PSNR tells, is least here.

        Args:
            expected: float32 (T, C), the mean of the points under the predicted distribution, sharpened (SHARPNESS), on
                any device; the search is on the CPU. Where it is not finite the code is any: the caller refuses it.
            codes: of the first so many.
        Returns:
            int64 (T,), below ``codes``, on the device of ``expected``.
        """
        if not len(expected):
            return expected.new_empty(0, dtype=torch.int64)
        if codes not in self._trees:
            from scipy.spatial import KDTree  # here: its import takes a moment, and most of m4 needs it not

            self._trees[codes] = KDTree(self.values[:codes].cpu().numpy())
        points = expected.nan_to_num().cpu().numpy()
        _, nearest = self._trees[codes].query(points, workers=torch.get_num_threads())
        return torch.from_numpy(nearest).to(expected.device)
