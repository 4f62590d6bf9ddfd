"""Filling in the next moment in 12 steps, against the plain loop: whole logits of every missing token in every step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.device import DEVICE
from benchmarks.measure import Run, Work
from benchmarks.suite import Case, Suite, test_guard, test_time  # noqa: F401
from m4.generation.decode import generate
from m4.generation.forward import Places
from m4.generation.options import STEPS, Decoding
from m4.generation.schedules import tokens_kept
from m4.modalities import NEXT, REFERENCE, RowLayout
from m4.model import M4, ModelConfig
from m4.model.config import AttentionConfig
from m4kernels import MaskedBatch


@dataclass(frozen=True)
class Inputs:
    """A model and the samples whose next moment it fills in, with the ids that each place may have."""

    model: M4
    tokens: Tensor
    limits: Tensor
    ordinal: Tensor


def inputs(samples: int, dim: int, depth: int, encoder: str = "full") -> Inputs:
    """Data of the embedded tokenizer and joints in 8,192 bins."""
    names = (*REFERENCE, *NEXT)
    config = ModelConfig(
        names,
        [64000, 8192] * 2,
        [256, 39] * 2,
        dim=dim,
        head_dim=32,
        enc_depth=depth,
        dec_depth=depth,
        attention=AttentionConfig(encoder=encoder),
    )
    torch.manual_seed(0)
    model = M4(config).eval()
    with torch.no_grad():
        model.to_logits.weight.normal_(std=0.2)
    layout = RowLayout.of(config)
    limits = layout.id_limits({})
    tokens = (torch.rand(samples, layout.length) * limits).long()
    return Inputs(model.to(DEVICE), tokens.to(DEVICE), limits.to(DEVICE), layout.ordinal().to(DEVICE))


def ours(temperature: float) -> Callable[[Inputs], Run]:
    def prepare(given: Inputs) -> Run:
        decoding = Decoding(temperature=temperature)
        return lambda: generate(
            given.model,
            given.tokens,
            given=REFERENCE,
            wanted=NEXT,
            id_limits=given.limits,
            ordinal=given.ordinal,
            decoding=decoding,
        )

    return prepare


def plain(together: int) -> Callable[[Inputs], Run]:
    """The loop as it is first written, so many samples at once: it fills in what `generate` does at temperature 0."""

    def prepare(given: Inputs) -> Run:
        return lambda: torch.cat([plain_loop(given, some) for some in given.tokens.split(together)])

    return prepare


@torch.no_grad()
def plain_loop(given: Inputs, tokens: Tensor) -> Tensor:
    places = Places(RowLayout.of(given.model.config), tokens.device)
    known, missing = (places.of(names).expand(tokens.shape).clone() for names in (REFERENCE, NEXT))
    filled, total = tokens.clone(), int(missing[0].sum())
    for count in tokens_kept(total, STEPS, "cosine"):
        batch = MaskedBatch(places.pack(filled, known), places.pack(filled, missing))
        logits = given.model.logits(batch).unflatten(0, (len(tokens), -1))
        place = missing.nonzero()[:, 1].view(len(tokens), -1)
        beyond = torch.arange(logits.shape[-1], device=tokens.device) >= given.limits[place][..., None]
        log_p = logits.masked_fill(beyond, -torch.inf).log_softmax(-1)
        confidence, ids = log_p.max(-1)
        on_scale = given.ordinal[place]
        ids[on_scale] = (log_p[on_scale].exp().cumsum(-1) < 0.5).sum(-1)
        keep = confidence.sort(dim=1, descending=True, stable=True).indices[:, :count]
        kept = place.gather(1, keep)
        filled.scatter_(1, kept, ids.gather(1, keep))
        known.scatter_(1, kept, True)
        missing.scatter_(1, kept, False)
    return filled


def work(given: Inputs) -> Work:
    """The products of the output layer with the ids that may be taken, for every token missing in every step."""
    limits, left = given.limits[-295:].double(), 295
    amount = 0.0
    for count in tokens_kept(295, STEPS, "cosine"):
        amount += 2.0 * len(given.tokens) * left * float(limits.mean()) * given.model.config.dim
        left -= count
    return Work(amount, "FLOP", "FLOP = 2 x tokens missing in each step x ids they may have x width")


SUITE = Suite(
    "generation",
    {
        "M4-tiny, 4 samples": Case(lambda: inputs(4, 96, 2), work),
        "M4-tiny, 16 samples": Case(lambda: inputs(16, 96, 2), work, full=True, gpu=True),
        "M4-tiny, 16 samples, encoder within modalities": Case(
            lambda: inputs(16, 96, 2, "within_modality"), work, full=True, gpu=True
        ),
    },
    {"generate": ours(0.0), "generate, temperature 1": ours(1.0), "plain loop": plain(1)},
    guards=(("generate", "plain loop"),),
)
