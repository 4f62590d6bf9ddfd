"""Traversals of masked batches."""

import dataclasses

import torch
from torch import Tensor

from m4kernels import MaskedBatch
from m4kernels.cases import random_masked_batch


def batch(seed: int = 0) -> MaskedBatch:
    g = torch.Generator().manual_seed(seed)
    return random_masked_batch(3, (5, 2), (4, 4), (10, 20), g, tail=2)


def every_tensor(value: object) -> list[Tensor]:
    """By the fields of the dataclasses, so that a field that is added is not forgotten."""
    if isinstance(value, Tensor):
        return [value]
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    return [x for field in fields for x in every_tensor(getattr(value, field.name))]


def test_tensors_are_all_and_in_order() -> None:
    made = batch()
    assert [id(x) for x in made.tensors()] == [id(x) for x in every_tensor(made)]
    assert len(made.tensors()) == 10


def test_map_reaches_every_tensor_and_keeps_the_rest() -> None:
    made = batch()
    shifted = made.map(lambda x: x + 1)
    for a, b in zip(shifted.tensors(), made.tensors(), strict=True):
        assert torch.equal(a, b + 1)
    assert shifted.encoder.segments.max_seqlen == made.encoder.segments.max_seqlen


def test_a_clone_shares_nothing() -> None:
    made = batch()
    copy = made.clone()
    for a, b in zip(copy.tensors(), made.tensors(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_shapes() -> None:
    made = batch()
    assert made.clone().has_shapes_of(made)
    longer = dataclasses.replace(made.encoder, ids=torch.zeros(99, dtype=torch.int64))
    assert not MaskedBatch(longer, made.decoder).has_shapes_of(made)
    bound = dataclasses.replace(made.decoder.segments, max_seqlen=99)
    assert not MaskedBatch(made.encoder, dataclasses.replace(made.decoder, segments=bound)).has_shapes_of(made)


def test_to_moves_every_tensor() -> None:
    assert {x.device.type for x in batch().to("meta").tensors()} == {"meta"}
