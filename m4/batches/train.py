"""What a training step reads: the masked micro-batches of a stretch of the sample order, and a rank's share of them.

On a CPU they are as long as their tokens. On a GPU they have one of a few shapes, so that a captured step can take
them: lengths are drawn on the host, samples dealt so that they fit (`m4.batches.packing`), tokens masked on the device.
Nothing there waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from m4.batches.masked import mask_rows
from m4.batches.mirror import Mirror
from m4.batches.order import SampleOrder
from m4.batches.packing import SIZES, deal, drawn_counts, fixed_capacities
from m4.batches.rows import TokenRows, send
from m4.config import TrainConfig
from m4.data.store import TokenStore
from m4.distributed import World
from m4.schedule import Schedule
from m4kernels import MaskedBatch, MaskingSpec, mask_tokens

# Micro-batches to which samples are dealt together: more hardly evens out more, and takes the square of the time, 5 ms
# for 8 of 96 samples.
_TOGETHER = 8


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass."""

    masked: MaskedBatch
    samples: int  # of all ranks, which make their passes together
    valid_tokens: int  # likewise, in the mean of a step: inputs and targets, without the tail of a fixed capacity


@dataclass(frozen=True)
class StepBatches:
    """The samples of one optimiser step."""

    counts: Tensor  # (M,) int64, targets of each modality in the whole step, of all ranks, at least 1; on the device
    micro_batches: Iterator[MicroBatch]  # of this rank
    targets: np.ndarray | None = None  # (M,) int64, the same on the host, 0 where there is none; None: all have some


@dataclass(frozen=True)
class _Dealt:
    """What the host knows of a step before the device does anything."""

    position: int
    sample_ids: np.ndarray  # (A, B) of this rank
    rows: np.ndarray  # (A, B)
    valid_tokens: np.ndarray  # (A,) of all ranks
    target_counts: np.ndarray  # (M,)
    capacity: tuple[int, int]


class TrainBatches:
    """The micro-batches of every step of a run; positions in the sample order identify the samples and their masks.

    The micro-batches of a step are the same for any number of ranks: each takes as many, one after the other.

    Args:
        fixed_shapes: give micro-batches one of a few shapes, those of a step the same: three sizes a side; with several
            ranks one, for the gradients that they exchange are those of one.
        one_size: one all the same: compiling takes longer than the others gain.
        resident: as in `m4.batches.rows.TokenRows`.
        mirror: mirrors the samples that it draws, if given.
        world: the ranks; default one.
    """

    def __init__(
        self,
        store: TokenStore,
        order: SampleOrder,
        spec: MaskingSpec,
        config: TrainConfig,
        schedule: Schedule,
        device: torch.device,
        *,
        fixed_shapes: bool,
        one_size: bool = False,
        resident: bool | None = None,
        mirror: Mirror | None = None,
        world: World | None = None,
    ) -> None:
        self._world = world or World()
        self._all = schedule.accumulation * self._world.size  # micro-batches of a step
        self._store, self._order, self._spec, self._config, self._schedule = store, order, spec, config, schedule
        self._device, self._mirror = device, mirror
        # Micro-batches in groups of nearly one size: samples are dealt within a group.
        self._groups = np.array_split(np.arange(self._all), math.ceil(self._all / _TOGETHER))
        smallest = len(self._groups[-1])
        spreads = SIZES[-1:] if one_size or self._world.size > 1 else SIZES
        self.capacities = fixed_capacities(spec, config.batch_size, smallest, spreads) if fixed_shapes else None
        self._rows = TokenRows(store, device, resident=resident) if fixed_shapes else None
        self._next: _Dealt | None = None

    @property
    def capacity(self) -> tuple[int, int] | None:
        """(inputs, targets) of the largest of those shapes; None where they are as the tokens have it."""
        return None if self.capacities is None else self.capacities.largest

    def step(self, position: int) -> StepBatches:
        """The step that starts at a position."""
        if self.capacities is None:
            return self._ragged(position)
        self.prepare(position)
        dealt, self._next = self._next, None
        assert dealt is not None
        return self._fixed(dealt)

    def prepare(self, position: int) -> None:
        """Deal the samples of the step at a position ahead of its `step`, while the device is busy with another."""
        if self.capacities is None or (self._next is not None and self._next.position == position):
            return
        ids = np.arange(position, position + self._schedule.samples_per_step)
        inputs, targets = drawn_counts(self._spec, seed=self._config.seed, sample_ids=ids)
        tokens = np.stack([inputs.sum(1), targets.sum(1)], axis=1)
        dealt, capacity = self._deal(tokens)
        own = tokens[dealt].sum((1, 2))
        valid = own + _parts(int(tokens.sum() - own.sum()), len(own))
        self._next = _Dealt(position, ids[dealt], self._order.rows(ids[dealt]), valid, targets.sum(0), capacity)

    def _deal(self, tokens: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """`deal` of a step's samples, tokens (S, 2), to the micro-batches of this rank."""
        assert self.capacities is not None
        size, share = self._config.batch_size, range(self._all)[self._share()]
        mine, needed = [], np.zeros(2, dtype=np.int64)
        for group in self._groups:
            wanted = [place for place, micro_batch in enumerate(group) if micro_batch in share]
            if wanted:
                first = int(group[0]) * size
                theirs = tokens[first : first + len(group) * size]
                dealt, fitting = deal(theirs, len(group), self.capacities.fitting(*theirs.sum(0) / len(group)))
                mine.append(first + dealt[wanted])
                needed = np.maximum(needed, fitting)
        return np.concatenate(mine), self.capacities.fitting(int(needed[0]), int(needed[1]))

    def examples(self, position: int) -> list[MaskedBatch]:
        """A micro-batch of each size, the largest last: of the step at a position, or the next that fits the least."""
        assert self.capacities is not None
        smallest, *larger = self.capacities.pairs()
        for _ in range(64):  # about one step in four does, one in 370 where there is only one size does not
            self.prepare(position)
            dealt, self._next = self._next, None
            if dealt is not None and dealt.capacity == smallest:
                alike = [replace(dealt, capacity=pair) for pair in (smallest, *larger)]
                return [next(self._fixed(one).micro_batches).masked for one in alike]
            position += self._schedule.samples_per_step
        raise RuntimeError(f"no step of 64 fits the capacity {smallest} that was worked out for this recipe")

    def _fixed(self, dealt: _Dealt) -> StepBatches:
        assert self._rows is not None
        mirror, ids = self._mirror, dealt.sample_ids
        mirrored = np.zeros_like(ids) if mirror is None else mirror.chosen(ids)
        on_device = send(np.stack([ids, dealt.rows, mirrored]), self._device)

        def micro_batches() -> Iterator[MicroBatch]:
            assert self._rows is not None
            for index, rows in enumerate(dealt.rows):
                tokens = self._rows.tokens(rows, on_device[1, index])
                masked = mask_tokens(
                    tokens if mirror is None else mirror(tokens, on_device[2, index] != 0),
                    self._spec,
                    seed=self._config.seed,
                    sample_ids=on_device[0, index],
                    capacity=dealt.capacity,
                )
                samples = len(rows) * self._world.size
                yield MicroBatch(masked, samples, int(dealt.valid_tokens[index]))

        targets = dealt.target_counts
        return StepBatches(send(targets.clip(min=1), self._device), micro_batches(), targets)

    def _ragged(self, position: int) -> StepBatches:
        size, samples = self._config.batch_size, self._schedule.samples_per_step
        ids = np.arange(position, position + samples).reshape(self._all, size)
        share = self._share()
        masked = [self._masked_rows(some) for some in ids[share]]
        counts = np.stack([_counts(batch) for batch in masked])  # (A, 2, M), inputs and targets
        whole, valid = counts.sum(0), counts.sum((1, 2))
        others = np.delete(ids, share, axis=0)
        if others.size:  # their masks are known here too
            drawn = np.stack(drawn_counts(self._spec, seed=self._config.seed, sample_ids=others.ravel()))  # (2, S, M)
            whole = whole + drawn.sum(1)
            valid = valid + _parts(int(drawn.sum()), len(masked))
        targets = whole[1]
        return StepBatches(
            torch.from_numpy(targets.clip(min=1)).to(self._device),
            (MicroBatch(m, size * self._world.size, int(n)) for m, n in zip(masked, valid, strict=True)),
            targets,
        )

    def _share(self) -> slice:
        """This rank's among the micro-batches of a step."""
        each = self._schedule.accumulation
        return slice(self._world.rank * each, (self._world.rank + 1) * each)

    def _masked_rows(self, ids: np.ndarray) -> MaskedBatch:
        rows, seed = self._order.rows(ids), self._config.seed
        return mask_rows(self._store, rows, ids, self._spec, seed=seed, device=self._device, mirror=self._mirror)


def _parts(tokens: int, parts: int) -> np.ndarray:
    """int64 (parts,): the other ranks' tokens of a step, as if each of their passes had as many."""
    return np.diff(np.arange(parts + 1) * tokens // parts)


def _counts(batch: MaskedBatch) -> np.ndarray:
    """int64 (2, M): inputs and targets of each modality."""
    return np.stack([half.segments.counts.sum(0).cpu().numpy() for half in (batch.encoder, batch.decoder)])
