"""mask_tokens: random numbers, a selection and the writing of the packed tokens."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.device import ON_GPU, backends
from benchmarks.measure import Run, Work
from benchmarks.peers.mask_nano4m import MaskNano4M
from benchmarks.suite import Case, Suite, test_guard, test_time  # noqa: F401
from m4kernels import MaskedBatch, MaskingSpec, mask_tokens
from m4kernels.cases import M4_MASKING as M4

# A tenth of the tokens in use: what is not chosen should cost little.
SPARSE = MaskingSpec((256, 39, 256, 39), (1.5, 1.5, 0.5, 0.5), (0.5, 0.5, 1.5, 1.5), (20, 40), (10, 40))
RULE = "nano4M's rule"


class Samples(NamedTuple):
    tokens: Tensor  # (B, L) uint16, as the token store has them
    sample_ids: Tensor  # (B,)
    spec: MaskingSpec


def samples(batch: int, spec: MaskingSpec) -> Samples:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64_000, (batch, spec.num_tokens), generator=g).to(torch.uint16)
    return Samples(tokens, torch.arange(batch), spec)


def packed(inputs: Samples, backend: str) -> Run:
    def run(capacity: tuple[int, int] | None = None) -> MaskedBatch:
        return mask_tokens(
            inputs.tokens, inputs.spec, seed=1, sample_ids=inputs.sample_ids, capacity=capacity, backend=backend
        )

    if not ON_GPU:
        return run
    batch = run()  # a GPU would be waited for without a capacity
    capacity = len(batch.encoder.ids), len(batch.decoder.ids)
    return lambda: run(capacity)


def work(inputs: Samples) -> Work:
    batch = packed(inputs, "reference")()
    tokens = batch.encoder.ids.shape[0] + batch.decoder.ids.shape[0]
    segments = len(inputs.sample_ids) * (8 + 2 * 4 * (inputs.spec.num_modalities + 1))
    return Work(
        tokens * (2 + 24) + segments,
        "B",
        "bytes = packed tokens x (2 read + 24 written) + samples x (8 id + 8 x (M + 1) counts and offsets)",
    )


def provider(backend: str) -> Callable[[Samples], Run]:
    return lambda inputs: packed(inputs, backend)


def rule(inputs: Samples) -> Run:
    mask = MaskNano4M(inputs.spec)
    tokens = inputs.tokens.long()  # outside the timing: its loader has int64 tokens
    return lambda: mask(tokens)


BACKENDS = backends("mask_tokens")
BASELINES = ("reference",) if ON_GPU else ("reference", RULE)  # nano4M masks in the data loader, on the CPU
SUITE = Suite(
    "mask_tokens",
    {
        "M4 batch 96": Case(lambda: samples(96, M4), work, gpu=True),
        "sparse, batch 96": Case(lambda: samples(96, SPARSE), work),
        "1 sample": Case(lambda: samples(1, M4), work),
        "4,096 samples": Case(lambda: samples(4096, M4), work, without=(RULE,), gpu=True),
        "100,000 samples": Case(lambda: samples(100_000, M4), work, without=(RULE, "reference"), full=True, gpu=True),
    },
    {name: provider(name) for name in BACKENDS} | ({} if ON_GPU else {RULE: rule}),
    guards=tuple((name, baseline) for name in BACKENDS[:-1] for baseline in BASELINES),
)
