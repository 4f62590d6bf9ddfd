"""Channels of displacement: what they are 0 for, what they do once something writes there, and that training may."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from m4.modalities import BINS, RowLayout
from m4.model import M4, ModelConfig
from m4.model.displacement import BANDS, CHANNELS, keep_clear, set_displacements
from m4.model.init import FREQUENCIES, OWN_DIRECTIONS, Space
from m4.model.layers import DecoderBlock
from m4kernels import MaskedBatch, PackedTokens, Segments

WAYS, WIDTHS, STAYS = range(BANDS), range(BANDS, 2 * BANDS), 2 * BANDS  # rows of `Space.channels`
CONFIG = ModelConfig(
    ("coords", "coords_next"), (BINS, BINS), (39, 39), dim=128, enc_depth=1, dec_depth=2, head_dim=32, mlp_ratio=4
)


def untrained() -> tuple[M4, Tensor]:
    """A model, and its channels (C, D), read off the last MLP's units."""
    torch.manual_seed(0)
    model = M4(CONFIG)
    blocks = [block for block in model.decoder.modules() if isinstance(block, DecoderBlock)]
    return model, _channels_of(blocks[-1].mlp.fc1.weight.detach())


def _channels_of(first: Tensor) -> Tensor:
    """(CHANNELS, D): half of the sum of the units e(c + t) and e(c − t) that share an entry t."""
    ends = [FREQUENCIES * band // BANDS for band in range(BANDS + 1)]
    sizes = [2 * (end - start) for start, end in itertools.pairwise(ends)] * 2 + [OWN_DIRECTIONS]
    channels, unit = [], 0
    for size in sizes:
        plus, minus = first[unit], first[unit + 2 * size]  # (c + t) / 2 and (c − t) / 2
        channels.append(plus + minus)
        unit += 4 * size
    return torch.stack(channels)


def poses(samples: int) -> MaskedBatch:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2000, 6000, (samples, 39), generator=g)
    ids[:, 26:] = 1

    def packed(modality: int) -> PackedTokens:
        counts = torch.zeros(samples, 2, dtype=torch.long)
        counts[:, modality] = 39
        return PackedTokens(
            ids.flatten(),
            torch.arange(39).repeat(samples),
            torch.full((samples * 39,), modality),
            Segments.from_counts(counts),
        )

    return MaskedBatch(packed(0), packed(1))


@torch.no_grad()
def displacements(model: M4, channels: Tensor, values: dict[int, float], reach: int = 600) -> Tensor:
    """float64 (2 · reach + 1,): mean probability of a joint's coordinate to move so many bins, −reach … reach, with
    these values (in units of the normed stream) in the channels of every target."""
    kept = model.dec_mod_emb.weight.clone()
    for channel, value in values.items():
        model.dec_mod_emb.weight += value * channels[channel]
    batch = poses(4)
    probability = model.logits(batch).double().softmax(1)
    model.dec_mod_emb.weight.copy_(kept)
    ids = batch.decoder.ids.view(-1, 39)[:, :26].reshape(-1)
    at = ids[:, None] + torch.arange(-reach, reach + 1)
    rows = probability.view(-1, 39, BINS)[:, :26].reshape(-1, BINS)
    return rows.gather(1, at).mean(0)


def mean_way(probability: Tensor) -> float:
    reach = len(probability) // 2
    return float((probability * torch.arange(-reach, reach + 1)).sum() / probability.sum())


def width(probability: Tensor) -> float:
    reach = len(probability) // 2
    return float((probability * torch.arange(-reach, reach + 1).abs()).sum() / probability.sum())


def test_channels_are_at_right_angles_and_clear_before_training() -> None:
    model, channels = untrained()
    torch.testing.assert_close(channels @ channels.T, torch.eye(CHANNELS), atol=1e-4, rtol=0)
    for read in (model.dec_mod_emb.weight, model.enc_tok_emb.weight[:BINS:97], model.pos_emb):
        assert (read @ channels.T).abs().max() < 1e-3 * read.norm(dim=1).max()  # positions leave out 1e-5 of them
    stream: list[Tensor] = []
    model.dec_norm.register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0]))
    with torch.no_grad():
        model.decode(poses(2))
    assert (stream[0] @ channels.T).abs().max() < 1e-3 * stream[0].norm(dim=1).max()


def test_a_way_moves_what_is_copied_to_one_side() -> None:
    model, channels = untrained()
    neither = displacements(model, channels, {})
    assert abs(mean_way(neither)) < 0.05 * width(neither)
    middle = len(neither) // 2
    # Slow waves tell the sides of some hundred bins apart, fast ones those of a few.
    for way, reach in zip(WAYS, (600, 300, 6), strict=True):
        for value in (1.0, -1.0):
            moved = displacements(model, channels, {way: value})
            near = moved[middle - reach : middle + reach + 1]
            above, below = float(near[reach + 1 :].sum()), float(near[:reach].sum())
            assert (above > 1.2 * below) if value > 0 else (below > 1.2 * above), (way, value)


def test_widths_and_whether_a_joint_stays() -> None:
    model, channels = untrained()
    middle = 600

    def pair(channel: int) -> tuple[Tensor, Tensor]:
        narrow, wide = (displacements(model, channels, {channel: value}) for value in (1.0, -1.0))
        return narrow, wide

    narrow, wide = pair(WIDTHS[0])  # of the slow waves: how much is further off than 600 bins
    assert 1 - float(narrow.sum()) < 0.5 * (1 - float(wide.sum()))
    narrow, wide = pair(WIDTHS[1])
    assert width(narrow) < 0.6 * width(wide)
    narrow, wide = pair(WIDTHS[2])
    assert narrow[middle - 4 : middle + 5].sum() > 1.2 * wide[middle - 4 : middle + 5].sum()
    stays, leaves = pair(STAYS)
    neither = displacements(model, channels, {})
    assert 2 * leaves[middle] < neither[middle] < stays[middle] / 1.5


def test_training_reaches_the_channels_from_the_first_step() -> None:
    """Of targets that all lie on one side, the gradient of what a channel holds points there."""
    model, channels = untrained()
    batch = poses(4)
    moved = batch.decoder.ids.clone().view(-1, 39)
    moved[:, :26] += 64  # 2 pixels
    targets = replace(batch.decoder, ids=moved.flatten())
    model(MaskedBatch(batch.encoder, targets)).total.backward()
    gradient = model.dec_mod_emb.weight.grad
    assert gradient is not None
    assert all(float(gradient[1] @ channels[way]) < 0 for way in (0, 1))


def test_a_small_mlp_has_as_many_channels_as_it_has_room_for() -> None:
    torch.manual_seed(0)
    channels = nn.init.orthogonal_(torch.empty(CHANNELS, 96))
    waves, own = torch.randn(2, 6, 96), torch.randn(8, 96)
    for rooms, hidden in ((0, 15), (1, 16), (6, 96), (6, 127), (7, 128)):
        first, second = torch.zeros(hidden, 96), torch.zeros(96, hidden)
        set_displacements(first, second, channels, waves, own, stream=1.0)
        units = 16 * rooms if rooms < CHANNELS else 128  # two waves of sines and cosines a band; eight own directions
        assert first[:units].any(dim=1).all()
        assert second[:, :units].any(dim=0).all()
        assert not first[units:].any()
        assert not second[:, units:].any()


def test_layers_keep_clear_of_the_channels() -> None:
    torch.manual_seed(0)
    channels, layer = nn.init.orthogonal_(torch.empty(3, 16)), nn.Linear(8, 16)
    before = layer.weight.clone()
    keep_clear(channels, [layer])
    assert (channels @ layer.weight).abs().max() < 1e-6
    torch.testing.assert_close(layer.weight + channels.T @ (channels @ before), before)


@pytest.mark.parametrize("dim", [32, 48, 64])
def test_models_too_small_for_channels_have_none(dim: int) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        ("coords", "coords_next"), (BINS, BINS), (39, 39), dim=dim, enc_depth=1, dec_depth=1, head_dim=16
    )
    model = M4(config)
    space = Space.of(model.pos_emb, RowLayout.of(config).described)
    assert len(space.channels) in (0, CHANNELS)
    assert len(space.channels) + len(space.tokens) <= dim
    if not len(space.channels):
        assert model.decoder.blocks[-1].mlp.fc1.weight.abs().max() < 0.2  # type: ignore[union-attr]
