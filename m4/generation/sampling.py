"""An id for every decoder output, out of the ids that it may be, without holding whole logits.

Logits are computed for some rows and some ids at a time, and what is kept of them is small: the likeliest id and the
probability of all ids together. To draw an id, first a stretch of ids is drawn by its probability, then an id of it,
whose logits are computed once more; the median of a scale is the draw of 1/2. Only top-k and top-p take whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m4.generation.estimates import SHARPNESS, CodeValues, sharpened

# Matrix products of fewer rows go by other code, whose last bits differ: BLAS has kernels for vectors.
MIN_ROWS = 16
# Rows and ids that are held at once: on a CPU 4 MB, which stays in the cache (64 x 8192 takes a quarter more, others of
# this size make no difference; EPYC of Zen 5, 2026-11-26); on a GPU 256 MB.
_BLOCKS = {"cpu": (512, 2048), "cuda": (4096, 16384)}
_PLACES = 64  # neighbours among which `_highest` looks for the place
_RANKED_BYTES = 1 << 25  # of logits of whole rows, which top-k and top-p need; ranking them takes a few times as much
_RANKED = (256, 4096)  # likeliest ids that top-p looks at before it ranks all
_COLDEST = 1e-6  # temperatures below are as this one: nothing but the likeliest id is left


@dataclass(frozen=True)
class Rule:
    """How ids are drawn: as `m4.generation.options.Decoding` says."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    @property
    def restricted(self) -> bool:
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1)


class Chosen(NamedTuple):
    """What `choose` returns."""

    ids: Tensor  # int64 (T,)
    log_p: Tensor  # float64 (T,): the log-probability of the id under the model, of a median that of the likeliest
    shown: Tensor  # int64 (T,): the ids, but at temperature 0 the codes of least expected error of pictures


def choose(
    y: Tensor,
    weight: Tensor,
    limits: Tensor,
    ordinal: Tensor,
    rule: Rule,
    uniform: Tensor | None = None,
    code_values: CodeValues | None = None,
) -> Chosen:
    """An id for each row, and how sure it is.

    Args:
        y: (T, D), decoder outputs.
        weight: (V, D), of the output layer; logits are y · weightᵀ.
        limits: int64 (T,), ids are below it.
        ordinal: bool (T,), where ids are steps of a scale; at temperature 0 their median is taken.
        uniform: float64 (T,) in [0, 1), where in the distribution the id is drawn; needed above temperature 0.
        code_values: what image codes stand for, ``where`` bool (T,) of the rows; None if that is not known.
    """
    ids, log_p = torch.empty_like(limits), torch.empty(len(limits), dtype=torch.float64, device=y.device)
    shown = torch.empty_like(limits)
    at = torch.full_like(log_p, 0.5) if uniform is None else uniform
    coded = torch.zeros_like(ordinal) if code_values is None else code_values.where
    kinds = limits * 4 + (ordinal * 2 + coded if rule.temperature == 0 else 0)  # what is chosen alike
    for kind in kinds.unique().tolist():
        limit, on_scale, pictured = kind // 4, kind // 2 % 2, kind % 2
        rows = (kinds == kind).nonzero()[:, 0]
        x, head = y[rows], weight[:limit]
        if rule.restricted:
            ids[rows], log_p[rows] = _among_the_likeliest(x, head, rule, at[rows])
        elif rule.temperature == 0:
            values = code_values.values[:limit] if code_values is not None and pictured else None
            stretches = _Stretches.of(x, head, 1.0, values)
            ids[rows], log_p[rows] = stretches.likeliest()
            if on_scale:
                ids[rows] = stretches.quantile(at[rows])[0]
        else:
            stretches = _Stretches.of(x, head, max(rule.temperature, _COLDEST))
            ids[rows], logits = stretches.quantile(at[rows])
            log_p[rows] = logits.double() - stretches.log_total
        shown[rows] = ids[rows]
        if code_values is not None and pictured and stretches.expected is not None:
            shown[rows] = code_values.closest(stretches.expected, limit)
    return Chosen(ids, log_p, shown)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """float32 x · weightᵀ, whose rows do not depend on each other down to the last bit."""
    rows = len(x)
    if rows < MIN_ROWS:
        x = x[torch.arange(MIN_ROWS, device=x.device) % rows]
    return F.linear(x, weight)[:rows].float()


def _highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and its id, the first of equals: `max(-1)`, on a CPU in a fourth of its time, for
    PyTorch looks for places without vector instructions."""
    ids = logits.shape[1]
    whole = ids - ids % _PLACES
    if logits.is_cuda or whole == 0:
        best, where = logits.max(-1)
        return best, where
    most = logits[:, :whole].unflatten(1, (-1, _PLACES)).amax(-1)
    if whole < ids:
        most = torch.cat([most, logits[:, whole:].amax(-1, keepdim=True)], dim=1)
    best, part = most.max(-1)
    places = (part[:, None] * _PLACES + torch.arange(_PLACES)).clamp_(max=ids - 1)
    return best, places.gather(1, logits.gather(1, places).argmax(-1, keepdim=True))[:, 0]


def _row_blocks(rows: int, most: int) -> list[slice]:
    """Stretches of about equal length, at most ``most``: none is short where there are many."""
    parts = -(-rows // most)
    ends = [rows * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


@dataclass(frozen=True)
class _Stretches:
    """What is kept of the logits of T rows over S stretches of ids."""

    x: Tensor
    weight: Tensor
    temperature: float
    size: int  # ids of a stretch, the last may be shorter
    best: Tensor  # float32 (T, S): the largest logit
    best_id: Tensor  # int64 (T, S)
    mass: Tensor  # float64 (T, S): log of the sum of exp(logit / temperature)
    log_total: Tensor  # float64 (T,): log of the sum of exp(logit) over all ids
    expected: (
        Tensor | None
    )  # float32 (T, C): mean of the ids' values, if any, by probabilities to the power of SHARPNESS

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, temperature: float, values: Tensor | None = None) -> _Stretches:
        """values: float32 (V, C), of each id."""
        shared = temperature == 1  # the two sums are one
        most, size = _BLOCKS["cuda" if x.is_cuda else "cpu"]
        starts = range(0, len(weight), size)
        shape = len(x), len(starts)
        best = torch.empty(shape, device=x.device)
        best_id = torch.empty(shape, dtype=torch.int64, device=x.device)
        mass = torch.empty(shape, dtype=torch.float64, device=x.device)
        plain = mass if shared else torch.empty_like(mass)
        # A product with few rows is three times as fast as one with few columns.
        points_of = None if values is None else F.pad(values, (0, 1), value=1.0).t().contiguous()  # (C + 1, V)
        width = 0 if points_of is None else len(points_of)
        points = torch.empty((*shape, width), device=x.device)  # sums of exp(SHARPNESS (logit - largest)) · (value, 1)
        for rows in _row_blocks(len(x), most):
            for number, start in enumerate(starts):
                logits = _product(x[rows], weight[start : start + size])
                highest, where = _highest(logits)
                best[rows, number], best_id[rows, number] = highest, where + start
                logits -= highest[:, None]
                if not shared:
                    scaled = (logits / temperature).exp_().sum(-1)
                    mass[rows, number] = highest.double() / temperature + scaled.double().log_()
                p = logits.exp_()
                plain[rows, number] = highest.double() + p.sum(-1).double().log_()
                if points_of is not None:
                    points[rows, number] = _product(sharpened(p), points_of[:, start : start + size])
        total = plain.logsumexp(-1)
        scale = (SHARPNESS * (best - best.amax(-1, keepdim=True))).exp()
        sums = (points * scale[..., None]).sum(1)
        expected = None if values is None else sums[:, :-1] / sums[:, -1:]
        return cls(x, weight, temperature, size, best, best_id, mass, total, expected)

    def likeliest(self) -> tuple[Tensor, Tensor]:
        """The likeliest id of each row (the lowest of equals), and its log-probability."""
        stretch = self.best.argmax(-1, keepdim=True)
        highest = self.best.gather(-1, stretch)[:, 0].double()
        return self.best_id.gather(-1, stretch)[:, 0], highest - self.log_total

    def quantile(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """The first id of each row at which the probability of it and all lower ids is above ``at``; its logit."""
        shares = self.mass.softmax(-1)
        stretch, before = _first_above(shares, at * shares.sum(-1))
        within = (at * shares.sum(-1) - before) / shares.gather(-1, stretch[:, None])[:, 0]
        ids, logits = torch.empty_like(stretch), torch.empty(len(stretch), device=at.device)
        for number in stretch.unique().tolist():
            rows = (stretch == number).nonzero()[:, 0]
            start = number * self.size
            for some in rows.split(_BLOCKS["cpu"][0]):
                found = _product(self.x[some], self.weight[start : start + self.size])
                p = (found.double() / self.temperature).softmax(-1)
                index, _ = _first_above(p, within[some] * p.sum(-1))
                ids[some], logits[some] = index + start, found.gather(-1, index[:, None])[:, 0]
        return ids, logits


def _first_above(p: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first index of each row of p (T, N) at which the running sum is above target (T,), and the sum before it.

    Where rounding leaves none it is the last index with a probability: never one that has none.
    """
    sums = p.cumsum(-1)
    last = sums.argmax(-1)  # the first of equals
    index = torch.minimum((sums <= target[:, None]).sum(-1), last)
    before = F.pad(sums, (1, 0)).gather(-1, index[:, None])[:, 0]
    return index, before


def _among_the_likeliest(x: Tensor, weight: Tensor, rule: Rule, at: Tensor) -> tuple[Tensor, Tensor]:
    """Draws among the ids that top-k and top-p leave; as `choose`."""
    ids, log_p = torch.empty(len(x), dtype=torch.int64, device=x.device), torch.empty_like(at)
    for rows in _row_blocks(len(x), max(MIN_ROWS, _RANKED_BYTES // (4 * len(weight)))):
        logits = _product(x[rows], weight)
        drawn, logit = _from_nucleus(logits, rule, at[rows])
        ids[rows], log_p[rows] = drawn, logit.double() - logits.double().logsumexp(-1)
    return ids, log_p


def _from_nucleus(logits: Tensor, rule: Rule, at: Tensor) -> tuple[Tensor, Tensor]:
    """(id, logit) of each row (T, V), drawn at ``at`` among those that the rule leaves.

    Without top-k the likeliest ids are ranked a few at first: a row is done as soon as they have the probability top-p,
    whatever the others need.
    """
    temperature, every = max(rule.temperature, _COLDEST), logits.shape[1]
    # Of the probabilities that top-p adds up: of all ids, or of the top-k.
    counts = (*(count for count in _RANKED if count < every), every) if rule.top_k is None else (rule.top_k,)
    of_all = None if rule.top_k is not None else (logits.double() / temperature).logsumexp(-1, keepdim=True)
    ids, chosen = torch.empty(len(at), dtype=torch.int64, device=at.device), torch.empty_like(logits[:, 0])
    waiting = torch.arange(len(at), device=at.device)
    for count in counts:
        ranked, order = logits[waiting].topk(min(count, every))
        scaled = ranked.double() / temperature
        p = (scaled - (scaled.logsumexp(-1, keepdim=True) if of_all is None else of_all[waiting])).exp()
        sums = p.cumsum(-1)
        # An id is left where those before it do not have the probability yet; the first always is.
        left = sums - p < rule.top_p
        left[:, 0] = True
        p = torch.where(left, p, 0.0)
        place, _ = _first_above(p, at[waiting] * p.sum(-1))
        done = (sums[:, -1] >= rule.top_p) | (count == counts[-1])
        of = waiting[done]
        ids[of], chosen[of] = (x.gather(-1, place[:, None])[done, 0] for x in (order, ranked))
        waiting = waiting[~done]
        if not len(waiting):
            break
    return ids, chosen
