"""One M4 training step (forward, backward, clipping, AdamW) of the full-size model, against the padded references."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import gpu_step
from benchmarks.device import ON_GPU
from benchmarks.measure import Run, Work
from benchmarks.suite import Case, Suite, test_guard, test_time  # noqa: F401
from m4.model import M4, ModelConfig
from m4kernels import MaskedBatch, PackedTokens, Segments
from m4kernels.cases import M4_INPUT_MEANS, M4_MAX_SEQ_LENS, M4_TARGET_MEANS, random_packed

MODALITIES = ("tok_rgb", "coords", "tok_rgb_next", "coords_next")
VOCABULARY = (65536,) * 4
WIDTH = 256  # slots of a padded sample


def masked_batch(samples: int) -> MaskedBatch:
    """Samples with the mean numbers of tokens that M4's masking rule gives."""
    g = torch.Generator().manual_seed(0)

    def half(means: tuple[float, ...]) -> PackedTokens:
        counts = torch.tensor(means).round().int().expand(samples, -1).clone()
        return random_packed(Segments.from_counts(counts, max_seqlen=WIDTH), VOCABULARY, g)

    return MaskedBatch(half(M4_INPUT_MEANS), half(M4_TARGET_MEANS))


@functools.cache
def model() -> tuple[M4, torch.optim.Optimizer]:
    """One model for all providers: 176 M parameters, their gradients and two moments are 2.8 GB."""
    torch.manual_seed(0)
    m4 = M4(ModelConfig(MODALITIES, VOCABULARY, M4_MAX_SEQ_LENS))
    return m4, torch.optim.AdamW(m4.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


def step(kernels: str) -> Callable[[MaskedBatch], Run]:
    def prepare(batch: MaskedBatch) -> Run:
        m4, optimizer = model()
        config = replace(m4.config, kernels=kernels)

        def run() -> None:
            m4.config = config
            m4(batch).total.backward()
            torch.nn.utils.clip_grad_norm_(m4.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return run

    return prepare


def work(batch: MaskedBatch) -> Work:
    """Matrix products of the packed tokens; attention's own share is below 3 %."""
    visible, targets = batch.encoder.ids.shape[0], batch.decoder.ids.shape[0]
    dim, hidden, depth = 640, 2560, 8
    encoder = depth * (4 * dim * dim + 2 * dim * hidden)
    decoder = depth * (6 * dim * dim + 2 * dim * hidden) + VOCABULARY[0] * dim
    context = depth * 2 * dim * dim + dim * dim
    amount = 6.0 * (visible * (encoder + context) + targets * decoder)
    return Work(amount, "FLOP", "FLOP = 6 x (packed tokens x weights that multiply them)")


CPU_SUITE = Suite(
    "training_step",
    {
        "M4, 2 samples": Case(lambda: masked_batch(2), work, full=True),
        "M4, 4 samples": Case(lambda: masked_batch(4), work),
        "M4, 16 samples": Case(lambda: masked_batch(16), work, full=True),
    },
    {"auto": step("auto"), "reference": step("reference"), "reference-matmul": step("reference-matmul")},
    guards=(("auto", "reference"), ("auto", "reference-matmul")),
)

SUITE = gpu_step.suite() if ON_GPU else CPU_SUITE
