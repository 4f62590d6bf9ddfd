"""Fill in whole modalities by parallel decoding (MaskGIT, Chang et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m4.errors import CheckpointError
from m4.generation.estimates import CodeValues
from m4.generation.forward import Places, StepModel
from m4.generation.noise import MAX_MOMENTS, uniforms
from m4.generation.options import Decoding
from m4.generation.sampling import Chosen, Rule, choose
from m4.generation.schedules import temperatures, tokens_kept
from m4.modalities import RowLayout
from m4.model import M4
from m4kernels import MaskedBatch

_ACTIVATION_BYTES = 1 << 28  # that the samples decoded together may take
_HELD = 16  # of the model's width: floats that a token holds at once in a block (q, k, v, hidden layer, sums)


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
    decoding: Decoding | None = None,
    sample_ids: Tensor | None = None,
    moment: int = 0,
) -> Tensor:
    """Fill in whole modalities by parallel decoding (MaskGIT, Chang et al. 2022).

    In each step all missing tokens are predicted at once from what is known; some of them, as many as the schedule
    says, are kept, and are known from then on. What is drawn for a sample is a function of the seed, its id and its
    tokens, whatever else is in the batch; on a GPU up to the rounding of its matrix products.

    Args:
        tokens: int64 (B, L), modality after modality; read for ``given``, ignored for ``wanted``.
        given, wanted: names of the modalities that are known and to be predicted; others stay out of it.
        id_limits: int64 (L,), ids allowed at each position are below it; default the modality's vocabulary.
        ordinal: bool (L,), where ids are steps of a scale: there temperature 0 takes the median of the predicted
            distribution, whose expected distance from the truth is least, instead of the likeliest id. Default nowhere.
        code_values: what image codes stand for; there temperature 0 takes the code of least expected error. Default
            nowhere.
        decoding: the settings; default those of `Decoding`.
        sample_ids: int64 (B,), which decide what is drawn; default 0 … B - 1.
        moment: number of a roll-out's moment, below 4096: other draws for each.
    Returns:
        int64 (B, L), ``tokens`` with the wanted modalities predicted. Samples are decoded so many at a time that their
        activations take about 256 MB, but at least one.
    Raises:
        ValueError: a modality is unknown, both given and wanted, or none is wanted; a number is out of range.
        CheckpointError: predictions are not finite.
    """
    decoding = decoding or Decoding()
    layout = RowLayout.of(model.config)
    check_names(layout.modalities, given, wanted)
    if decoding.guidance != 1 and not given:
        raise ValueError(f"guidance: expected 1 where nothing is given, got {decoding.guidance:g}")
    if not 0 <= moment < MAX_MOMENTS:
        raise ValueError(f"moment: expected 0 … {MAX_MOMENTS - 1}, got {moment}")
    tokens_kept(sum(layout[name].length for name in wanted), decoding.steps, decoding.schedule)
    device = tokens.device
    ids = torch.arange(len(tokens)) if sample_ids is None else sample_ids
    if ids.shape != tokens.shape[:1]:
        raise ValueError(f"sample_ids: expected one for each of {len(tokens)} samples, got shape {tuple(ids.shape)}")
    fill = _Filling(model, layout, given, wanted, id_limits, ordinal, code_values, decoding, device)
    at_once = samples_at_once(model, layout, given, wanted, guided=decoding.guidance != 1)
    parts = zip(tokens.split(at_once), ids.to(device).split(at_once), strict=True)
    if not len(tokens):
        return tokens.clone()
    return torch.cat(
        [fill(some, some_ids, moment, at_once if device.type == "cuda" else 0) for some, some_ids in parts]
    )


def samples_at_once(
    model: M4, layout: RowLayout, given: Sequence[str], wanted: Sequence[str], *, guided: bool = False
) -> int:
    """Samples whose activations take about 256 MB, at least one."""
    tokens = sum(layout[name].length for name in (*given, *wanted, *wanted)) * (2 if guided else 1)
    width = model.config.dim * (_HELD + model.config.mlp_ratio)
    return max(1, int(_ACTIVATION_BYTES / (4 * tokens * width)))


class _Filling:
    """`generate` for a batch."""

    def __init__(
        self,
        model: M4,
        layout: RowLayout,
        given: Sequence[str],
        wanted: Sequence[str],
        id_limits: Tensor | None,
        ordinal: Tensor | None,
        code_values: CodeValues | None,
        decoding: Decoding,
        device: torch.device,
    ) -> None:
        self._model, self._decoding, self._code_values = model, decoding, code_values
        self._places = Places(layout, device)
        self._given, self._wanted = self._places.of(given), self._places.of(wanted)
        self._limits = model.vocab_limits[self._places.modality] if id_limits is None else id_limits
        self._ordinal = torch.zeros_like(self._given) if ordinal is None else ordinal

    def __call__(self, tokens: Tensor, ids: Tensor, moment: int, at_least: int) -> Tensor:
        """at_least: samples to decode together; where there are fewer, some are decoded more than once, since a GPU's
        matrix products depend on the number of rows."""
        rows = torch.arange(max(len(tokens), at_least), device=tokens.device) % len(tokens)
        filled, ids = tokens[rows], ids[rows]
        known, missing = self._given.expand_as(filled).clone(), self._wanted.expand_as(filled).clone()
        decoding = self._decoding
        steps = StepModel(self._model, self._places, self._given, self._wanted, decoding.guidance)
        kept = tokens_kept(int(self._wanted.sum()), decoding.steps, decoding.schedule)
        heat = temperatures(decoding.temperature, decoding.steps, decoding.temperature_schedule)
        for step, (count, temperature) in enumerate(zip(kept, heat, strict=True)):
            y = steps.outputs(filled, known, missing)
            places = missing.nonzero()[:, 1].view(len(filled), -1)  # (B, T)
            draw, noise = uniforms(decoding.seed, ids, places, step=step, moment=moment)
            if decoding.order == "random":  # which tokens are kept is known before any logit
                keep = _largest(noise, count)
                y, places, draw = y.gather(1, keep[..., None].expand(-1, -1, y.shape[-1])), *_at(keep, places, draw)
            _, log_p, chosen = self._choose(y, places, draw, temperature)
            if decoding.order == "confidence":
                score = log_p if temperature == 0 else log_p - temperature * torch.log(-torch.log(noise))
                chosen, places = _at(_largest(score, count), chosen, places)
            filled.scatter_(1, places, chosen)
            known.scatter_(1, places, True)
            missing.scatter_(1, places, False)
        return filled[: len(tokens)]

    def at_once(self, tokens: Tensor) -> AtOnce:
        """All that is missing in one step at temperature 0."""
        known, missing = self._given.expand_as(tokens), self._wanted.expand_as(tokens)
        y = StepModel(self._model, self._places, self._given, self._wanted).outputs(tokens, known, missing)
        places = missing.nonzero()[:, 1].view(len(tokens), -1)  # (B, T)
        chosen = self._choose(y, places, None, 0.0)
        return AtOnce(*(tokens.clone().scatter_(1, places, ids) for ids in (chosen.ids, chosen.shown)))

    def _choose(self, y: Tensor, places: Tensor, draw: Tensor | None, temperature: float) -> Chosen:
        """Of (B, T) places."""
        flat = places.flatten()
        rule = Rule(temperature, self._decoding.top_k, self._decoding.top_p)
        uniform = draw.flatten() if draw is not None and temperature > 0 else None
        values = None if self._code_values is None else self._code_values.at(flat)
        head = self._model.to_logits.weight
        chosen = choose(y.flatten(0, 1), head, self._limits[flat], self._ordinal[flat], rule, uniform, values)
        _check_finite(chosen.log_p)
        return Chosen(*(each.view_as(places) for each in chosen))


def _largest(score: Tensor, count: int) -> Tensor:
    """int64 (B, count): where the largest of score (B, T) are, of equals the first."""
    return score.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _at(keep: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    return tuple(value.gather(1, keep) for value in values)


def _check_finite(log_p: Tensor) -> None:
    if not bool(torch.isfinite(log_p).all()):
        raise CheckpointError(
            "the model predicts values that are not finite: its weights are, or the guidance is beyond what they bear; "
            "take an earlier checkpoint, or lower guidance"
        )


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

    Arguments and errors are those of `generate`.
    """
    layout, once = RowLayout.of(model.config), Decoding(steps=1)
    check_names(layout.modalities, given, wanted)
    fill = _Filling(model, layout, given, wanted, id_limits, ordinal, code_values, once, tokens.device)
    parts = [fill.at_once(some) for some in tokens.split(samples_at_once(model, layout, given, wanted)) if len(some)]
    if not parts:
        return AtOnce(tokens.clone(), tokens.clone())
    return AtOnce(*(torch.cat(each) for each in zip(*parts, strict=True)))


def whole_batch(tokens: Tensor, layout: RowLayout, given: Sequence[str], wanted: Sequence[str]) -> MaskedBatch:
    """All tokens of the modalities ``given`` visible, all of those ``wanted`` targets; tokens int64 (B, L)."""
    places = Places(layout, tokens.device)
    given_half, wanted_half = (places.pack(tokens, places.of(names).expand(tokens.shape)) for names in (given, wanted))
    return MaskedBatch(given_half, wanted_half)


def check_names(names: Sequence[str], given: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise ValueError unless these are different modalities of ``names``, at least one of them wanted."""
    if {*given, *wanted} - set(names) or set(given) & set(wanted) or not wanted:
        raise ValueError(
            f"given {list(given)}, wanted {list(wanted)}: expected different modalities of {list(names)}, at least one "
            "wanted"
        )
