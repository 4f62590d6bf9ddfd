"""A data loader constructed as nano4M's: padded, masked batches of a data set's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from m4.compat.arguments import read_flag, read_integer
from m4.compat.masking import SimpleMultimodalMasking
from m4.data.store import TokenStore, open_store

Batch = dict[str, Any]


class _MaskedRows(Dataset[Batch]):
    """Batches of a token store, masked when they are asked for, all samples of one at once."""

    def __init__(self, store: TokenStore, masking: SimpleMultimodalMasking, fixed: bool) -> None:
        self._store, self._masking, self._fixed = store, masking, fixed

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, row: int) -> Batch:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """What a DataLoader calls, with the rows of a batch."""
        return self._masking.of_rows(self._store.batch(rows), sample_ids=rows if self._fixed else None)


def create_multimodal_masked_dataloader(
    root_dir: str,
    split: str,
    *,
    sample_from_k_augmentations: int = 1,
    text_tokenizer_path: str | None = None,
    text_max_length: int | None = None,
    batch_size: int = 64,
    infinite: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
    shuffle: bool = True,
    drop_last: bool = True,
    distributed: bool = False,
    cache_dir: str | None = None,
    **masking: Any,
) -> DataLoader[Batch] | Iterator[Batch]:
    """Batches that `m4.compat.FourM` takes, of what `m4.data.store.open_store` reads.

    With ``shuffle`` every batch is masked afresh; without, as for evaluation, the mask of a sample is a function of
    ``seed`` and its row.

    Args:
        root_dir, split: where the tokens are, in folders or packed.
        sample_from_k_augmentations: 1, the first of each sample's.
        text_tokenizer_path, text_max_length: passed over; no modality here is tokenised text.
        infinite: give an iterator without end.
        pin_memory: where there is a GPU.
        distributed: this rank's share of the samples, if torch.distributed has ranks.
        cache_dir: where the packed cache is kept (default: beside the data); not nano4M's.
        masking: modalities and all else that `m4.compat.SimpleMultimodalMasking` takes; its ``seed`` is of the order of
            ranks too.

    Raises:
        ValueError: an argument does not fit, or there is no batch; DataError (a ValueError): the data cannot be used.
    """
    masks = SimpleMultimodalMasking(**masking)
    if read_integer("sample_from_k_augmentations", sample_from_k_augmentations) != 1:
        raise ValueError(
            f"sample_from_k_augmentations: expected 1, the first of each sample's, got {sample_from_k_augmentations}"
        )
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if read_integer(name, value) < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    flags = {"infinite": infinite, "pin_memory": pin_memory, "shuffle": shuffle, "drop_last": drop_last}
    for name, value in {**flags, "distributed": distributed}.items():
        read_flag(name, value)
    store = open_store(root_dir, split, masks.modalities, masks.vocab_sizes, masks.max_seq_lens, cache_dir=cache_dir)
    rows = _MaskedRows(store, masks, fixed=not shuffle)
    sampler: DistributedSampler[Batch] | None = None
    if distributed and torch.distributed.is_available() and torch.distributed.is_initialized():
        sampler = DistributedSampler(rows, shuffle=shuffle, seed=masks.seed, drop_last=drop_last)
    loader = DataLoader(
        rows,
        batch_size=batch_size,
        shuffle=shuffle if sampler is None else None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory and torch.cuda.is_available(),
        drop_last=drop_last,
        persistent_workers=num_workers > 0,
    )
    if not len(loader):
        raise ValueError(
            f"batch_size: {split} of {root_dir} has {len(store)} samples, too few for {batch_size} at a time"
        )
    return _endless(loader, sampler) if infinite else loader


def _as_it_is(batch: Any) -> Any:
    return batch


def _endless(loader: DataLoader[Batch], sampler: DistributedSampler[Batch] | None) -> Iterator[Batch]:
    epoch = 0
    while True:
        if sampler is not None:
            sampler.set_epoch(epoch)
        yield from loader
        epoch += 1
