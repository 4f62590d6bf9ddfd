"""How often the true id of a target is the likeliest, or among the few likeliest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from m4.config import TrainConfig
from m4.device import autocast
from m4.model import M4
from m4kernels import MaskedBatch

TOP = (1, 5)
# Of the logits that are held at once. On a CPU (Zen 4) 8 and 32 MB take a quarter and a third longer, 256 MB, which are
# fresh memory every time, 1.8 times as long.
_LOGITS_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}


class TargetRanks:
    """Counts, batch by batch, how often the target is among the k likeliest ids of its modality, for k in TOP.

    Of ids that are equally likely the lower comes first, as in argmax.
    """

    def __init__(self, model: M4, config: TrainConfig, device: torch.device) -> None:
        self._model, self._config, self._device = model, config, device
        self._hits = torch.zeros(len(TOP), len(config.modalities), dtype=torch.int64)
        self._targets = torch.zeros(len(config.modalities), dtype=torch.int64)

    def watch(self, batches: Iterable[MaskedBatch]) -> Iterator[MaskedBatch]:
        """Hand the batches on, counted."""
        for batch in batches:
            self.add(batch)
            yield batch

    @torch.no_grad()
    def add(self, batch: MaskedBatch) -> None:
        """Count the targets of a batch."""
        targets = batch.decoder
        with autocast(self._config.dtype, self._device):
            decoded = self._model.decode(batch)
            for m, size in enumerate(self._config.vocab_sizes):
                chosen = targets.modalities == m
                ranks = self._ranks(decoded[chosen], targets.ids[chosen], size)
                for i, k in enumerate(TOP):
                    self._hits[i, m] += int((ranks < k).sum())
                self._targets[m] += len(ranks)

    def accuracy(self, k: int) -> dict[str, float | None]:
        """Share of the targets of each modality that are among the k likeliest ids, k in TOP; None without a target."""
        pairs = zip(self._hits[TOP.index(k)].tolist(), self._targets.tolist(), strict=True)
        shares = [hits / targets if targets else None for hits, targets in pairs]
        return dict(zip(self._config.modalities, shares, strict=True))

    def _ranks(self, decoded: Tensor, targets: Tensor, size: int) -> Tensor:
        """int64 (T,): how many of the first ``size`` ids come before the target."""
        weight = self._model.to_logits.weight[:size]
        ids = torch.arange(size, device=targets.device)
        rows = max(1, _LOGITS_BYTES["cuda" if decoded.is_cuda else "cpu"] // (4 * size))
        ranks = [torch.zeros_like(targets[:0])]
        for y, target in zip(decoded.split(rows), targets[:, None].split(rows), strict=True):
            logits = F.linear(y, weight).float()
            own = logits.gather(1, target)
            ranks.append(((logits > own) | ((logits == own) & (ids < target))).sum(1))
        return torch.cat(ranks)
