"""Fill in whole modalities by confidence-ordered parallel decoding (MaskGIT, Chang et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m4.generation.estimates import CodeValues
from m4.modalities import RowLayout
from m4.model import M4
from m4kernels import MaskedBatch, PackedTokens, Segments

_SAMPLE_BITS = 20  # of the seed of a sample's generator; the rest, up to torch's 64 bits, is the seed
MAX_SEED = (1 << (64 - _SAMPLE_BITS)) - 1
_LOGITS_BYTES = 1 << 27  # that `predict_at_once` holds
MAX_TEMPERATURE = 1_000_000  # noise that float32 still holds beside -inf; ids are long since equally likely


class AtOnce(NamedTuple):
    """What `predict_at_once` returns."""

    tokens: Tensor  # int64 (B, L): the likeliest ids, medians where ids are ordinal
    shown: Tensor  # the same, but image codes of least expected error where ``code_values`` tells


@torch.no_grad()
def generate(
    model: M4,
    tokens: Tensor,
    *,
    given: Sequence[str],
    wanted: Sequence[str],
    id_limits: Tensor | None = None,
    ordinal: Tensor | None = None,
    code_values: CodeValues | None = None,
    steps: int = 12,
    temperature: float = 0.0,
    seed: int = 0,
    first_sample: int = 0,
) -> Tensor:
    """Fill in whole modalities by confidence-ordered parallel decoding (MaskGIT, Chang et al. 2022).

    In each step all missing tokens are predicted at once from what is known; the surest ones are kept, as many as a
    cosine schedule allows, and are known from then on.

    Args:
        tokens: int64 (B, L), modality after modality; read for ``given``, ignored for ``wanted``.
        given, wanted: names of the modalities that are known and to be predicted; others stay out of it.
        id_limits: int64 (L,), ids allowed at each position are below it; default the modality's vocabulary.
        ordinal: bool (L,), where ids are steps of a scale: there temperature 0 takes the median of the predicted
            distribution, whose expected distance from the truth is least, instead of the likeliest id. Default nowhere.
        code_values: what image codes stand for; there temperature 0 takes the code of least expected error. Default
            nowhere.
        steps: forward passes, at least 1; each keeps at least one token of every sample.
        temperature: 0 takes the likeliest id (or the median); above, up to MAX_TEMPERATURE, ids and the order of
            keeping are sampled.
        seed: in 0 … MAX_SEED; with the sample's place, decides the sampling.
        first_sample: place of the batch's first sample, where samples are decoded in several batches.
    Returns:
        int64 (B, L), ``tokens`` with the wanted modalities predicted.
    Raises:
        ValueError: a modality is unknown, both given and wanted, or none is wanted; a number is out of range.
    """
    config = model.config
    names = list(config.modalities)
    _check_names(names, given, wanted)
    _check_numbers(steps, temperature, seed, first_sample, len(tokens))
    device = tokens.device
    layout = RowLayout.of(config)
    modality, position = layout.modality_ids().to(device), layout.positions().to(device)  # (L,)
    id_limits = torch.tensor(config.vocab_sizes, device=device)[modality] if id_limits is None else id_limits
    ordinal = torch.zeros_like(modality, dtype=torch.bool) if ordinal is None else ordinal
    filled = tokens.clone()
    known, missing = (  # bool (B, L)
        torch.isin(modality, torch.tensor([names.index(n) for n in chosen], device=device)).repeat(len(tokens), 1)
        for chosen in (given, wanted)
    )
    left = total = int(missing[0].sum())
    limits_of_missing = id_limits.expand(tokens.shape)[missing]
    head = model.to_logits.weight[: int(limits_of_missing.max()) if total else None]  # ids beyond are never taken
    generators = _generators(seed, range(first_sample, first_sample + len(tokens)))
    for step in range(steps):
        batch = MaskedBatch(
            _pack(filled, known, modality, position, len(names)), _pack(filled, missing, modality, position, len(names))
        )
        logits = torch.nn.functional.linear(model.decode(batch), head).float()
        logits = logits.unflatten(0, (len(tokens), left))  # (B, left, ids)
        limits, on_scale, coded = (
            each.expand(tokens.shape)[missing].view(len(tokens), left)
            for each in (id_limits, ordinal, ordinal if code_values is None else code_values.where)
        )
        logits.masked_fill_(torch.arange(logits.shape[-1], device=device) >= limits[..., None], -torch.inf)
        ids, confidence = _choose(logits, on_scale, temperature * (1 - step / steps), generators)
        if code_values is not None and temperature == 0:
            ids[coded] = code_values.closest(logits[coded].softmax(-1))
        remaining = min(left - 1, math.floor(total * math.cos(math.pi / 2 * (step + 1) / steps)))
        keep = confidence.topk(left - remaining, dim=1).indices  # (B, kept), indices into the missing tokens
        places = missing.nonzero()[:, 1].view(len(tokens), left).gather(1, keep)
        filled.scatter_(1, places, ids.gather(1, keep))
        known.scatter_(1, places, True)
        missing.scatter_(1, places, False)
        left = remaining
        if left == 0:
            break
    return filled


@torch.no_grad()
def predict_at_once(
    model: M4,
    tokens: Tensor,
    *,
    given: Sequence[str],
    wanted: Sequence[str],
    id_limits: Tensor | None = None,
    ordinal: Tensor | None = None,
    code_values: CodeValues | None = None,
) -> AtOnce:
    """`generate` in a single step at temperature 0: every token is predicted from what is given, and none is drawn.

    Arguments and errors are those of `generate`. Logits are held for some tokens at a time, of the ids that these may
    have.
    """
    layout = RowLayout.of(model.config)
    _check_names(layout.modalities, given, wanted)
    batch = whole_batch(tokens, layout, given, wanted)
    targets = batch.decoder
    decoded = model.decode(batch)
    starts = torch.tensor([span.start for span in layout.spans], device=tokens.device)
    places = starts[targets.modalities] + targets.positions  # (T,), in the row
    limits = model.vocab_limits[targets.modalities] if id_limits is None else id_limits[places]
    on_scale = torch.zeros_like(places, dtype=torch.bool) if ordinal is None else ordinal[places]
    coded = torch.zeros_like(on_scale) if code_values is None else code_values.where[places]
    ids, shown = torch.empty_like(places), torch.empty_like(places)
    kinds = limits * 4 + on_scale * 2 + coded
    for kind in kinds.unique().tolist():
        limit, median, pictured = kind // 4, kind // 2 % 2, kind % 2
        for some in (kinds == kind).nonzero()[:, 0].split(max(1, _LOGITS_BYTES // (4 * limit))):
            logits = torch.nn.functional.linear(decoded[some], model.to_logits.weight[:limit]).float()
            ids[some] = shown[some] = _medians(logits.softmax(-1)) if median else logits.argmax(-1)
            if code_values is not None and pictured:
                shown[some] = code_values.closest(logits.softmax(-1))
    wanted_places = places.view(len(tokens), -1)
    return AtOnce(*(tokens.clone().scatter_(1, wanted_places, each.view_as(wanted_places)) for each in (ids, shown)))


def whole_batch(tokens: Tensor, layout: RowLayout, given: Sequence[str], wanted: Sequence[str]) -> MaskedBatch:
    """All tokens of the modalities ``given`` visible, all of those ``wanted`` targets; tokens int64 (B, L)."""
    modality, position = layout.modality_ids().to(tokens.device), layout.positions().to(tokens.device)

    def half(names: Sequence[str]) -> PackedTokens:
        indices = torch.tensor([layout.modalities.index(name) for name in names], device=tokens.device)
        chosen = torch.isin(modality, indices).expand(tokens.shape)
        return _pack(tokens, chosen, modality, position, len(layout.modalities))

    return MaskedBatch(half(given), half(wanted))


def _check_names(names: Sequence[str], given: Sequence[str], wanted: Sequence[str]) -> None:
    if {*given, *wanted} - set(names) or set(given) & set(wanted) or not wanted:
        raise ValueError(
            f"given {list(given)}, wanted {list(wanted)}: expected different modalities of {list(names)}, at least one "
            "wanted"
        )


def _check_numbers(steps: int, temperature: float, seed: int, first_sample: int, samples: int) -> None:
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"temperature: expected 0 … {MAX_TEMPERATURE}, got {temperature}")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed: expected 0 … {MAX_SEED}, got {seed}")
    if first_sample < 0 or first_sample + samples > 1 << _SAMPLE_BITS:
        raise ValueError(f"first_sample: expected samples within 0 … {(1 << _SAMPLE_BITS) - 1}, got {first_sample}")


def _generators(seed: int, samples: range) -> list[torch.Generator]:
    """One for each sample, by its place in the run."""
    return [torch.Generator().manual_seed((seed << _SAMPLE_BITS) + place) for place in samples]


def _pack(tokens: Tensor, chosen: Tensor, modality: Tensor, position: Tensor, modalities: int) -> PackedTokens:
    """The chosen (bool (B, L)) tokens, sample after sample."""
    place = chosen.nonzero()[:, 1]
    one_hot = torch.nn.functional.one_hot(modality, modalities)
    segments = Segments.from_counts(chosen.long() @ one_hot)
    return PackedTokens(tokens[chosen], position[place], modality[place], segments)


def _medians(p: Tensor) -> Tensor:
    """The median of each distribution (…, V) over ids that are steps of a scale."""
    return (p.cumsum(-1) < 0.5).sum(-1)


def _choose(
    logits: Tensor, ordinal: Tensor, temperature: float, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """An id for each row of (B, T, V) logits, and how sure it is: its log-probability, with noise if sampling.

    Where ordinal (B, T) and not sampled, the id is the median, as sure as the likeliest id.
    """
    log_p = logits.log_softmax(-1)
    if temperature == 0:
        confidence, ids = log_p.max(-1)
        ids[ordinal] = _medians(log_p[ordinal].exp())
        return ids, confidence

    def gumbel(shape: torch.Size) -> Tensor:
        noise = torch.stack([torch.rand(shape[1:], generator=g) for g in generators])
        return -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7))).to(logits.device)

    ids = (log_p + temperature * gumbel(log_p.shape)).argmax(-1)
    confidence = log_p.gather(-1, ids[..., None])[..., 0]
    return ids, confidence + temperature * gumbel(confidence.shape)
