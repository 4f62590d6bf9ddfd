"""Which steps may update: losses and gradients that are not finite are noticed on the device, and read of later.

Up to a number of such steps in a run are skipped: parameters and moments stay as they are, and training goes on. The
next one is one too many, and from it on nothing changes any more, until the host reads of it and stops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NotFinite:
    """A step whose loss or gradient was not finite."""

    ago: int  # steps before the last one that was launched
    losses: list[float]  # (M,)
    norm: float  # of the gradient


@dataclass(frozen=True)
class Verdict:
    """What became of the steps since the last `Guard.read`."""

    updates: int  # steps that changed the parameters
    skipped: list[NotFinite]  # steps that did not, and were passed over
    stopped: NotFinite | None  # the one too many; it and all after it changed nothing


class Guard:
    """Kept on the device, in tensors that stay where they are, so that a captured step can hold it.

    Args:
        modalities: number M of losses.
        allowed: steps that may be skipped in the whole run.
        device: where the step runs.
    """

    def __init__(self, modalities: int, allowed: int, device: torch.device) -> None:
        self.found_inf = torch.zeros((), device=device)  # 1 where this step must not update; optimisers read it
        self._allowed = allowed
        self._over = torch.zeros((), device=device)  # 1 from the step on that was one too many
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)  # in the whole run
        self._updates = torch.zeros((), device=device)  # since the last read, as the next
        self._launched = torch.zeros((), device=device)
        self._places = torch.arange(allowed + 1, device=device)
        self._records = torch.zeros(allowed + 1, 2 + modalities, device=device)  # launch, norm, losses
        self._known = 0  # skipped steps that the host has read of

    def start_at(self, skipped: int) -> None:
        """Go on with a run that has skipped so many steps."""
        self._skipped.fill_(skipped)
        self._known = skipped

    def close(self) -> None:
        """Let no step update, as for warming up; `open` ends it."""
        self._over.fill_(1.0)

    def open(self) -> None:
        """Begin counting."""
        for tensor in (self.found_inf, self._over, self._updates, self._launched):
            tensor.zero_()

    def check(self, losses: Tensor, norm: Tensor, excused: Tensor | None = None) -> None:
        """Decide whether the step at hand may update; asks the device for nothing.

        Args:
            losses: (M,) of the step.
            norm: () of its gradient.
            excused: () bool; where true a gradient that is not finite only leaves out the update, and is not counted.
        """
        excuse = torch.zeros_like(self._over, dtype=torch.bool) if excused is None else excused
        overflow = torch.isfinite(losses).all() & ~torch.isfinite(norm) & excuse
        finite = torch.isfinite(losses).all() & torch.isfinite(norm)
        bad = ~finite & ~overflow & (self._over == 0)
        place = self._places == self._skipped.clamp(max=self._allowed)
        record = torch.cat([torch.stack([self._launched, norm.float()]), losses])
        self._records.copy_(torch.where((place & bad).unsqueeze(1), record, self._records))
        too_many = bad & (self._skipped >= self._allowed)
        self._over.copy_(torch.maximum(self._over, too_many.float()))
        self._skipped.add_(bad & ~too_many)
        self.found_inf.copy_(torch.maximum(self._over, (bad | overflow).float()))
        self._updates.add_(1.0 - self.found_inf)
        self._launched.add_(1.0)

    def figures(self) -> Tensor:
        """float32 (4,), what `read` wants to know: over, updates, launched, skipped."""
        return torch.stack([self._over, self._updates, self._launched, self._skipped.float()])

    def read(self, figures: list[float]) -> Verdict:
        """What became of the steps since the last `read`.

        Args:
            figures: `figures` on the host.
        """
        over, updates, launched, skipped = (round(figure) for figure in figures)
        new = skipped - self._known
        records: list[list[float]] = []
        if new or over:
            first = min(self._known, self._allowed)
            records = self._records[first : min(skipped, self._allowed) + 1].tolist()
        found = [NotFinite(launched - 1 - round(at), losses, norm) for at, norm, *losses in records]
        self._known = skipped
        self._updates.zero_()
        self._launched.zero_()
        return Verdict(updates, found[:new], found[new] if over else None)
